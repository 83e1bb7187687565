"""Where the examples of a batch lie in an array, and where an equation takes them.

They lie along one axis, perhaps with other things in front of them or behind, as a reshape leaves
them: its index is ``(o * EXAMPLES + n) * inner + i`` for example n.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

from jax.extend.core import JaxprEqn

from laplax_kfac import jaxprs

EXAMPLES = 3
"""How many a model is traced for; few sizes in a model are multiples of it by accident."""

Operands = Sequence["Along | None"]


@dataclass(frozen=True)
class Along:
    """The axis of an array that examples lie along, and what else is on it."""

    axis: int
    outer: int = 1
    inner: int = 1

    def moved(self, axis: SupportsIndex) -> "Along":
        """Along another axis."""
        return replace(self, axis=operator.index(axis))


class Mixed(Exception):
    """An equation mixes examples."""


class Unknown(Exception):
    """An equation may mix examples."""


def joined(name: str, *values: Along | None) -> Along | None:
    """Where the examples of arrays of one shape lie, which are combined entry by entry."""
    found = {value for value in values if value is not None}
    if len(found) > 1:
        msg = f"{name} of two arrays with examples along different axes"
        raise Mixed(msg)
    return found.pop() if found else None


def elementwise(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Entry by entry."""
    return joined(f"`{eqn.primitive.name}`", *operands)


def over(*names: str) -> Callable[[JaxprEqn, Operands], Along | None]:
    """Something along axes that a parameter names; ``reduce_sum`` and the like drop them."""

    def rule(eqn: JaxprEqn, operands: Operands) -> Along | None:
        name = eqn.primitive.name
        given = next(eqn.params[key] for key in names if key in eqn.params)
        axes = (given,) if isinstance(given, int) else tuple(given)
        value = joined(f"`{name}`", *operands)
        assert value is not None
        if value.axis in axes:
            msg = f"`{name}` along the batch axis"
            raise Mixed(msg)
        drops = name.startswith(("reduce", "arg", "squeeze"))
        return value.moved(value.axis - drops * sum(axis < value.axis for axis in axes))

    return rule


def last(count: int) -> Callable[[JaxprEqn, Operands], Along | None]:
    """Something along the last axes: linear algebra, Fourier transforms, the largest entries."""

    def rule(eqn: JaxprEqn, operands: Operands) -> Along | None:
        value = joined(f"`{eqn.primitive.name}`", *operands)
        behind = len(eqn.params["fft_lengths"]) if eqn.primitive.name == "fft" else count
        if value and value.axis >= jaxprs.ndim(eqn.invars[0]) - behind:
            msg = f"`{eqn.primitive.name}` along the batch axis"
            raise Mixed(msg)
        return value

    return rule


def reshape(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """The axis with the examples among what is in front of them and behind."""
    (value, *_), old, new = operands, jaxprs.shape(eqn.invars[0]), jaxprs.shape(eqn.outvars[0])
    assert value is not None
    before = math.prod(old[: value.axis]) * value.outer
    behind = value.inner * math.prod(old[value.axis + 1 :])
    for axis, size in enumerate(new):
        front, back = math.prod(new[:axis]), math.prod(new[axis + 1 :])
        if before % front or behind % back or size % EXAMPLES:
            continue
        found = Along(axis, before // front, behind // back)
        if found.outer * EXAMPLES * found.inner == size:
            return found
    msg = "`reshape` of the batch axis"
    raise Unknown(msg)


def transpose(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Another order of axes."""
    (value,) = operands
    return value and value.moved(eqn.params["permutation"].index(value.axis))


def broadcast_in_dim(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """More axes."""
    value = operands[0]
    return value and value.moved(eqn.params["broadcast_dimensions"][value.axis])


def concatenate(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """One after another: along the batch axis, too, if all hold examples alike."""
    values = list(operands)
    if any(value and value.axis == eqn.params["dimension"] for value in values):
        if None in values or len({replace(v, outer=1) for v in values if v}) > 1:
            msg = "`concatenate` along the batch axis"
            raise Unknown(msg)
        first = values[0]
        return first and replace(first, outer=sum(v.outer for v in values if v))
    return joined("`concatenate`", *values)


def sliced(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """A part of an axis."""
    value, params = operands[0], eqn.params
    old, new = jaxprs.shape(eqn.invars[0]), jaxprs.shape(eqn.outvars[0])
    if value is None or any(operands[1:]):
        msg = f"`{eqn.primitive.name}` at places that depend on the example"
        raise Unknown(msg)
    if old[value.axis] == new[value.axis]:
        return value
    each = EXAMPLES * value.inner
    start = params["start_indices"][value.axis] if "start_indices" in params else None
    if start is not None and start % each == 0 and new[value.axis] % each == 0:
        if params["strides"] is None or params["strides"][value.axis] == 1:
            return replace(value, outer=new[value.axis] // each)
    msg = f"`{eqn.primitive.name}` of the batch axis"
    raise Unknown(msg)


def split(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Parts of an axis."""
    (value,) = operands
    if value and value.axis == eqn.params["axis"]:
        msg = "`split` of the batch axis"
        raise Unknown(msg)
    return value


def pad(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """More entries around those there are."""
    value = operands[0]
    if value is None or operands[1] or eqn.params["padding_config"][value.axis] != (0, 0, 0):
        msg = "`pad` of the batch axis"
        raise Unknown(msg)
    return value


def dot_general(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Products: a sum over contracted axes, and every pair of what is along free ones."""
    (contracted, batched), values = eqn.params["dimension_numbers"], list(operands)
    found = []
    for side, value in enumerate(values[:2]):
        if value is None:
            continue
        if value.axis in contracted[side]:
            msg = "`dot_general`, a sum over the batch axis"
            raise Mixed(msg)
        if value.axis in batched[side]:
            found.append(value.moved(batched[side].index(value.axis)))
            continue
        free = [
            k for k in range(jaxprs.ndim(eqn.invars[side]))
            if k not in (*contracted[side], *batched[side])
        ]  # fmt: skip
        others = jaxprs.ndim(eqn.invars[0]) - len(contracted[0]) if side else len(batched[0])
        found.append(value.moved(others + free.index(value.axis)))
    return joined("`dot_general`", *found)


def convolution(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Convolutions of examples with a kernel that they share."""
    (value, kernel), numbers = operands, eqn.params["dimension_numbers"]
    if value is None or kernel or eqn.params["batch_group_count"] != 1:
        msg = "`conv_general_dilated` with kernels that depend on the example"
        raise Unknown(msg)
    if value.axis != numbers.lhs_spec[0]:
        msg = "`conv_general_dilated` along the batch axis"
        raise Mixed(msg)
    return value.moved(numbers.out_spec[0])


def windows(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Pooling."""
    value = joined(f"`{eqn.primitive.name}`", *operands)
    if value and eqn.params["window_dimensions"][value.axis] != 1:
        msg = f"`{eqn.primitive.name}` along the batch axis"
        raise Mixed(msg)
    return value


def gather(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """Entries by number: of a table by numbers of the examples, or of each example alike."""
    value, indices = operands
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rest = [k for k in range(jaxprs.ndim(eqn.outvars[0])) if k not in numbers.offset_dims]
    found = []
    if indices is not None:
        found.append(indices.moved(rest[indices.axis]))
    if value is not None:
        batching = list(numbers.operand_batching_dims)
        kept = [
            k for k in range(jaxprs.ndim(eqn.invars[0]))
            if k not in (*numbers.collapsed_slice_dims, *batching)
        ]  # fmt: skip
        if value.axis in batching:
            axis = numbers.start_indices_batching_dims[batching.index(value.axis)]
            found.append(value.moved(rest[axis]))
        elif value.axis in kept and sizes[value.axis] == jaxprs.shape(eqn.invars[0])[value.axis]:
            found.append(value.moved(numbers.offset_dims[kept.index(value.axis)]))
        else:
            msg = "`gather`, which picks examples"
            raise Unknown(msg)
    return joined("`gather`", *found)


def unknown(eqn: JaxprEqn, operands: Operands) -> Along | None:
    """What has no rule."""
    del operands
    msg = f"`{eqn.primitive.name}`"
    raise Unknown(msg)


ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
ge gt igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne
neg nextafter not or population_count pow real reduce_precision regularized_incomplete_beta rem
round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
stop_gradient sub tan tanh xor complex mul_add optimization_barrier name sharding_constraint
""".split()
RULES: dict[str, Callable[[JaxprEqn, Operands], Along | None]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **{
        name: over("axes", "axis", "dimension", "dimensions")
        for name in (
            "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_max "
            "reduce_min reduce_or reduce_prod reduce_sum reduce_xor rev sort squeeze"
        ).split()
    },
    **dict.fromkeys(["eigh", "svd", "lu", "qr", "cholesky", "triangular_solve", "fft"], last(2)),
    "top_k": last(1),
    **{f"reduce_window{kind}": windows for kind in ("", "_sum", "_max", "_min")},
    "reshape": reshape, "transpose": transpose, "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate, "slice": sliced, "dynamic_slice": sliced, "split": split,
    "pad": pad, "dot_general": dot_general, "conv_general_dilated": convolution, "gather": gather,
}  # fmt: skip


def rule_of(name: str) -> Callable[[JaxprEqn, Operands], Along | None]:
    """Where a primitive takes examples."""
    return RULES.get(name, unknown)
