"""Eigenvalue correction: second moments of the per-example gradients in the eigenbases (EKFAC).

``sum_nr (U_A^T G_nr U_B)_ij^2`` (George et al. 2018, arXiv 1806.03884) is the diagonal of the exact
curvature in the Kronecker eigenbasis; without bases it is the diagonal of the curvature itself.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import machine
from laplax_kfac.bases import UNROTATED
from laplax_kfac.blocks.blocks import Block
from laplax_kfac.capture.layer_io import LayerIO, Record, accumulate
from laplax_kfac.factors.gradients import (
    Bases,
    RotatedUses,
    gradients_side_by_side,
    inputs_are_shared,
    lookup_gradients,
    lookup_of,
    num_positions,
    rotated_uses,
    sum_in_parts,
    sum_of_matrices,
)
from laplax_kfac.parsing.grouping import Resolved
from laplax_kfac.parsing.layer import Layer

_HIGHEST = jax.lax.Precision.HIGHEST


def corrected_eigenvalues(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    blocks: Sequence[Block],
) -> tuple[Float[Array, "..."], ...]:
    """Second moments of the per-example gradients in the blocks' bases, over one batch.

    ``sum_nr (U_A^T G_nr U_B)_ij^2`` with ``G_nr = sum_t a_nt g_nrt^T`` (George et al. 2018,
    arXiv 1806.03884, Eq. 8): the diagonal of the exact curvature in the Kronecker eigenbasis.
    Layers whose block is exact already keep what they have: their entry is all zeros.
    """
    return tuple(
        second_moments(r.layer, record, weights, block.sides)
        if isinstance(record, tuple) and r.layer.block == "kronecker"
        else jnp.zeros_like(block.eigenvalues)
        for r, record, block in zip(resolved, records, blocks, strict=True)
    )


def second_moments(
    layer: Layer, record: tuple[LayerIO, ...], weights: Float[Array, " N"], sides: Bases
) -> Float[Array, "..."]:
    """Second moments of the gradients of one layer in the bases of its sides."""
    lookup = lookup_of(record)
    if lookup is not None:
        # G has one row for every row that is picked, whose squares are added there. A row that
        # several positions pick would be added by each, so each adds its share.
        rows, cotangents = lookup
        gradients, shares = lookup_gradients(rows, cotangents, sides[1])
        squares = jnp.sum(gradients**2, axis=1) * (shares * weights[:, None, None])[..., None]
        return rows.sum_into(squares).reshape(layer.shape)
    weights = accumulate(weights)
    if _in_pairs(layer, record):
        uses = rotated_uses(record, sides)
        numbers = num_positions(record) ** 2 * layer.stack * (layer.rows + layer.out_features)
        at_once = max(1, machine.MACHINE.formed // numbers)
        moments = sum_in_parts(_moments_by_pairs, (uses, weights), at_once)
        return moments.reshape(layer.shape)
    before, after = _rotations(layer, record, sides)

    def by_matrices(uses: RotatedUses, weights: Float[Array, " n"]) -> Array:
        matrices = _rotated(after, gradients_side_by_side(uses))
        # XLA sums over an axis between others slowly.
        squares = [matrices[..., r, :] ** 2 for r in range(matrices.shape[-2])]
        total = functools.reduce(jnp.add, squares)
        return jnp.einsum("n,nkio->kio", weights, total, precision=_HIGHEST)

    uses = rotated_uses(record, before)
    return sum_of_matrices(by_matrices, uses, weights, layer.size).reshape(layer.shape)


def _in_pairs(layer: Layer, record: tuple[LayerIO, ...]) -> bool:
    """Whether to multiply pairs of positions out, and not the positions' outer products.

    ``sum_r G_rio^2 = sum_tu (a_ti a_ui) (sum_r g_rto g_ruo)`` is one product over pairs, for all
    examples and columns: at S^2 multiply-adds an entry of the weight instead of R S, and no numbers
    of the size of the weight. With one position the pairs are squares.
    """
    if not inputs_are_shared(record):
        return False
    columns = record[0].num_columns
    positions = num_positions(record)
    entries = layer.rows * layer.out_features
    stored = machine.MACHINE.stored
    pairs = positions**2 * (entries + stored * (layer.rows + 2 * columns * layer.out_features))
    return pairs <= columns * entries * (positions + 3 * stored)


def _moments_by_pairs(
    uses: RotatedUses, weights: Float[Array, " n"]
) -> Float[Array, "stack rows out"]:
    # sum_r (sum_t a_ti g_rto)^2 = sum_tu (a_ti a_ui) (sum_r g_rto g_ruo): uses are more positions.
    a = jnp.concatenate([a[:, 0] for a, _ in uses], axis=1)
    g = jnp.concatenate([g for _, g in uses], axis=2)
    inputs = weights[:, None, None, None, None] * a[:, :, None] * a[:, None]
    outputs = jnp.sum(g[:, :, :, None] * g[:, :, None], axis=1)
    moments = jnp.einsum("ntuki,ntuko->kio", inputs, outputs, precision=_HIGHEST)
    return jnp.maximum(moments, 0.0)  # sums of squares, up to rounding


def _rotated(
    sides: Bases, matrices: Float[Array, "n stack rows R out"]
) -> Float[Array, "n stack rows R out"]:
    """Matrices side by side in the bases."""
    shape, (rows, out) = matrices.shape, sides
    matrices = rows.rotate(matrices.reshape(*shape[:3], -1), -2)
    return out.rotate(matrices.reshape(*shape[:2], -1, shape[-1]), -1).reshape(shape)


def _rotations(layer: Layer, record: tuple[LayerIO, ...], sides: Bases) -> tuple[Bases, Bases]:
    """What to rotate first, inputs and cotangents, and what later, matrices that are smaller."""
    # Inputs are S vectors an example where the matrices have R out columns; cotangents are R S
    # vectors where the matrices have R rows: rotate what has fewer.
    positions, columns = num_positions(record), record[0].num_columns
    fewer = positions < columns * layer.out_features, positions < layer.rows
    pairs = list(zip(sides, fewer, strict=True))
    before = tuple(basis if first else UNROTATED for basis, first in pairs)
    return before, tuple(UNROTATED if first else basis for basis, first in pairs)
