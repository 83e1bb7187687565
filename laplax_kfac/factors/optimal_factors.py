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

from laplax_kfac.capture.capture import Record, UseRecord
from laplax_kfac.factors.gradients import (
    FORMED,
    STORED,
    UNROTATED,
    RotatedUses,
    accumulate,
    gradients_side_by_side,
    is_lookup,
    lookup_gradients,
    num_positions,
    rotated_records,
    sum_in_parts,
    sum_into_rows,
    sum_of_matrices,
)
from laplax_kfac.factors.statistics import second_moment
from laplax_kfac.gram import whole
from laplax_kfac.parsing.grouping import Resolved

_HIGHEST = jax.lax.Precision.HIGHEST


def over_outputs(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    outputs: Sequence[Array | None],
) -> tuple[Array | None, ...]:
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
    inputs: Sequence[Array | None],
) -> tuple[Array | None, ...]:
    """As `over_outputs`, with the input factor: ``sum_nr G^T A G``."""
    pairs = zip(resolved, records, inputs, strict=True)
    return tuple(
        a if a is None else _contracted(r, record, weights, a, 1) for r, record, a in pairs
    )


def _contracted(
    resolved: Resolved,
    record: Record,
    weights: Float[Array, " N"],
    factor: Float[Array, "stack p *p"],
    side: int,
) -> Float[Array, "stack q *q"]:
    assert isinstance(record, tuple)
    layer = resolved.layer
    kept, contracted = layer.diagonal[side], layer.diagonal[1 - side]
    if is_lookup(resolved):
        rows, gradients, shares = jax.vmap(lambda r: lookup_gradients(r, UNROTATED))(record[0])
        shares = (rows >= 0) * shares * weights[:, None, None]
        if side == 0:
            sizes = jnp.sum(_form(gradients, factor, diagonal=contracted), axis=1)
            return sum_into_rows(layer.rows, rows, sizes * shares)
        shares = shares * factor[jnp.arange(layer.stack), rows]
        return whole(second_moment(gradients, shares[:, None, ..., None], diagonal=kept))
    if num_positions(record) == 1:  # G = a g^T
        a, g = accumulate(record[0].inputs), accumulate(record[0].gradients)
        if side == 0:
            sizes = jnp.sum(_form(g, factor, diagonal=contracted), axis=1)
            return whole(
                second_moment(a, (weights[:, None, None] * sizes)[..., None], diagonal=kept)
            )
        sizes = weights[:, None, None] * _form(a, factor, diagonal=contracted)
        return whole(second_moment(g, sizes[:, None, ..., None], diagonal=kept))

    def by_matrices(uses: RotatedUses, weights: Float[Array, " n"]) -> Array:
        matrices = gradients_side_by_side(resolved.members, uses)
        shape = matrices.shape
        products = weights[:, None, None, None, None] * matrices
        if side == 0:
            products = products.reshape(*shape[:2], -1, shape[-1])
            equation = "nkirp,nkirp->ki" if kept else "nkirp,nkjrp->kij"
        else:
            products = products.reshape(*shape[:3], -1)
            equation = "nkirp,nkirp->kp" if kept else "nkirp,nkirq->kpq"
        products = _multiplied(products, factor, side, diagonal=contracted).reshape(shape)
        return jnp.einsum(equation, products, matrices, precision=_HIGHEST)

    def by_pairs(uses: RotatedUses, weights: Float[Array, " n"]) -> Array:
        """``G B G^T = sum_tu a_t (sum_r g_rt^T B g_ru) a_u^T``, and the other way round."""
        a = jnp.concatenate([a for a, _ in uses], axis=1)[:, None]
        g = jnp.concatenate([g for _, g in uses], axis=2)
        inner, outer = (g, a) if side == 0 else (a, g)
        products = weights[:, None, None, None, None] * _times(inner, factor, diagonal=contracted)
        kernel = jnp.einsum("nrtkp,nrukp->nktu", products, inner, precision=_HIGHEST)
        moved = jnp.einsum("nktu,nrukp->nrtkp", kernel, outer, precision=_HIGHEST)
        equation = "nrtkp,nrtkp->kp" if kept else "nrtkp,nrtkq->kpq"
        return jnp.einsum(equation, outer, moved, precision=_HIGHEST)

    uses = rotated_records(resolved.members, record)
    weights = weights.astype(factor.dtype)
    if not _contracts_in_pairs(resolved, record):
        return sum_of_matrices(by_matrices, uses, weights, layer.size)
    columns, positions = record[0].gradients.shape[1], num_positions(record)
    widths = positions + layer.rows + columns * layer.out_features
    at_once = max(1, FORMED // (positions * layer.stack * widths))
    return sum_in_parts(by_pairs, (uses, weights), at_once)


def _multiplied(
    matrices: Float[Array, "n stack rows out"],
    factor: Float[Array, "stack p *p"],
    side: int,
    *,
    diagonal: bool,
) -> Float[Array, "n stack rows out"]:
    """Matrices times the output factor (side 0), or the input factor times them."""
    if diagonal:
        return matrices * jnp.expand_dims(factor, -2 if side == 0 else -1)
    pair = (matrices, factor) if side == 0 else (factor, matrices)
    return jnp.matmul(*pair, precision=_HIGHEST)


def _contracts_in_pairs(resolved: Resolved, record: tuple[UseRecord, ...]) -> bool:
    """Whether to go over pairs of positions, and not over gradients: what takes less."""
    if any(m.claim.transposed for m in resolved.members):
        return False
    layer, columns = resolved.layer, record[0].gradients.shape[1]
    positions, rows, out = num_positions(record), layer.rows, layer.out_features
    widths = rows + columns * out
    pairs = positions * (rows**2 + columns * out**2 + positions * (widths + STORED))
    sizes = positions + rows + out + 2 * STORED
    return pairs <= columns * rows * out * sizes


def _form(
    x: Float[Array, "*n stack p"], factor: Float[Array, "stack p *p"], *, diagonal: bool
) -> Float[Array, "*n stack"]:
    """Quadratic forms ``x^T factor x``."""
    return jnp.sum(_times(x, factor, diagonal=diagonal) * x, axis=-1)


def _times(
    x: Float[Array, "*n stack p"], factor: Float[Array, "stack p *p"], *, diagonal: bool
) -> Float[Array, "*n stack p"]:
    if diagonal:
        return factor * x
    return jnp.einsum("...kp,kpq->...kq", x, factor, precision=_HIGHEST)


def over_squared_norm(
    contracted: Float[Array, "stack p *p"], factor: Float[Array, "stack q *q"]
) -> Float[Array, "stack p *p"]:
    """A contraction over the squared norm of the factor that it was made with."""
    norms = jnp.sum(factor.reshape(factor.shape[0], -1) ** 2, axis=1)
    norms = jnp.where(norms > 0, norms, 1.0)
    return contracted / norms.reshape(-1, *[1] * (contracted.ndim - 1))


def same_directions(before: Sequence[Array | None], after: Sequence[Array | None]) -> bool:
    """Whether factors are the same up to scale, to half of the digits (cosines: to all)."""
    for a, b in zip(before, after, strict=True):
        if a is None or b is None:
            continue
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
        cosines = jnp.sum(a * b, axis=1) / jnp.where(norms > 0, norms, 1.0)
        if jnp.any((norms > 0) & (1.0 - cosines > 100 * jnp.finfo(a.dtype).eps)):
            return False
    return True
