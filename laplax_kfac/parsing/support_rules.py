"""Supports of the outputs of equations without a body: see `supports`."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Bool

from laplax_kfac import jaxprs
from laplax_kfac.parsing.index_rules import INDEX_RULES

Support = Bool[np.ndarray, "..."]
"""Which entries of an array may differ from zero."""
Values = Sequence[Support]
"""The supports of an equation's operands."""

UNARY = frozenset(
    "neg abs sign sqrt cbrt square sin tan tanh sinh asin atan asinh atanh expm1 log1p erf erf_inv "
    "floor ceil round real imag conj stop_gradient integer_pow reduce_precision".split()
)
"""Elementwise functions that are zero at zero (powers: positive ones)."""
UNION = frozenset("add add_any sub max min or xor select_n clamp".split())
"""Elementwise functions that are zero where all operands are."""
MULTILINEAR = frozenset(
    "dot_general conv_general_dilated reduce_sum cumsum reduce_window_sum pad".split()
)
"""Sums of products: of zeros and ones they are zero where every term is."""
HOMOGENEOUS = frozenset("triangular_solve fft sort select_and_scatter_add reduce_max".split())
"""Functions that are zero if all operands are, or the one that they are linear in."""
LINEAR_IN = {"triangular_solve": 1, "select_and_scatter_add": 0}


def of_plain(eqn: JaxprEqn, values: Values) -> list[Support] | None:
    """The supports of an equation's outputs; None if nothing is known of it."""
    name = eqn.primitive.name
    if name in INDEX_RULES:
        return [np.asarray(x) for x in INDEX_RULES[name](eqn, values)]
    if name in RULES:
        return RULES[name](eqn, values)
    if name in HOMOGENEOUS:
        linear = LINEAR_IN.get(name)
        read = values if linear is None else [values[linear]]
        some = np.asarray(any(v.any() for v in read))
        return [np.broadcast_to(some, jaxprs.shape(v)) for v in eqn.outvars]
    one = multilinear(eqn, values) if name in MULTILINEAR else elementwise(eqn, values)
    return None if one is None else [one]


def elementwise(eqn: JaxprEqn, values: Values) -> Support | None:
    """The support of the output of a sum, a product, or an elementwise function."""
    name, shape = eqn.primitive.name, jaxprs.shape(eqn.outvars[0])
    if name in ("mul", "and"):
        return np.broadcast_to(np.logical_and(*values), shape)
    power = eqn.params.get("y", 1) if name == "integer_pow" else 1
    if name in ("div", "rem") or (name in UNARY and power > 0):
        return np.broadcast_to(values[0], shape)
    if name not in UNION:
        return None
    terms = [np.broadcast_to(v, shape) for v in (values[1:] if name == "select_n" else values)]
    return np.asarray(np.logical_or.reduce(terms))


def multilinear(eqn: JaxprEqn, values: Values) -> Support | None:
    """A sum of products, of ones in the place of numbers that may differ from zero."""
    if not all(map(jaxprs.is_inexact, eqn.invars)):
        return None
    with jax.ensure_compile_time_eval():
        pairs = zip(values, eqn.invars, strict=True)
        ones = [jnp.asarray(value, jaxprs.spec(atom).dtype) for value, atom in pairs]
        return np.asarray(eqn.primitive.bind(*ones, **eqn.params) != 0)


def spread(support: Support, whole: Sequence[bool]) -> Support:
    """Entries that may come to lie anywhere along all axes but those that are taken whole."""
    moved = tuple(axis for axis, kept in enumerate(whole) if not kept)
    return np.asarray(support.any(axis=moved, keepdims=True))


def sliced(eqn: JaxprEqn, values: Values) -> list[Support]:
    """``dynamic_slice``: along a part of an axis, any of its entries."""
    whole, shape = values[0], jaxprs.shape(eqn.outvars[0])
    same = [a == b for a, b in zip(whole.shape, shape, strict=True)]
    return [np.broadcast_to(spread(whole, same), shape)]


def updated(_: JaxprEqn, values: Values) -> list[Support]:
    """``dynamic_update_slice``: what was there, and what is written there."""
    whole, part = values[:2]
    same = [a == b for a, b in zip(whole.shape, part.shape, strict=True)]
    return [np.asarray(whole | spread(part, same))]


def scattered(eqn: JaxprEqn, values: Values) -> list[Support]:
    """``scatter`` and ``scatter-add``: what was there, and what is written there."""
    whole, _, updates = values
    numbers = eqn.params["dimension_numbers"]
    kept = set(numbers.update_window_dims)
    window = np.asarray(updates.any(axis=tuple(a for a in range(updates.ndim) if a not in kept)))
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    axes = [a for a in range(whole.ndim) if a not in inserted]
    same = [whole.shape[a] == n for a, n in zip(axes, window.shape, strict=True)]
    return [whole | np.expand_dims(spread(window, same), tuple(sorted(inserted)))]


def gathered(eqn: JaxprEqn, values: Values) -> list[Support]:
    """``gather``: along axes that are not taken whole, any of their entries."""
    whole, out = values[0], jaxprs.shape(eqn.outvars[0])
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    part = spread(whole, [a == b for a, b in zip(whole.shape, sizes, strict=True)])
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    part = part[tuple(0 if axis in dropped else slice(None) for axis in range(whole.ndim))]
    others = tuple(axis for axis in range(len(out)) if axis not in numbers.offset_dims)
    return [np.broadcast_to(np.expand_dims(part, others), out)]


def solved(eqn: JaxprEqn, values: Values) -> list[Support]:
    """``linear_solve``: zero if the right-hand sides are."""
    sides = values[-len(eqn.outvars) :]
    zero = not any(side.any() for side in sides)
    return [np.broadcast_to(np.asarray(not zero), jaxprs.shape(v)) for v in eqn.outvars]


RULES: dict[str, Callable[[JaxprEqn, Values], list[Support]]] = {
    "dynamic_slice": sliced,
    "dynamic_update_slice": updated,
    "scatter": scattered,
    "scatter-add": scattered,
    "gather": gathered,
    "custom_linear_solve": solved,
    "linear_solve": solved,
}
