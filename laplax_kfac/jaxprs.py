"""Reading and evaluating jaxprs with public JAX only.

Everything that differs between JAX versions (how a closed jaxpr is opened, how a scan names its
operands) is here, so that the parser and the capture read the same on all of them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike
from jaxtyping import PyTree

Value = Any
"""What a variable stands for when a jaxpr is evaluated: an array, or what JAX traces it with."""
Evaluate = Callable[[Sequence[Value]], list[Value]]
"""Takes the values of an equation's operands to those of its outputs."""

REMAT = ("remat2", "checkpoint", "remat")
Consts = list[ArrayLike]
"""Constants of a jaxpr, in the order of its ``constvars``."""
Atom = Var | Literal
"""What an equation reads."""
CALLS = ("jit", "pjit", "call", "core_call", "closed_call", "eval_jaxpr", *REMAT)
"""Primitives that do nothing but evaluate a jaxpr, under their names in all versions of JAX."""


def with_consts(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr with its constants as leading inputs."""
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Consts]:
    """Split a jaxpr found in an equation's parameters into its equations and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def is_traced(arrays: PyTree) -> bool:
    """Whether a transformation is at work on any of these arrays."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))


def trace(function: Any, *args: Any) -> tuple[Jaxpr, Consts, PyTree]:
    """Trace ``function`` and drop the equations that its output does not need.

    Returns:
        The jaxpr (one input per leaf of ``args``), its constants, and the output as a pytree of
        ``jax.ShapeDtypeStruct``. Dead equations must go: a dead use of a parameter is no use.
    """
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr, consts = open_jaxpr(closed)
    arguments = with_consts(jaxpr)
    live, _ = dce_jaxpr(arguments, [True] * len(arguments.outvars), instantiate=True)
    return live, consts, out_shape


def _aval(atom: Atom) -> Any:
    """What JAX knows of an array; tokens and the like have no shape and dtype."""
    return atom.aval


def shape(atom: Atom) -> tuple[int, ...]:
    """Shape of a variable or literal."""
    return tuple(_aval(atom).shape)


def ndim(atom: Atom) -> int:
    """Number of axes of a variable or literal."""
    return len(_aval(atom).shape)


def size(atom: Atom) -> int:
    """Number of entries of a variable or literal."""
    return math.prod(_aval(atom).shape)


def spec(atom: Atom) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable or literal."""
    return jax.ShapeDtypeStruct(_aval(atom).shape, _aval(atom).dtype)


def numbered(atom: Atom) -> np.ndarray:
    """The numbers 0, 1, ... in the shape of a variable: where its entries are when raveled."""
    dtype = np.int32 if size(atom) < np.iinfo(np.int32).max else np.int64
    return np.arange(size(atom), dtype=dtype).reshape(shape(atom))


def is_inexact(atom: Atom) -> bool:
    """Whether a variable or literal holds floating-point (or complex) numbers."""
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def is_complex(atom: Atom) -> bool:
    """Whether a variable or literal holds complex numbers."""
    return getattr(getattr(atom.aval, "dtype", None), "kind", "") == "c"


def computes_complex(jaxpr: Jaxpr) -> bool:
    """Whether an equation has a complex output, at any depth that a walk enters."""
    return any(
        any(map(is_complex, eqn.outvars)) or any(map(computes_complex, bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def has_body(eqn: JaxprEqn) -> bool:
    """Whether an equation has sub-jaxprs that a walk enters: a scan, a cond, or a call."""
    return eqn.primitive.name in ("scan", "cond") or called_jaxpr(eqn) is not None


def has_custom_vjp(jaxpr: Jaxpr) -> bool:
    """Whether a pullback may run a rule that somebody wrote, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("custom_vjp") or any(map(has_custom_vjp, held(eqn))):
            return True
    return False


def held(eqn: JaxprEqn) -> list[Jaxpr]:
    """All jaxprs among an equation's parameters, whatever they are to it."""
    values = [
        inner
        for value in eqn.params.values()
        for inner in (value if isinstance(value, tuple | list) else (value,))
    ]
    found = [getattr(value, "jaxpr", value) for value in values]
    return [body for body in found if isinstance(body, Jaxpr)]


def with_derivative(jaxpr: Jaxpr) -> dict[int, JaxprEqn]:
    """The equations through which an output has a derivative, by their numbers."""
    return _differentiated(jaxpr, jaxpr.outvars)[0]


def _differentiated(jaxpr: Jaxpr, outputs: Iterable[Atom]) -> tuple[dict[int, JaxprEqn], set[Var]]:
    """The equations through which some variables have a derivative, and all that these read."""
    found: dict[int, JaxprEqn] = {}
    needed = {atom for atom in outputs if not isinstance(atom, Literal)}
    for number, eqn in reversed(list(enumerate(jaxpr.eqns))):
        outputs = [v for v in eqn.outvars if v in needed and is_inexact(v)]
        if outputs and eqn.primitive.name != "stop_gradient":
            found[number] = eqn
            needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return found, needed


def differentiated_in_while(jaxpr: Jaxpr, eqn: JaxprEqn) -> list[bool]:
    """For every operand of a while loop, whether needed outputs have a derivative in it.

    Args:
        jaxpr: The jaxpr that the loop is an equation of.
        eqn: The loop.

    Returns:
        A truth value for each of the condition's constants, which have none; the body's constants;
        and the carries, which may be needed by each other in the next iteration.
    """
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body, _ = open_jaxpr(eqn.params["body_jaxpr"])
    needed = _differentiated(jaxpr, jaxpr.outvars)[1]
    live = [var in needed for var in eqn.outvars]
    while True:
        outputs = [var for var, on in zip(body.outvars, live, strict=True) if on]
        read = _differentiated(body, outputs)[1]
        inputs = [var in read for var in body.invars]
        more = [a or b for a, b in zip(live, inputs[num_body:], strict=True)]
        if more == live:
            return [False] * num_cond + inputs[:num_body] + live
        live = more


def consumers(equations: Iterable[JaxprEqn], outputs: Sequence[Atom]) -> dict[Var, int]:
    """How often each variable is read: by some equations, and as an output."""
    counts: dict[Var, int] = {}
    for atom in [a for eqn in equations for a in eqn.invars] + list(outputs):
        if not isinstance(atom, Literal):
            counts[atom] = counts.get(atom, 0) + 1
    return counts


def evaluate(jaxpr: Jaxpr, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation of ``jaxpr`` at the values of its operands, by JAX's own evaluator.

    Context, custom derivative rules and effects survive, because the equation itself is
    re-bound. Outputs that nobody reads come back as they are.
    """
    operands = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, Literal)
    }
    kept = [v for v in eqn.outvars if not is_dropped(v)]
    single = jaxpr.replace(constvars=[], invars=list(operands), outvars=kept, eqns=[eqn])
    results = iter(eval_jaxpr(single, [], *operands.values()))
    return [None if is_dropped(v) else next(results) for v in eqn.outvars]


def is_dropped(var: Atom) -> bool:
    """Whether an equation's output is one that nobody reads."""
    return type(var).__name__ == "DropVar"


@dataclass(frozen=True)
class ScanParts:
    """The operands of a scan equation: constants, carries, scanned inputs; and its body."""

    body: Jaxpr
    consts: Consts
    num_consts: int
    num_carry: int
    length: int
    reverse: bool

    def passes_carry(self, output: int) -> bool:
        """Whether an output of the body is a carry that it hands on unchanged."""
        carried = self.body.invars[self.num_consts + output] if output < self.num_carry else None
        return carried is not None and self.body.outvars[output] is carried

    def counts_up(self, carry: int) -> int | None:
        """The step of a scalar carry to which the body only adds a literal, if it is one."""
        out, carried = self.body.outvars[carry], self.body.invars[self.num_consts + carry]
        for eqn in self.body.eqns:
            if eqn.primitive.name == "add" and any(v is out for v in eqn.outvars):
                left, right = eqn.invars
                if left is carried and isinstance(right, Literal) and shape(carried) == ():
                    return int(right.val)
        return None


def scan_parts(eqn: JaxprEqn) -> ScanParts:
    """Read a scan equation; the parameters that count its operands differ between versions."""
    params = eqn.params
    if "num_consts" in params:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    else:
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    body, consts = open_jaxpr(params["jaxpr"])
    return ScanParts(
        body, consts, num_consts, num_carry, int(params["length"]), bool(params["reverse"])
    )


def cond_branches(eqn: JaxprEqn) -> list[tuple[Jaxpr, Consts]]:
    """The branches of a cond / switch equation; operand 0 is the index."""
    return [open_jaxpr(branch) for branch in eqn.params["branches"]]


def called_jaxpr(eqn: JaxprEqn) -> tuple[Jaxpr, Consts] | None:
    """The body of an equation that merely calls one jaxpr on all its operands (jit, remat, ...).

    Recognised by name: an equation with a jaxpr of the right shape may bring a derivative of its
    own, which inlining would lose (`linear_call`), or name axes that only it binds (`shard_map`).
    """
    if eqn.primitive.name not in CALLS:
        return None
    found = [v for v in eqn.params.values() if isinstance(getattr(v, "jaxpr", v), Jaxpr)]
    if len(found) != 1:
        return None
    jaxpr, consts = open_jaxpr(found[0])
    same = _avals(jaxpr.invars) == _avals(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)
    return (jaxpr, consts) if same else None


def ruled_jaxpr(eqn: JaxprEqn) -> tuple[Jaxpr, Consts] | None:
    """What an equation with a derivative rule of the model's own computes, without the rule."""
    if not eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call")):
        return None
    found = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
    return None if found is None else open_jaxpr(found)


def bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    """The sub-jaxprs that a walk enters, in the order of their numbers in a site."""
    if eqn.primitive.name == "scan":
        return [scan_parts(eqn).body]
    if eqn.primitive.name == "cond":
        return [body for body, _ in cond_branches(eqn)]
    called = called_jaxpr(eqn)
    return [] if called is None else [called[0]]


def _avals(atoms: Sequence[Atom]) -> list[tuple[object, object]]:
    return [(getattr(a.aval, "shape", None), getattr(a.aval, "dtype", None)) for a in atoms]
