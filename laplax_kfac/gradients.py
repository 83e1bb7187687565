"""Per-example gradients of layers with a weight, from what the uses of the weight saw.

With layer inputs a (N, S, rows) and cotangents g (N, R, S, out) the gradient of vector r in example
n is ``G_nr = sum_t a_nt g_nrt^T``. Its coordinates in the eigenbases of a block are the same sum
over rotated inputs and cotangents.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac.blocks import Block
from laplax_kfac.capture import UseRecord
from laplax_kfac.patterns import one_hot
from laplax_kfac.resolve import Member, Resolved

_HIGHEST = jax.lax.Precision.HIGHEST
_FORMED = 2**23
"""Numbers that are formed at once from the records of several examples."""
STORED = 200
"""Multiply-adds of a large product in the time of writing a number to memory and reading it."""

UNROTATED = Block((None, None), jnp.ones(()))

RotatedUses = tuple[tuple[Array, Array], ...]
"""(inputs, cotangents) of every use of a layer, in the eigenbases of its block."""


def num_positions(record: tuple[UseRecord, ...]) -> int:
    """Over all uses: per-example gradients of a layer are sums of so many outer products a g^T."""
    return sum(use.inputs.shape[-3] for use in record)


def rotated_records(
    members: Sequence[Member], record: tuple[UseRecord, ...], block: Block = UNROTATED
) -> RotatedUses:
    """Inputs and cotangents of every use in the eigenbases of the layer's block, if given.

    A transposed use has its inputs in the layer's output space, and the cotangents in its inputs'.
    """
    rotated = []
    for member, use in zip(members, record, strict=True):
        bases = block.basis[::-1] if member.claim.transposed else block.basis
        g = accumulate(use.gradients)
        if member.claim.indexed:
            a = one_hot(use.inputs, member.claim.ids.shape[1], g.dtype)
        else:
            a = accumulate(use.inputs)
        rotated.append((_in_basis(a, bases[0]), _in_basis(g, bases[1])))
    return tuple(rotated)


def gradient_matrices(
    members: Sequence[Member], pairs: RotatedUses
) -> Float[Array, "*n R stack rows out"]:
    """``sum_t a_t g_rt^T`` of one example, or of many, over all uses of a layer."""
    total = jnp.zeros(())
    for member, (a, g) in zip(members, pairs, strict=True):
        transposed = member.claim.transposed
        equation = "...sko,...rski->...rkio" if transposed else "...ski,...rsko->...rkio"
        total = total + jnp.einsum(equation, a, g, precision=_HIGHEST)
    return total


def _in_basis(x: Float[Array, "..."], basis: Float[Array, "..."] | None) -> Float[Array, "..."]:
    if basis is None:
        return x
    stacked = basis if basis.ndim == 3 else basis[None]
    return jnp.einsum("...ki,kij->...kj", x, stacked, precision=_HIGHEST)


def is_lookup(resolved: Resolved) -> bool:
    """Whether per-example gradients of a layer have few rows: those that its only use picked."""
    return len(resolved.members) == 1 and resolved.members[0].claim.indexed


def lookup_gradients(
    record: UseRecord, block: Block
) -> tuple[Int[Array, "S stack"], Float[Array, "R S stack out"], Float[Array, "S stack"]]:
    """The rows of one example's gradient: row numbers, rows in the basis, and shares.

    A row that several positions pick comes once for each, with shares that sum to one.
    """
    rows = record.inputs[..., 0]
    g = _in_basis(accumulate(record.gradients), block.basis[1])
    same = same_row(rows[None])[0].astype(g.dtype)
    gradients = jnp.einsum("stk,rtko->rsko", same, g, precision=_HIGHEST)
    return rows, gradients, 1.0 / jnp.sum(same, axis=1)


def same_row(rows: Int[Array, "N S stack"]) -> Float[Array, "N S S stack"]:
    """1 where two positions of one example pick the same row."""
    return (rows[:, :, None] == rows[:, None]).astype(jnp.result_type(float))


def sum_into_rows(
    size: int, rows: Int[Array, "N S stack"], values: Float[Array, "N S stack *out"]
) -> Float[Array, "stack size *out"]:
    """Add the values of all positions to the rows that these pick; -1 picks none."""
    stack = rows.shape[-1]
    total = jnp.zeros((stack, size, *values.shape[3:]), values.dtype)
    kept = jnp.where(rows < 0, size, rows)  # beyond the last row: dropped
    return total.at[jnp.arange(stack), kept].add(values, mode="drop")


def accumulate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """In a dtype to sum in: float32, or float64 where x64 is on."""
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


def sum_in_parts(
    function: Callable[..., Array], examples: tuple[PyTree, ...], numbers: int
) -> Array:
    """Sum a function over examples, few enough at once for memory that is used again.

    Args:
        function: Takes examples and their weights, and returns a sum over them.
        examples: Its arguments; examples with weight zero count nothing.
        numbers: How many numbers it forms for an example.
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    parts = min(count, math.ceil(count * numbers / _FORMED))
    if parts <= 1:
        return function(*examples)
    each = math.ceil(count / parts)
    parts = math.ceil(count / each)

    def split(x: Array) -> Array:
        padding = [(0, each * parts - count), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, padding).reshape(parts, each, *x.shape[1:])

    total: Array = sum_over(lambda part: function(*part), jax.tree.map(split, examples))
    return total


def sum_over(function: Callable[[PyTree], PyTree], parts: PyTree) -> PyTree:
    """Sum a function, one after another, over arguments that are stacked in front."""

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(add, zeros, parts)[0]
