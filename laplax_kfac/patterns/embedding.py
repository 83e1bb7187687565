"""Embeddings: ``gather`` or ``dynamic_slice`` of whole rows of a table, at indices that data give.

The input of a lookup is the one-hot vector of a row. Inputs are kept as row numbers, -1 for none,
so that the input factor is diagonal: it counts how often every row is picked.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Int

from laplax_kfac import jaxprs
from laplax_kfac.patterns.contract import Entries, Operands, Pattern, merged, register

RowNumbers = Int[Array, "positions stack 1"]


@dataclass(frozen=True)
class _Lookup:
    """Axes of a table: stacked ones, those that the indices pick from, and the rows' own."""

    stack: tuple[int, ...]
    picked: tuple[int, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "_Lookup":
        """The axes of a lookup's table."""
        shape, sizes = jaxprs.shape(eqn.invars[0]), eqn.params["slice_sizes"]
        numbers = eqn.params.get("dimension_numbers")
        stack = tuple(int(d) for d in numbers.operand_batching_dims) if numbers else ()
        axes = [d for d in range(len(shape)) if d not in stack]
        picked = tuple(d for d in axes if sizes[d] == 1 != shape[d])
        return cls(stack, picked, tuple(d for d in axes if d not in picked))


def operands(eqn: JaxprEqn) -> tuple[int, ...]:
    """The table, unless more than one and less than all entries of an axis are taken."""
    axes, sizes = _Lookup.of(eqn), eqn.params["slice_sizes"]
    whole = all(sizes[d] == jaxprs.shape(eqn.invars[0])[d] for d in axes.kept)
    return (0,) if whole and axes.picked else ()


def weight(eqn: JaxprEqn, _: int, w: Entries) -> Entries:
    """The weight as ``(stack, in, out)``."""
    axes = _Lookup.of(eqn)
    return merged(w, axes.stack, axes.picked, axes.kept)


def _row_numbers(eqn: JaxprEqn, starts: Operands) -> Int[Array, "..."]:
    """Numbers of the picked rows from the start index of every axis of the table."""
    axes, shape = _Lookup.of(eqn), jaxprs.shape(eqn.invars[0])
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


def gather_inputs(eqn: JaxprEqn, _: int, others: Operands) -> RowNumbers:
    """Row numbers."""
    (indices,), (positions, stack) = others, _gather_batch(eqn)
    indices = merged(indices, positions, stack, (indices.ndim - 1,))
    order = [int(d) for d in eqn.params["dimension_numbers"].start_index_map]
    starts = tuple(
        indices[..., order.index(d)] if d in order else jnp.zeros_like(indices[..., 0])
        for d in range(jaxprs.ndim(eqn.invars[0]))
    )
    return _row_numbers(eqn, starts)[..., None]


def gather_outputs(eqn: JaxprEqn, _: int, y: Entries) -> Entries:
    """The output as ``(positions, stack, out)``."""
    offset = tuple(int(d) for d in eqn.params["dimension_numbers"].offset_dims)
    batch = tuple(d for d in range(y.ndim) if d not in offset)
    positions, stack = (tuple(batch[d] for d in part) for part in _gather_batch(eqn))
    return merged(y, positions, stack, offset)


def slice_inputs(eqn: JaxprEqn, _: int, others: Operands) -> RowNumbers:
    """Row numbers."""
    return _row_numbers(eqn, others).reshape(1, 1, 1)


def slice_outputs(_: JaxprEqn, __: int, y: Entries) -> Entries:
    """The output as ``(positions, stack, out)``."""
    return y.reshape(1, 1, math.prod(y.shape))


GATHER = Pattern("embedding", operands, weight, gather_inputs, gather_outputs, indexed=True)
DYNAMIC_SLICE = Pattern("embedding", operands, weight, slice_inputs, slice_outputs, indexed=True)

register("gather", GATHER)
register("dynamic_slice", DYNAMIC_SLICE)
