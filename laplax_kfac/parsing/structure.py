"""The structure of a jaxpr as a key: what JAX itself compares, and never how it prints.

Primitives and their parameters are compared by their own equality, bodies equation by equation,
arrays by their entries. What has no hash is unlike everything.
"""

import dataclasses
import hashlib
import types
from collections.abc import Hashable, Mapping, Sequence

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import PyTree

from laplax_kfac import jaxprs
from laplax_kfac.jaxprs import Value

_PLAIN = frozenset({int, str, bool, type(None), jax.core.ShapedArray})
"""Types of what compares itself, and has no parts to look into."""
_CUSTOM_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Structure:
    """The structure of a jaxpr: equations with variables by number, in order of appearance.

    Attributes:
        rules: Whether derivative rules of the model's own are followed. They are functions, made
            anew by every trace: two are compared by the jaxprs of their pullbacks, and in those,
            where a rule may use itself, by the functions that they are defined for alone.
        found: What was found for an equation with a rule, by its identity; it stays alive here.
        contexts: The same for what is set around equations.
    """

    def __init__(self, *, rules: bool = True) -> None:
        """Nothing has been found yet."""
        self.rules = rules
        self.found: dict[int, tuple[JaxprEqn, Hashable]] = {}
        self.contexts: dict[int, tuple[object, Hashable]] = {}

    def of(self, jaxpr: Jaxpr) -> Hashable:
        """Binders with their abstract values (weak types and shardings too), equations, outputs."""
        numbers: dict[Var, int] = {}

        def bound(variables: Sequence[Var]) -> Hashable:
            numbers.update((v, len(numbers) + k) for k, v in enumerate(variables))
            return tuple(_hashable(v.aval) for v in variables)

        def read(atom: Var | Literal) -> Hashable:
            if isinstance(atom, Literal):
                return of_value(atom.val), _hashable(atom.aval)
            return numbers[atom]

        inputs = bound([*jaxpr.constvars, *jaxpr.invars])
        equations = tuple(
            (
                eqn.primitive,
                tuple(map(read, eqn.invars)),
                self._parameters(jaxpr, eqn),
                frozenset(eqn.effects),
                self._context(eqn),
                bound(eqn.outvars),
            )
            for eqn in jaxpr.eqns
        )
        return inputs, equations, tuple(map(read, jaxpr.outvars)), frozenset(jaxpr.effects)

    def _parameters(self, jaxpr: Jaxpr, eqn: JaxprEqn) -> Hashable:
        if eqn.primitive.name not in _CUSTOM_RULES:
            return tuple((name, self._parameter(value)) for name, value in eqn.params.items())
        # Of a rule's parameters, the jaxpr of the function, and its pullback.
        bodies = tuple(self._parameter(v) for v in eqn.params.values() if _is_jaxpr(v))
        if not self.rules:
            return bodies
        if id(eqn) not in self.found:  # functions under jit share their equations
            self.found[id(eqn)] = eqn, _pullback(jaxpr, eqn)
        return bodies, self.found[id(eqn)][1]

    def _context(self, eqn: JaxprEqn) -> Hashable:
        """What is set around an equation that matters for how it is compiled."""
        if id(eqn.ctx) not in self.contexts:  # most equations share one
            names = ("compute_type", "cur_abstract_mesh", "threefry_partitionable", "xla_metadata")
            values = tuple(of_value(getattr(eqn.ctx, name, None)) for name in names)
            self.contexts[id(eqn.ctx)] = eqn.ctx, values
        return self.contexts[id(eqn.ctx)][1]

    def _parameter(self, value: object) -> Hashable:
        if type(value) in _PLAIN:
            return value
        if _is_jaxpr(value):
            body, constants = jaxprs.open_jaxpr(value)
            return self.of(body), of_value(constants)
        if isinstance(value, tuple | list) and any(map(_is_jaxpr, value)):
            return tuple(map(self._parameter, value))
        return of_value(value)


def _is_jaxpr(value: object) -> bool:
    return isinstance(getattr(value, "jaxpr", value), Jaxpr)


def _pullback(jaxpr: Jaxpr, eqn: JaxprEqn) -> Hashable:
    """Equal for equations with derivative rules that pull cotangents back alike."""
    floating = [jaxprs.is_inexact(atom) for atom in eqn.invars]
    outputs = [v for v in eqn.outvars if jaxprs.is_inexact(v) and not jaxprs.is_dropped(v)]
    forward_mode = eqn.primitive.name.startswith("custom_jvp")

    def derivative(operands: list[Value], vectors: list[Value]) -> PyTree:
        def function(*moved: Value) -> list[Value]:
            rest = iter(moved)
            values = [next(rest) if f else x for f, x in zip(floating, operands, strict=True)]
            results = zip(eqn.outvars, jaxprs.evaluate(jaxpr, eqn, values), strict=True)
            return [x for v, x in results if any(v is o for o in outputs)]

        moved = [x for f, x in zip(floating, operands, strict=True) if f]
        if forward_mode:  # this is what the pullback is the transpose of
            return jax.jvp(function, moved, vectors)
        results, pull = jax.vjp(function, *moved)
        return results, pull(vectors)

    along = [v for f, v in zip(floating, eqn.invars, strict=True) if f] if forward_mode else outputs
    try:
        traced = jax.make_jaxpr(derivative)(
            [jaxprs.spec(v) for v in eqn.invars], [jaxprs.spec(v) for v in along]
        )
    except Exception:  # a rule may raise anything, away from its surroundings; then nothing is kept
        return object()
    body, constants = jaxprs.open_jaxpr(traced)
    return Structure(rules=False).of(body), of_value(constants)


def _hashable(value: object) -> Hashable:
    """The value, as it compares itself; what has no hash is unlike everything."""
    try:
        hash(value)
    except TypeError:
        return object()
    return value


def of_value(value: object) -> Hashable:
    """Equal for values that are made alike: of equal arrays, and of the same code."""
    if type(value) in _PLAIN:  # most are
        return value
    if isinstance(value, jax.core.Tracer):
        return object()  # unlike everything
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        array = np.asarray(value)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()
        return (array.shape, str(array.dtype), digest)
    if isinstance(value, Jaxpr):
        return Structure().of(value)
    if isinstance(value, JaxprEqn):
        return None  # told apart by its jaxpr and its site
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [of_value(getattr(value, f.name)) for f in dataclasses.fields(value)]
        return (type(value), *parts)
    if isinstance(value, types.FunctionType):
        cells = tuple(of_value(cell.cell_contents) for cell in value.__closure__ or ())
        return (value.__code__, cells, of_value(value.__defaults__))
    if isinstance(value, Mapping):
        return tuple((k, of_value(value[k])) for k in sorted(value, key=str))
    if isinstance(value, tuple | list):
        return (type(value), *map(of_value, value))
    return _hashable(value)
