"""Supports: the entries of an array that may differ from zero, whatever the inputs of a jaxpr are.

The jaxpr is followed on truth values in the place of numbers: what only moves entries moves them, a
product needs both factors, a sum one of its terms. A loop repeats until its carries gain nothing.
Where nothing is known of an equation, all of its outputs may differ from zero; so an entry that is
found to be zero is zero, up to 0 times infinity. The derivative of a rule that somebody wrote is
read with it: operands whose cotangent is zero play no part, in however deep a solver.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike
from jaxtyping import Bool

from laplax_kfac import jaxprs
from laplax_kfac.jaxprs import Atom
from laplax_kfac.parsing.index_rules import INDEX_RULES

Support = Bool[np.ndarray, "..."]
LARGE = 2**23
"""Entries of an array beyond which only whether all of them are zero is kept."""

UNARY = frozenset(
    "neg abs sign sqrt cbrt square sin tan tanh sinh asin atan asinh atanh expm1 log1p erf erf_inv "
    "floor ceil round real imag conj stop_gradient integer_pow reduce_precision".split()
)
"""Elementwise functions that are zero at zero (powers: `vanishes`)."""
UNION = frozenset("add add_any sub max min or xor select_n clamp".split())
"""Elementwise functions that are zero where all operands are."""
MULTILINEAR = frozenset(
    "dot_general conv_general_dilated reduce_sum cumsum reduce_window_sum pad".split()
)
"""Sums of products: of zeros and ones they are zero where every term is."""
HOMOGENEOUS = frozenset("triangular_solve fft sort select_and_scatter_add reduce_max".split())
"""Functions that are zero if all operands are, or the one that they are linear in."""
LINEAR_IN = {"triangular_solve": 1, "select_and_scatter_add": 0}


def everywhere(atom: Atom) -> Support:
    """All entries."""
    return np.broadcast_to(np.True_, jaxprs.shape(atom))


def nowhere(atom: Atom) -> Support:
    """No entry."""
    return np.broadcast_to(np.False_, jaxprs.shape(atom))


def of_constant(value: ArrayLike) -> Support:
    """The entries of an array that differ from zero; all while it is being traced."""
    dtype = jnp.result_type(value)
    if isinstance(value, jax.core.Tracer) or jnp.issubdtype(dtype, jax.dtypes.extended):
        return np.broadcast_to(np.True_, np.shape(value))
    return np.asarray(np.asarray(value) != 0)


def supports(jaxpr: Jaxpr, inputs: Sequence[Support]) -> list[Support]:
    """The supports of a jaxpr's outputs.

    Args:
        jaxpr: A jaxpr without constants.
        inputs: The supports of its inputs.
    """
    env: dict[Var, Support] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Atom) -> Support:
        return of_constant(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        found = Supports(eqn, [read(a) for a in eqn.invars]).outputs()
        for var, support in zip(eqn.outvars, found, strict=True):
            large = support.size > LARGE
            env[var] = np.broadcast_to(support.any(), support.shape) if large else support
    return [read(a) for a in jaxpr.outvars]


@dataclass(frozen=True)
class Supports:
    """An equation, and the supports of its operands."""

    eqn: JaxprEqn
    values: list[Support]

    def outputs(self) -> list[Support]:
        """The supports of its outputs."""
        eqn, name = self.eqn, self.eqn.primitive.name
        everything = [
            everywhere(v) if hasattr(v.aval, "shape") else np.ones((), bool) for v in eqn.outvars
        ]
        if all(value.all() for value in self.values) or eqn.effects:
            return everything
        if name in INDEX_RULES:
            return [np.asarray(x) for x in INDEX_RULES[name](eqn, self.values)]
        rule = RULES.get(name)
        if rule is not None:
            return rule(self)
        forward = jaxprs.called_jaxpr(eqn) or jaxprs.ruled_jaxpr(eqn)
        if forward is not None:
            return self.inside(forward, self.values)
        if name in HOMOGENEOUS:
            linear = LINEAR_IN.get(name)
            read = self.values if linear is None else [self.values[linear]]
            return everything if any(v.any() for v in read) else [nowhere(v) for v in eqn.outvars]
        one = self.elementwise(name)
        return everything if one is None else [one]

    def elementwise(self, name: str) -> Support | None:
        """The support of the output of a sum, a product, or an elementwise function."""
        shape, values = jaxprs.shape(self.eqn.outvars[0]), self.values
        if name == "mul" or name == "and":
            return np.broadcast_to(np.logical_and(*values), shape)
        if name == "div" or name == "rem" or (name in UNARY and self.vanishes):
            return np.broadcast_to(values[0], shape)
        if name in UNION:
            read = values[1:] if name == "select_n" else values
            support = read[0]
            for value in read[1:]:
                support = support | value
            return np.broadcast_to(support, shape)
        return self.multilinear() if name in MULTILINEAR else None

    @property
    def vanishes(self) -> bool:
        """Whether a power is zero at zero."""
        return bool(self.eqn.params.get("y", 1) > 0)

    def multilinear(self) -> Support | None:
        """A sum of products, of ones in the place of numbers that may differ from zero."""
        if not all(map(jaxprs.is_inexact, self.eqn.invars)):
            return None
        with jax.ensure_compile_time_eval():
            ones = [
                jnp.asarray(value, jaxprs.spec(atom).dtype)
                for value, atom in zip(self.values, self.eqn.invars, strict=True)
            ]
            return np.asarray(self.eqn.primitive.bind(*ones, **self.eqn.params) != 0)

    def inside(self, body: tuple[Jaxpr, jaxprs.Consts], values: Sequence[Support]) -> list[Support]:
        """The supports of a sub-jaxpr's outputs."""
        jaxpr, consts = body
        return supports(jaxprs.with_consts(jaxpr), [*map(of_constant, consts), *values])

    def repeated(
        self,
        body: tuple[Jaxpr, jaxprs.Consts],
        fixed: Sequence[Support],
        carry: Sequence[Support],
        scanned: Sequence[Support] = (),
    ) -> list[Support]:
        """The supports of a loop's outputs, in any iteration."""
        while True:
            outputs = self.inside(body, [*fixed, *carry, *scanned])
            grown = [np.asarray(a | b) for a, b in zip(carry, outputs, strict=False)]
            if all((a == b).all() for a, b in zip(carry, grown, strict=True)):
                return [*grown, *outputs[len(grown) :]]
            carry = grown


def spread(support: Support, whole: Sequence[bool]) -> Support:
    """Entries that may come to lie anywhere along all axes but those that are taken whole."""
    moved = tuple(axis for axis, kept in enumerate(whole) if not kept)
    return np.asarray(support.any(axis=moved, keepdims=True))


def sliced(step: Supports) -> list[Support]:
    """``dynamic_slice``: along a part of an axis, any of its entries."""
    whole, shape = step.values[0], jaxprs.shape(step.eqn.outvars[0])
    same = [a == b for a, b in zip(whole.shape, shape, strict=True)]
    return [np.broadcast_to(spread(whole, same), shape)]


def updated(step: Supports) -> list[Support]:
    """``dynamic_update_slice``: what was there, and what is written there."""
    whole, part = step.values[:2]
    same = [a == b for a, b in zip(whole.shape, part.shape, strict=True)]
    return [np.asarray(whole | spread(part, same))]


def scattered(step: Supports) -> list[Support]:
    """``scatter`` and ``scatter-add``: what was there, and what is written there."""
    whole, _, updates = step.values
    numbers = step.eqn.params["dimension_numbers"]
    kept = set(numbers.update_window_dims)
    window = np.asarray(updates.any(axis=tuple(a for a in range(updates.ndim) if a not in kept)))
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    axes = [a for a in range(whole.ndim) if a not in inserted]
    same = [whole.shape[a] == n for a, n in zip(axes, window.shape, strict=True)]
    return [whole | np.expand_dims(spread(window, same), tuple(sorted(inserted)))]


def gathered(step: Supports) -> list[Support]:
    """``gather``: along axes that are not taken whole, any of their entries."""
    whole, out = step.values[0], jaxprs.shape(step.eqn.outvars[0])
    numbers, sizes = step.eqn.params["dimension_numbers"], step.eqn.params["slice_sizes"]
    part = spread(whole, [a == b for a, b in zip(whole.shape, sizes, strict=True)])
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    part = part[tuple(0 if axis in dropped else slice(None) for axis in range(whole.ndim))]
    others = tuple(axis for axis in range(len(out)) if axis not in numbers.offset_dims)
    return [np.broadcast_to(np.expand_dims(part, others), out)]


def scan(step: Supports) -> list[Support]:
    """Carries gain what any iteration adds to them; of scanned arrays all iterations are one."""
    parts = jaxprs.scan_parts(step.eqn)
    first = parts.num_consts + parts.num_carry
    outputs = step.repeated(
        (parts.body, parts.consts),
        step.values[: parts.num_consts],
        step.values[parts.num_consts : first],
        [np.asarray(value.any(axis=0)) for value in step.values[first:]],
    )
    stacked = zip(outputs[parts.num_carry :], step.eqn.outvars[parts.num_carry :], strict=True)
    ys = [np.broadcast_to(y, jaxprs.shape(v)) for y, v in stacked]
    return [*outputs[: parts.num_carry], *ys]


def while_loop(step: Supports) -> list[Support]:
    """Carries gain what any iteration adds to them, however many there are."""
    params = step.eqn.params
    first = params["cond_nconsts"]
    fixed = step.values[first : first + params["body_nconsts"]]
    carry = step.values[first + params["body_nconsts"] :]
    return step.repeated(jaxprs.open_jaxpr(params["body_jaxpr"]), fixed, carry)


def cond(step: Supports) -> list[Support]:
    """What any branch puts out."""
    branches = [step.inside(b, step.values[1:]) for b in jaxprs.cond_branches(step.eqn)]
    return [np.asarray(np.logical_or.reduce(outputs)) for outputs in zip(*branches, strict=True)]


def solved(step: Supports) -> list[Support]:
    """``linear_solve``: zero if the right-hand sides are."""
    sides = step.values[-len(step.eqn.outvars) :]
    zero = not any(side.any() for side in sides)
    return [nowhere(v) if zero else everywhere(v) for v in step.eqn.outvars]


RULES: dict[str, Callable[[Supports], list[Support]]] = {
    "dynamic_slice": sliced,
    "dynamic_update_slice": updated,
    "scatter": scattered,
    "scatter-add": scattered,
    "gather": gathered,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "custom_linear_solve": solved,
    "linear_solve": solved,
}
