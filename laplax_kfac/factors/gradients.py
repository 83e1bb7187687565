"""Per-example gradients of layers with a weight, from what the uses of the weight saw.

With layer inputs a (N, S, rows) and cotangents g (N, R, S, out) the gradient of vector r in example
n is ``G_nr = sum_t a_nt g_nrt^T``. Its coordinates in the eigenbases of a block are the same sum
over rotated inputs and cotangents.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from laplax_kfac import machine
from laplax_kfac.bases import UNROTATED, Basis, Sum
from laplax_kfac.capture.layer_io import Cotangents, LayerIO, Rows, accumulate

_HIGHEST = jax.lax.Precision.HIGHEST
NO_ROTATION = (UNROTATED, UNROTATED)
Bases = tuple[Basis, ...]
RotatedUses = tuple[tuple[Array, Array], ...]
"""(inputs, gradients) of every use, (*n, R or 1, S, stack, features), in the bases of its block."""


def num_positions(record: tuple[LayerIO, ...]) -> int:
    """Over all uses: per-example gradients of a layer are sums of so many outer products a g^T."""
    return sum(use.num_positions for use in record)


def rotated_uses(record: tuple[LayerIO, ...], sides: Bases = NO_ROTATION) -> RotatedUses:
    """Inputs and gradients of every use in the bases of the layer's sides, for one or R columns."""
    inputs, outputs = sides
    return tuple((use.inputs.rotated(inputs), use.gradients.rotated(outputs)) for use in record)


def inputs_are_shared(record: tuple[LayerIO, ...]) -> bool:
    """Whether a layer's inputs are the same for all columns, in every use."""
    return not any(isinstance(use.inputs, Cotangents) for use in record)


def gradient_matrices(uses: RotatedUses) -> Float[Array, "*n R stack rows out"]:
    """``sum_t a_t g_rt^T`` of one example, or of many, over all uses of a layer."""
    return jnp.moveaxis(gradients_side_by_side(uses), -2, -4)


def gradients_side_by_side(uses: RotatedUses) -> Float[Array, "*n stack rows R out"]:
    """The same matrices in the order in which one product of an example gives them.

    It is that of its inputs with the cotangents of all columns, ``a^T [g_1 ... g_R]``.
    """
    total = jnp.zeros(())
    for a, g in uses:
        if a.shape[-4] == 1:
            matrices = jnp.einsum(
                "...ski,...rsko->...kiro", a[..., 0, :, :, :], g, precision=_HIGHEST
            )
        else:
            matrices = jnp.einsum(
                "...rski,...sko->...kiro", a, g[..., 0, :, :, :], precision=_HIGHEST
            )
        total = total + matrices
    return total


def lookup_of(record: tuple[LayerIO, ...]) -> tuple[Rows, Cotangents] | None:
    """The only use, if it picks rows: per-example gradients then have few rows that are not 0."""
    use = record[0]
    if len(record) > 1 or not isinstance(use.inputs, Rows):
        return None
    assert isinstance(use.gradients, Cotangents)
    return use.inputs, use.gradients


def lookup_gradients(
    rows: Rows, cotangents: Cotangents, outputs: Basis
) -> tuple[Float[Array, "N R S stack out"], Float[Array, "N S stack"]]:
    """The rows of every example's gradient, in the basis of the outputs, and shares.

    A row that several positions pick comes once for each, with shares that sum to one.
    """
    # Row i of G is the sum of g_t over the positions t that pick it; so every position gets the sum
    # over all that pick what it picks.
    same = accumulate(rows.same())
    gradients = jnp.einsum(
        "nstk,nrtko->nrsko", same, cotangents.rotated(outputs), precision=_HIGHEST
    )
    return gradients, 1.0 / jnp.sum(same, axis=2)


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
    columns = max(x.shape[1] for pair in uses for x in pair)
    at_once = max(1, machine.MACHINE.cached // size)
    each = min(columns, at_once, machine.MACHINE.columns)
    flat, treedef = jax.tree.flatten(uses)
    pulled = [k for k, x in enumerate(flat) if x.shape[1] == columns]

    def of_examples(flat: list[Array], weights: Float[Array, " n"]) -> Sum:
        if each == columns:
            return function(jax.tree.unflatten(treedef, flat), weights)

        def of_columns(*cotangents: Float[Array, "r n S stack _"]) -> Sum:
            some = dict(zip(pulled, cotangents, strict=True))
            parts = [jnp.moveaxis(some[k], 0, 1) if k in some else x for k, x in enumerate(flat)]
            return function(jax.tree.unflatten(treedef, parts), weights)

        return sum_in_parts(of_columns, tuple(jnp.moveaxis(flat[k], 1, 0) for k in pulled), each)

    return sum_in_parts(of_examples, (flat, weights), at_once // each)


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
