"""The registry, and the patterns of JAX's own primitives; see the package for the contract."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Int, Shaped

from laplax_kfac import jaxprs
from laplax_kfac.arguments import no_type_check
from laplax_kfac.gram import Symmetric
from laplax_kfac.patterns import correlation
from laplax_kfac.patterns import patches as windows

_HIGHEST = lax.Precision.HIGHEST
_LEAST_WORK = 2**17
"""Multiply-adds that windows' products take an image, from which more is won than compiled."""

Moments = Callable[[tuple[Any, ...], Float[Array, " N"]], tuple[Symmetric, Array]]
"""(Other operands with examples in front, their weights) -> see `Pattern.moments`."""


@dataclass(frozen=True)
class Pattern:
    """How one primitive uses a weight; see the module's docstring for the contract.

    Attributes:
        name: What a report calls layers of this pattern, e.g. ``"dense"``.
        operands: Equation -> positions of the operands that may be the weight; empty when the
            equation is not of this pattern.
        weight: (equation, operand, w) -> w as ``(stack, in, out)``; rearranges entries only.
        inputs: (equation, operand, other operands) -> layer inputs ``(positions, stack, in)``.
        outputs: (equation, operand, y) -> y as ``(positions, stack, out)``; rearranges only.
        active: (equation, operand, other operands) -> which outputs use which matrix of the stack,
            1 or 0 of shape ``(positions, stack)``; only where not all do. The identity then holds
            for those, and inputs of the others are zero.
        indexed: Whether an input picks one row of the weight. ``inputs`` then returns row numbers
            ``(positions, stack, 1)``, -1 for none; they stand for one-hot rows.
        moments: (equation, operand) -> a function of the other operands of several examples,
            stacked in front, and of the examples' weights. It gives the weighted sums of
            ``a a^T``, ``(stack, in, in)``, and of ``a``, ``(stack, in)``, over all examples and
            positions, in less time than it takes from ``inputs``. None where there is no such way.
    """

    name: str
    operands: Callable[[JaxprEqn], tuple[int, ...]]
    weight: Callable[[JaxprEqn, int, Any], Any]
    inputs: Callable[[JaxprEqn, int, tuple[Any, ...]], Shaped[Array, "positions stack in"]]
    outputs: Callable[[JaxprEqn, int, Any], Any]
    active: Callable[[JaxprEqn, int, tuple[Any, ...]], Shaped[Array, "positions stack"]] | None = (
        None
    )
    indexed: bool = False
    moments: Callable[[JaxprEqn, int], Moments | None] | None = None


_REGISTRY: dict[str, Pattern] = {}


@no_type_check
def register(primitive: str, pattern: Pattern) -> None:
    """Register the pattern for equations of a primitive; a later registration wins.

    Args:
        primitive: The primitive's name as printed in jaxprs, e.g. ``"dot_general"``.
        pattern: How that primitive uses its weight.

    Raises:
        TypeError: If ``primitive`` is not a string or ``pattern`` not a `Pattern`.
    """
    if not isinstance(primitive, str):
        msg = (
            f"`primitive` must be the primitive's name as a string, "
            f"got {type(primitive).__name__}; pass `primitive.name`."
        )
        raise TypeError(msg)
    if not isinstance(pattern, Pattern):
        msg = f"`pattern` must be a laplax_kfac.patterns.Pattern, got {type(pattern).__name__}."
        raise TypeError(msg)
    _REGISTRY[primitive] = pattern


def find(eqn: JaxprEqn) -> Pattern | None:
    """The pattern registered for an equation's primitive, if there is one."""
    return _REGISTRY.get(eqn.primitive.name)


def check(function: Callable[..., Array], operand: int, *operands: Array) -> float:
    """Largest violation of the contract on an example, to test a newly registered pattern.

    Args:
        function: A function whose jaxpr is one equation of the pattern's primitive.
        operand: Which of ``operands`` is the weight.
        *operands: Example values of the operands.

    Returns:
        ``max |outputs - inputs @ weight|``, which is zero up to rounding.

    Raises:
        ValueError: If the function is not one equation of a registered primitive.
    """
    eqns = jax.make_jaxpr(function)(*operands).eqns
    pattern = find(eqns[0]) if len(eqns) == 1 else None
    if pattern is None or operand not in pattern.operands(eqns[0]):
        names = [e.primitive.name for e in eqns]
        msg = (
            f"`function` must be one equation of a registered primitive with operand {operand} as "
            f"its weight, found the equations {names}; registered are {sorted(_REGISTRY)}."
        )
        raise ValueError(msg)
    others = tuple(o for i, o in enumerate(operands) if i != operand)
    inputs = pattern.inputs(eqns[0], operand, others)
    weight = pattern.weight(eqns[0], operand, operands[operand])
    if pattern.indexed:
        inputs = one_hot(inputs, weight.shape[1])
    outputs = pattern.outputs(eqns[0], operand, function(*operands))
    if pattern.active is not None:
        outputs = outputs * pattern.active(eqns[0], operand, others)[..., None]
    return float(jnp.max(jnp.abs(outputs - jnp.einsum("tki,kio->tko", inputs, weight))))


def one_hot(rows: Int[Array, "*n 1"], size: int, dtype: Any = None) -> Shaped[Array, "*n rows"]:
    """The inputs that row numbers of an indexed pattern stand for; -1 gives zeros."""
    return jax.nn.one_hot(rows[..., 0], size, dtype=dtype or jnp.result_type(float))


def bias(places: Int[np.ndarray, "positions features"], axes: int) -> Pattern:
    """The pattern of a parameter added to something: one input, the constant 1.

    Args:
        places: Where in the raveled sum every feature is added, for each position.
        axes: Along how many axes of the sum the parameter varies.
    """

    def inputs(_: JaxprEqn, __: int, others: tuple[Any, ...]) -> Any:
        dtype = jnp.result_type(*others)
        return jnp.ones((places.shape[0], 1, 1), dtype)

    return Pattern(
        name="bias" if axes <= 1 else "shift",
        operands=lambda _: (),
        weight=lambda _, __, w: w[None, None],
        inputs=inputs,
        outputs=lambda _, __, y: y.reshape(-1)[places][:, None, :],
    )


# -- dense: dot_general with any dimension numbers, the weight on either side ------------------


@dataclass(frozen=True)
class _DotAxes:
    """Axes of a dot_general's weight ``w`` and other operand ``x``."""

    w_batch: tuple[int, ...]
    w_in: tuple[int, ...]
    w_out: tuple[int, ...]
    x_batch: tuple[int, ...]
    x_in: tuple[int, ...]
    x_positions: tuple[int, ...]


def _dot_axes(eqn: JaxprEqn, operand: int) -> _DotAxes:
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - operand

    def free(side: int) -> tuple[int, ...]:
        taken = (*contract[side], *batch[side])
        return tuple(d for d in range(jaxprs.ndim(eqn.invars[side])) if d not in taken)

    return _DotAxes(
        tuple(batch[operand]), tuple(contract[operand]), free(operand),
        tuple(batch[other]), tuple(contract[other]), free(other),
    )  # fmt: skip


def _size(array: Any, axes: tuple[int, ...]) -> int:
    return math.prod(array.shape[a] for a in axes)


def _dense_weight(eqn: JaxprEqn, operand: int, w: Any) -> Any:
    axes = _dot_axes(eqn, operand)
    shape = (_size(w, axes.w_batch), _size(w, axes.w_in), _size(w, axes.w_out))
    return w.transpose(axes.w_batch + axes.w_in + axes.w_out).reshape(shape)


def _dense_inputs(eqn: JaxprEqn, operand: int, others: tuple[Any, ...]) -> Any:
    axes, (x,) = _dot_axes(eqn, operand), others
    shape = (_size(x, axes.x_positions), _size(x, axes.x_batch), _size(x, axes.x_in))
    return x.transpose(axes.x_positions + axes.x_batch + axes.x_in).reshape(shape)


def _dense_outputs(eqn: JaxprEqn, operand: int, y: Any) -> Any:
    # dot_general lays its output out as (batch, free axes of lhs, free axes of rhs).
    axes = _dot_axes(eqn, operand)
    n_batch, n_pos, n_out = len(axes.w_batch), len(axes.x_positions), len(axes.w_out)
    batch = tuple(range(n_batch))
    first = tuple(range(n_batch, n_batch + (n_out if operand == 0 else n_pos)))
    last = tuple(range(n_batch + len(first), y.ndim))
    positions, out = (last, first) if operand == 0 else (first, last)
    shape = (_size(y, positions), _size(y, batch), _size(y, out))
    return y.transpose(positions + batch + out).reshape(shape)


DENSE = Pattern("dense", lambda _: (0, 1), _dense_weight, _dense_inputs, _dense_outputs)


# -- conv: conv_general_dilated of any rank, layout, stride, padding, dilation, groups ---------


def _conv_operands(eqn: JaxprEqn) -> tuple[int, ...]:
    # A convolution with batch groups sums over examples: it arises from derivatives, not layers.
    if eqn.params["batch_group_count"] != 1:
        return ()
    return (0, 1) if eqn.params["feature_group_count"] == 1 else (1,)


def _conv_weight(eqn: JaxprEqn, operand: int, w: Any) -> Any:
    groups = eqn.params["feature_group_count"]
    if operand == 0:  # jnp.convolve exchanges its arguments: the weight is moved over the data
        w = w.transpose(eqn.params["dimension_numbers"].lhs_spec)  # (batch, in, *space)
        return w.reshape(1, w.shape[0], math.prod(w.shape[1:])).transpose(0, 2, 1)
    out, features, *kernel = eqn.params["dimension_numbers"].rhs_spec
    w = w.transpose(out, *kernel, features)  # (out, *kernel, in / groups)
    return w.reshape(groups, w.shape[0] // groups, math.prod(w.shape[1:])).transpose(0, 2, 1)


def _conv_inputs(eqn: JaxprEqn, operand: int, others: tuple[Any, ...]) -> Any:
    (x,), groups = others, eqn.params["feature_group_count"]
    if operand == 0:
        return _responses(eqn, x)
    x = _channels_last(eqn, x)
    # Groups in front of windows: then each group has its own.
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 1)
    patches = windows.windows(_axes(eqn), x, first=2)  # (batch, groups, *positions, in)
    patches = jnp.moveaxis(patches, 1, -2)
    return patches.reshape(math.prod(patches.shape[:-2]), *patches.shape[-2:])


def _channels_last(eqn: JaxprEqn, x: Any) -> Any:
    """Images as (batch, *space, channels)."""
    batch, features, *space = eqn.params["dimension_numbers"].lhs_spec
    return x.transpose(batch, *space, features)


def _axes(eqn: JaxprEqn) -> tuple[windows.Axis, ...]:
    """The windows that a convolution applies its kernel to."""
    params = eqn.params
    image, kernel = (
        [jaxprs.shape(atom)[d] for d in spec[2:]]
        for atom, spec in zip(eqn.invars, params["dimension_numbers"], strict=False)
    )
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    options = (params[name] for name in names)
    return tuple(windows.Axis(*axis) for axis in zip(image, kernel, *options, strict=True))


def _conv_moments(eqn: JaxprEqn, operand: int) -> Moments | None:
    axes = _axes(eqn)
    plain = operand == 1 and eqn.params["feature_group_count"] == 1
    if not plain or _work(eqn, axes) < _LEAST_WORK:
        return None
    if jax.default_backend() != "cpu" or not windows.has_cheap_moment(axes):
        return None

    def moments(others: tuple[Any, ...], weights: Any) -> tuple[Any, Any]:
        (x,) = others
        total = _conv_inputs(eqn, operand, (jnp.tensordot(weights, x, 1, precision=_HIGHEST),))
        images = jax.vmap(lambda x: _channels_last(eqn, x))(x)
        weights = jnp.repeat(weights, images.shape[1])
        images = images.reshape(-1, *images.shape[2:])
        cheaper = correlation.is_cheaper(axes, images.shape)
        second_moment = correlation.second_moment if cheaper else windows.second_moment
        second: Symmetric = second_moment(axes, images, weights)
        return jax.tree.map(lambda part: part[None], second), jnp.sum(total, axis=0)

    return moments


def _work(eqn: JaxprEqn, axes: Sequence[windows.Axis]) -> int:
    """Multiply-adds an image in the products of its windows with themselves."""
    spec = eqn.params["dimension_numbers"].rhs_spec
    entries = math.prod(jaxprs.shape(eqn.invars[1])[d] for d in spec[1:])
    return math.prod(axis.positions for axis in axes) * entries**2


def _responses(eqn: JaxprEqn, x: Any) -> Any:
    """Inputs of a weight on the left: what each of its entries alone would put out."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    features, *space = (jaxprs.shape(eqn.invars[0])[d] for d in numbers.lhs_spec[1:])
    entries = features * math.prod(space)
    units = jnp.eye(entries, dtype=x.dtype).reshape(entries, features, *space)
    names = ("lhs_dilation", "rhs_dilation", "window_strides", "padding")
    responses = lax.conv_general_dilated(
        units,
        x.transpose(numbers.rhs_spec),
        precision=lax.Precision.HIGHEST,
        **{name: params[name] for name in names},
    )  # (entries, out, *space)
    return responses.reshape(entries, -1).T[:, None, :]


def _conv_outputs(eqn: JaxprEqn, operand: int, y: Any) -> Any:
    y = y.transpose(eqn.params["dimension_numbers"].out_spec)
    if operand == 0:
        return y.reshape(y.shape[0], math.prod(y.shape[1:])).transpose(1, 0)[:, None, :]
    return _channels_last_by_group(y, eqn.params["feature_group_count"])


def _channels_last_by_group(x: Any, groups: int) -> Any:
    """(batch, channels, *space) -> (batch x space, groups, channels / groups)."""
    batch, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    x = x.reshape(batch, groups, channels // groups, space).transpose(0, 3, 1, 2)
    return x.reshape(batch * space, groups, channels // groups)


CONV = Pattern(
    "conv", _conv_operands, _conv_weight, _conv_inputs, _conv_outputs, moments=_conv_moments
)


# -- embedding: gather or dynamic_slice of whole rows, with indices that depend on data --------


@dataclass(frozen=True)
class _Lookup:
    """Axes of a table: stacked ones, those that the indices pick from, and the rows' own."""

    stack: tuple[int, ...]
    picked: tuple[int, ...]
    kept: tuple[int, ...]


def _lookup(eqn: JaxprEqn) -> _Lookup | None:
    """Read a lookup; None if it takes more than one and less than all entries of an axis."""
    shape, sizes = jaxprs.shape(eqn.invars[0]), eqn.params["slice_sizes"]
    numbers = eqn.params.get("dimension_numbers")
    stack = tuple(int(d) for d in numbers.operand_batching_dims) if numbers else ()
    axes = [d for d in range(len(shape)) if d not in stack]
    picked = tuple(d for d in axes if sizes[d] == 1 != shape[d])
    kept = tuple(d for d in axes if d not in picked)
    whole = all(sizes[d] == shape[d] for d in kept)
    return _Lookup(stack, picked, kept) if whole and picked else None


def _lookup_operands(eqn: JaxprEqn) -> tuple[int, ...]:
    return (0,) if _lookup(eqn) else ()


def _lookup_weight(eqn: JaxprEqn, _: int, w: Any) -> Any:
    axes = _lookup(eqn)
    assert axes is not None
    shape = (_size(w, axes.stack), _size(w, axes.picked), _size(w, axes.kept))
    return w.transpose(axes.stack + axes.picked + axes.kept).reshape(shape)


def _row_numbers(eqn: JaxprEqn, starts: list[Any]) -> Any:
    """Numbers of the picked rows from the start index of every axis of the table."""
    axes, shape = _lookup(eqn), jaxprs.shape(eqn.invars[0])
    assert axes is not None
    drops = "FILL" in str(eqn.params.get("mode"))  # else start indices are clamped
    rows, inside = jnp.zeros(()), jnp.ones((), bool)
    for axis in axes.picked:
        last = shape[axis] - 1
        inside = inside & (starts[axis] >= 0) & (starts[axis] <= last)
        rows = rows * shape[axis] + jnp.clip(starts[axis], 0, last)
    return jnp.where(inside | (not drops), rows, -1).astype(jnp.int32)


def _gather_batch(eqn: JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch axes of the indices: (positions, stack), the latter in the order of the table's."""
    numbers = eqn.params["dimension_numbers"]
    stack = tuple(int(d) for d in numbers.start_indices_batching_dims)
    batch = range(jaxprs.ndim(eqn.invars[1]) - 1)
    return tuple(d for d in batch if d not in stack), stack


def _gather_inputs(eqn: JaxprEqn, _: int, others: tuple[Any, ...]) -> Any:
    (indices,), (positions, stack) = others, _gather_batch(eqn)
    shape = (_size(indices, positions), _size(indices, stack), indices.shape[-1])
    indices = indices.transpose(*positions, *stack, indices.ndim - 1).reshape(shape)
    order = [int(d) for d in eqn.params["dimension_numbers"].start_index_map]
    starts = [
        indices[..., order.index(d)] if d in order else jnp.zeros(shape[:2], indices.dtype)
        for d in range(jaxprs.ndim(eqn.invars[0]))
    ]
    return _row_numbers(eqn, starts)[..., None]


def _gather_outputs(eqn: JaxprEqn, _: int, y: Any) -> Any:
    offset = tuple(int(d) for d in eqn.params["dimension_numbers"].offset_dims)
    batch = tuple(d for d in range(y.ndim) if d not in offset)
    positions, stack = (tuple(batch[d] for d in part) for part in _gather_batch(eqn))
    shape = (_size(y, positions), _size(y, stack), _size(y, offset))
    return y.transpose(positions + stack + offset).reshape(shape)


def _slice_inputs(eqn: JaxprEqn, _: int, others: tuple[Any, ...]) -> Any:
    return _row_numbers(eqn, list(others)).reshape(1, 1, 1)


def _slice_outputs(_: JaxprEqn, __: int, y: Any) -> Any:
    return y.reshape(1, 1, math.prod(y.shape))


GATHER = Pattern(
    "embedding", _lookup_operands, _lookup_weight, _gather_inputs, _gather_outputs, indexed=True
)
DYNAMIC_SLICE = Pattern(
    "embedding", _lookup_operands, _lookup_weight, _slice_inputs, _slice_outputs, indexed=True
)


# -- experts: ragged_dot of sorted tokens, each with the matrix of its group -------------------


def _ragged_operands(eqn: JaxprEqn) -> tuple[int, ...]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = (
        tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,))
        and not any(numbers.dot_dimension_numbers[1])
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    return (1,) if plain else ()


def _groups_of_tokens(eqn: JaxprEqn, _: int, others: tuple[Any, ...]) -> Any:
    ends = jnp.cumsum(others[1])
    token = jnp.arange(jaxprs.shape(eqn.invars[0])[0])[:, None]
    return ((token < ends) & (token >= ends - others[1])).astype(others[0].dtype)


def _ragged_inputs(eqn: JaxprEqn, operand: int, others: tuple[Any, ...]) -> Any:
    return others[0][:, None, :] * _groups_of_tokens(eqn, operand, others)[..., None]


def _ragged_outputs(eqn: JaxprEqn, _: int, y: Any) -> Any:
    return y[:, None, :].repeat(jaxprs.shape(eqn.invars[1])[0], axis=1)


RAGGED = Pattern(
    "dense",
    _ragged_operands,
    weight=lambda _, __, w: w,
    inputs=_ragged_inputs,
    outputs=_ragged_outputs,
    active=_groups_of_tokens,
)

register("ragged_dot_general", RAGGED)
register("dot_general", DENSE)
register("conv_general_dilated", CONV)
register("gather", GATHER)
register("dynamic_slice", DYNAMIC_SLICE)
