"""Optimal factors: half steps of the power iteration for the nearest Kronecker product (KFOC).

The exact block of a layer is ``sum_nr vec(G_nr) vec(G_nr)^T`` with per-example gradients G (rows,
out). The product nearest to it in Frobenius norm is the leading singular pair of a rearranged block
(Van Loan & Pitsianis 1993; Koroko et al. 2022, arXiv 2201.10285); each half step contracts the
block with one factor, and factors stay positive semi-definite.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import machine
from laplax_kfac.bases import UNROTATED, Sum
from laplax_kfac.capture.layer_io import LayerIO, Record, accumulate
from laplax_kfac.factors.gradients import (
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


def over_outputs(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    outputs: Sequence[Sum | None],
) -> tuple[Sum | None, ...]:
    """Contract every Kronecker layer's exact block with its output factor, over one batch.

    The exact block is ``sum_nr vec(G_nr) vec(G_nr)^T`` with per-example gradients G (rows, out);
    its contraction with B is ``sum_nr G B G^T``. This and `over_inputs` are the half steps of the
    power iteration for the nearest Kronecker product (Van Loan & Pitsianis 1993; Koroko et al.
    2022, arXiv 2201.10285); factors stay positive semi-definite. Other layers' entries are None.
    """
    pairs = zip(resolved, records, outputs, strict=True)
    return tuple(
        b if b is None else _contracted(r, record, weights, b, 0) for r, record, b in pairs
    )


def over_inputs(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    inputs: Sequence[Sum | None],
) -> tuple[Sum | None, ...]:
    """As `over_outputs`, with the input factor: ``sum_nr G^T A G``."""
    pairs = zip(resolved, records, inputs, strict=True)
    return tuple(
        a if a is None else _contracted(r, record, weights, a, 1) for r, record, a in pairs
    )


def _contracted(
    resolved: Resolved, record: Record, weights: Float[Array, " N"], factor: Sum, side: int
) -> Sum:
    assert isinstance(record, tuple)
    layer = resolved.layer
    kept, contracted = layer.kinds[side], layer.kinds[1 - side]
    lookup = lookup_of(record)
    if lookup is not None:
        rows, cotangents = lookup
        gradients, shares = lookup_gradients(rows, cotangents, UNROTATED)
        shares = (rows.numbers >= 0) * shares * weights[:, None, None]
        if side == 0:
            sizes = jnp.sum(contracted.form(gradients, factor), axis=1)
            return kept.finished(kept.sum_rows(rows.numbers, rows.size, sizes * shares))
        shares = shares * contracted.diagonal(factor)[jnp.arange(layer.stack), rows.numbers]
        return kept.finished(kept.sum(gradients, shares[:, None, ..., None]))
    uses, weights = rotated_uses(record), accumulate(weights)
    if num_positions(record) == 1:
        # G_r = a g_r^T, so that sum_r G_r B G_r^T = (sum_r g_r^T B g_r) a a^T: the layer's own sum
        # of inputs, with other weights.
        mine, other = uses[0] if side == 0 else uses[0][::-1]
        sizes = contracted.form(other, factor)
        if mine.shape[1] == 1:
            sizes = jnp.sum(sizes, axis=1, keepdims=True)
        return kept.finished(kept.sum(mine, (weights[:, None, None, None] * sizes)[..., None]))

    def by_matrices(uses: RotatedUses, weights: Float[Array, " n"]) -> Sum:
        """``G B G^T``, the vectors of B in the rows of G, those of the result in its columns."""
        # sum_r G_r B G_r^T = [G_1 ... G_R] (I_R kron B) [G_1 ... G_R]^T: side by side, the sum over
        # r is part of the matrix product, and B meets one tall matrix.
        matrices = gradients_side_by_side(uses)
        rows = matrices.reshape(*matrices.shape[:3], -1)  # one matrix of all columns, and another
        columns = matrices.reshape(*matrices.shape[:2], -1, matrices.shape[-1])
        by_kept, by_contracted, axes = (rows, columns, (-2, -1)) if side == 0 else (
            columns, rows, (-1, -2)
        )  # fmt: skip
        products = weights[:, None, None, None] * by_contracted
        products = contracted.times(products, factor, axes[1])
        return kept.cross(products.reshape(by_kept.shape), by_kept, axes[0])

    def by_pairs(uses: RotatedUses, weights: Float[Array, " n"]) -> Sum:
        """``G B G^T = sum_tu a_t (sum_r g_rt^T B g_ru) a_u^T``, and the other way round."""
        a = jnp.concatenate([a for a, _ in uses], axis=2)
        g = jnp.concatenate([g for _, g in uses], axis=2)
        # k_tu = sum_r g_rt^T B g_ru is a kernel between positions; then sum_u k_tu a_u stands where
        # G^T did, and no array has the size of G.
        inner, outer = (g, a) if side == 0 else (a, g)
        products = weights[:, None, None, None, None] * contracted.times(inner, factor)
        kernel = jnp.einsum("nrtkp,nrukp->nktu", products, inner, precision=_HIGHEST)
        moved = jnp.einsum("nktu,nrukp->nrtkp", kernel, outer, precision=_HIGHEST)
        return kept.cross(outer, moved)

    if not _contracts_in_pairs(layer, record):
        return sum_of_matrices(by_matrices, uses, weights, layer.size)
    columns, positions = record[0].num_columns, num_positions(record)
    widths = positions + layer.rows + columns * layer.out_features
    at_once = max(1, machine.MACHINE.formed // (positions * layer.stack * widths))
    return sum_in_parts(by_pairs, (uses, weights), at_once)


def _contracts_in_pairs(layer: Layer, record: tuple[LayerIO, ...]) -> bool:
    """Whether to go over pairs of positions, and not over gradients: what takes less."""
    if not inputs_are_shared(record):
        return False
    columns = record[0].num_columns
    positions, rows, out = num_positions(record), layer.rows, layer.out_features
    widths = rows + columns * out
    stored = machine.MACHINE.stored
    # Multiply-adds of the einsums over pairs, and numbers written between them, against those of
    # the products with G and of the matrices that these take and leave.
    pairs = positions * (rows**2 + columns * out**2 + positions * (widths + stored))
    sizes = positions + rows + out + 2 * stored
    return pairs <= columns * rows * out * sizes


def over_squared_norms(
    layers: Sequence[Layer],
    contracted: Sequence[Sum | None],
    others: Sequence[Sum | None],
    side: int,
) -> list[Sum | None]:
    """Contractions over the squared norms of the factors that they were made with.

    Args:
        layers: The layers.
        contracted: A contraction of every layer's block; None where it is no Kronecker product.
        others: The factors.
        side: The side of the contractions, 0 for inputs.
    """
    found: list[Sum | None] = []
    for layer, new, other in zip(layers, contracted, others, strict=True):
        if other is None:
            found.append(None)
            continue
        # The A that minimises ||M - A kron B||_F for a fixed B is M contracted with B, over <B, B>.
        norms = layer.kinds[1 - side].inner(other, other)
        norms = jnp.where(norms > 0, norms, 1.0)
        divided = lambda x, n=norms: x / n.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
        found.append(jax.tree.map(divided, new))
    return found


def same_directions(
    layers: Sequence[Layer], before: Sequence[Sum | None], after: Sequence[Sum | None]
) -> bool:
    """Whether input factors are the same up to scale, to half of the digits (cosines: to all)."""
    for layer, a, b in zip(layers, before, after, strict=True):
        if a is None or b is None:
            continue
        # An error of size e in a direction changes its cosine by e^2 / 2: a cosine that is 1 to all
        # digits says that half of the digits of the factor are right.
        inner = layer.kinds[0].inner
        norms = jnp.sqrt(inner(a, a) * inner(b, b))
        cosines = inner(a, b) / jnp.where(norms > 0, norms, 1.0)
        if jnp.any((norms > 0) & (1.0 - cosines > 100 * jnp.finfo(norms.dtype).eps)):
            return False
    return True
