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

from laplax_kfac.bases import UNROTATED, Basis, Sum
from laplax_kfac.capture.capture import UseRecord
from laplax_kfac.parsing.grouping import Member, Resolved
from laplax_kfac.patterns import one_hot

_HIGHEST = jax.lax.Precision.HIGHEST
FORMED = 2**23
"""Numbers that are formed at once from the records of several examples."""
_CACHED = 2**20
"""Numbers of gradient matrices that are formed at once: they should stay in a cache."""
_COLUMNS = 16
"""Most columns at once, for the code of a sum over them has as many terms."""
STORED = 200
"""Multiply-adds of a large product in the time of writing a number to memory and reading it."""

NO_ROTATION = (UNROTATED, UNROTATED)
Bases = tuple[Basis, ...]
RotatedUses = tuple[tuple[Array, Array], ...]
"""(inputs, cotangents) of every use of a layer, in the eigenbases of its block."""


def num_positions(record: tuple[UseRecord, ...]) -> int:
    """Over all uses: per-example gradients of a layer are sums of so many outer products a g^T."""
    return sum(use.inputs.shape[-3] for use in record)


def rotated_records(
    members: Sequence[Member], record: tuple[UseRecord, ...], sides: Bases = NO_ROTATION
) -> RotatedUses:
    """Inputs and cotangents of every use in the eigenbases of the layer's block.

    A transposed use has its inputs in the layer's output space, and the cotangents in its inputs'.
    """
    rotated = []
    for member, use in zip(members, record, strict=True):
        bases = sides[::-1] if member.claim.transposed else sides
        g = accumulate(use.gradients)
        if member.claim.indexed:
            a = one_hot(use.inputs, member.claim.ids.shape[1], g.dtype)
        else:
            a = accumulate(use.inputs)
        rotated.append((bases[0].rotate(a), bases[1].rotate(g)))
    return tuple(rotated)


def gradient_matrices(
    members: Sequence[Member], uses: RotatedUses
) -> Float[Array, "*n R stack rows out"]:
    """``sum_t a_t g_rt^T`` of one example, or of many, over all uses of a layer."""
    return jnp.moveaxis(gradients_side_by_side(members, uses), -2, -4)


def gradients_side_by_side(
    members: Sequence[Member], uses: RotatedUses
) -> Float[Array, "*n stack rows R out"]:
    """The same matrices in the order in which one product of an example gives them.

    It is that of its inputs with the cotangents of all columns, ``a^T [g_1 ... g_R]``.
    """
    total = jnp.zeros(())
    for member, (a, g) in zip(members, uses, strict=True):
        transposed = member.claim.transposed
        equation = "...sko,...rski->...kiro" if transposed else "...ski,...rsko->...kiro"
        total = total + jnp.einsum(equation, a, g, precision=_HIGHEST)
    return total


def is_lookup(resolved: Resolved) -> bool:
    """Whether per-example gradients of a layer have few rows: those that its only use picked."""
    return len(resolved.members) == 1 and resolved.members[0].claim.indexed


def lookup_gradients(
    record: UseRecord, outputs: Basis
) -> tuple[Int[Array, "S stack"], Float[Array, "R S stack out"], Float[Array, "S stack"]]:
    """The rows of one example's gradient: row numbers, rows in the basis, and shares.

    A row that several positions pick comes once for each, with shares that sum to one.
    """
    rows = record.inputs[..., 0]
    g = outputs.rotate(accumulate(record.gradients))
    same = same_row(rows[None])[0].astype(g.dtype)
    gradients = jnp.einsum("stk,rtko->rsko", same, g, precision=_HIGHEST)
    return rows, gradients, 1.0 / jnp.sum(same, axis=1)


def same_row(rows: Int[Array, "N S stack"]) -> Float[Array, "N S S stack"]:
    """1 where two positions of one example pick the same row."""
    return (rows[:, :, None] == rows[:, None]).astype(jnp.result_type(float))


def accumulate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """In a dtype to sum in: float32, or float64 where x64 is on."""
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


def sum_of_matrices(
    function: Callable[[RotatedUses, Array], Sum],
    uses: RotatedUses,
    weights: Float[Array, " N"],
    size: int,
) -> Sum:
    """Sum a function of gradient matrices over examples and columns, few enough for a cache.

    Args:
        function: (uses, weights) -> a sum of it over some examples and columns of them.
        uses: Inputs and cotangents of all.
        weights: Weights of the examples.
        size: How many numbers a matrix has.
    """
    columns = uses[0][1].shape[1]
    at_once = max(1, _CACHED // size)
    each = min(columns, at_once, _COLUMNS)

    def of_examples(uses: RotatedUses, weights: Float[Array, " n"]) -> Sum:
        if each == columns:
            return function(uses, weights)

        def of_columns(*cotangents: Float[Array, "r n S stack out"]) -> Sum:
            pairs = zip(uses, cotangents, strict=True)
            return function(tuple((a, jnp.moveaxis(g, 0, 1)) for (a, _), g in pairs), weights)

        return sum_in_parts(of_columns, tuple(jnp.moveaxis(g, 1, 0) for _, g in uses), each)

    return sum_in_parts(of_examples, (uses, weights), at_once // each)


def sum_in_parts(function: Callable[..., Sum], arguments: tuple[PyTree, ...], at_once: int) -> Sum:
    """Sum a function over the leading axis of its arguments, a part of it at once.

    Args:
        function: Takes parts of the arguments, and returns a sum over them.
        arguments: Arrays; where they are zero nothing is added.
        at_once: Most entries of a part.
    """
    count = jax.tree.leaves(arguments)[0].shape[0]
    parts = math.ceil(count / at_once)
    if parts <= 1:
        return function(*arguments)
    each = math.ceil(count / parts)
    parts = math.ceil(count / each)

    def split(x: Array) -> Array:
        padding = [(0, each * parts - count), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, padding).reshape(parts, each, *x.shape[1:])

    return sum_over(lambda part: function(*part), jax.tree.map(split, arguments))


def sum_over(function: Callable[[PyTree], PyTree], parts: PyTree) -> PyTree:
    """Sum a function, one after another, over arguments that are stacked in front."""

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    return jax.lax.scan(add, zeros, parts)[0]
