"""Streaming statistics of all layers: sums over batches, merged and finalized to blocks.

With layer inputs a (N, S, rows) and cotangents g (N, R, S, out), a Kronecker layer's block of the
curvature is ``A kron B / M`` (Eschenhagen et al. 2023, arXiv 2311.00636), where

* ``expand`` (their Eq. 17): A = sum_nt a a^T,  B = sum_nrt g g^T,  M = N S;
* ``reduce`` (their Eq. 22): A = sum_n a_n a_n^T with a_n = mean_t a, B likewise with
  g_nr = sum_t g, M = N.

With no cotangents at all (``forward_only``; Benzing 2022, arXiv 2201.12250; Petersen et al. 2023,
arXiv 2305.00604) the identity stands for ``sum_r g g^T`` at every position, so that B = M I.

Sums are taken in float32, or float64 where x64 is on, at full matrix-product precision. Statistics
are sums, so they may be accumulated in any order, over any split of the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from laplax_kfac import pytrees
from laplax_kfac.blocks.blocks import Block, Side, block_of_sides, diagonal_block, eigh_each
from laplax_kfac.capture.capture import ParameterRecord, Record, UseRecord
from laplax_kfac.factors.eigenvalue_correction import second_moments
from laplax_kfac.factors.gradients import (
    UNROTATED,
    accumulate,
    gradient_matrices,
    rotated_records,
    same_row,
    sum_into_rows,
)
from laplax_kfac.gram import (
    Symmetric,
    Tiled,
    bordered,
    self_product,
    upper_tiles,
    whole,
)
from laplax_kfac.parsing.claims import Claim
from laplax_kfac.parsing.grouping import Member, Resolved
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace

KfacApprox = Literal["expand", "reduce"]
KFAC_APPROXIMATIONS = ("expand", "reduce")
_HIGHEST = jax.lax.Precision.HIGHEST


@pytrees.register
@dataclass(frozen=True)
class KroneckerSums:
    """Sums of one Kronecker layer, with a leading axis over its U uses.

    Attributes:
        inputs: A, shape (U, stack, rows, rows), or (U, stack, rows) if it is diagonal.
        outputs: B, shape (U, stack, out, out), or (U, stack, out) if it is diagonal.
        count: M, shape (U, stack).
    """

    inputs: Any
    outputs: Any
    count: Float[Array, "*U stack"]


@pytrees.register
@dataclass(frozen=True)
class ParameterSums:
    """Sums of a probed layer: of g g^T (p, p) for a dense block, of g^2 (p,) for a diagonal."""

    gradients: Any


Sums = KroneckerSums | ParameterSums | None


@pytrees.register
@dataclass(frozen=True)
class Statistics:
    """The state of an accumulation; without layers before the first update.

    Attributes:
        num_examples: Examples seen, each counted with its weight, a float scalar.
        num_updates: Updates made, an integer scalar: it tells the random keys of updates apart.
        sums: Sums of every layer.
        layers: The layers.
        space: Structure of the parameters.
    """

    num_examples: Float[Array, ""]
    num_updates: Int[Array, ""]
    sums: tuple[Sums, ...]
    layers: tuple[Layer, ...] = field(metadata={"static": True})
    space: ParameterSpace | None = field(metadata={"static": True})


def empty_statistics() -> Statistics:
    """The state before any data: the neutral element of `merge`."""
    return Statistics(jnp.zeros(()), jnp.zeros((), jnp.int32), (), (), None)


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Statistics of the data of both.

    Raises:
        ValueError: If they are of different models.
    """
    if first.layers and second.layers:
        require_same_blocks(first, second)
        sums = jax.tree.map(jnp.add, first.sums, second.sums)
    else:
        sums = first.sums or second.sums
    return Statistics(
        first.num_examples + second.num_examples,
        first.num_updates + second.num_updates,
        sums,
        first.layers or second.layers,
        first.space or second.space,
    )


def require_same_blocks(first: Statistics, second: Statistics) -> None:
    """Refuse statistics of two models; numbers of positions may differ between batches.

    Raises:
        ValueError: If the sums are of different blocks.
    """
    ours, theirs = ([replace(ly, positions=0) for ly in s.layers] for s in (first, second))
    if ours != theirs or first.space != second.space:
        msg = "`merge` needs statistics of one model; the layers of these two differ."
        raise ValueError(msg)


def mirrored(statistics: Statistics) -> Statistics:
    """Statistics with all entries of the matrices of which sums keep the upper tiles."""
    leaves, treedef = jax.tree.flatten(statistics, is_leaf=_is_tiled)
    return jax.tree.unflatten(treedef, [whole(x) if _is_tiled(x) else x for x in leaves])


def _is_tiled(x: Any) -> bool:
    return isinstance(x, Tiled)


def batch_sums(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    kfac_approx: Callable[[Layer], KfacApprox] = lambda _: "expand",
    input_weights: Float[Array, " N"] | None = None,
) -> tuple[Sums, ...]:
    """Sums of every layer over one batch of records, whose leaves have a leading axis N.

    Wide matrices are given by their upper tiles; see `mirrored`.

    Args:
        resolved: The layers.
        records: Their records.
        weights: What every example counts.
        kfac_approx: The treatment of weight sharing in a layer.
        input_weights: What its inputs count, where the records have some of its columns only and
            sums over all columns are to be added up; as the example by default.
    """
    input_weights = weights if input_weights is None else input_weights
    return tuple(
        _layer_sums(r, record, weights, input_weights, kfac_approx(r.layer))
        for r, record in zip(resolved, records, strict=True)
    )


def _layer_sums(
    resolved: Resolved,
    record: Record,
    weights: Float[Array, " N"],
    input_weights: Float[Array, " N"],
    kfac_approx: KfacApprox,
) -> Sums:
    if record is None:
        return None
    if isinstance(record, ParameterRecord):
        return _probed_sums(resolved.layer, accumulate(record.gradients), weights)
    if resolved.layer.block == "dense":
        return _probed_sums(resolved.layer, _gradients(resolved.members, record), weights)
    if resolved.layer.block == "diagonal":
        return ParameterSums(second_moments(resolved, record, weights, UNROTATED))
    sums = [
        _use_sums(resolved.layer, m, r, weights, input_weights, kfac_approx)
        for m, r in zip(resolved.members, record, strict=True)
    ]
    if len(sums) > 1:  # in one form, whatever they were formed from
        retiled = lambda x: upper_tiles(x) if _is_tiled(x) else x  # noqa: E731
        sums = jax.tree.map(retiled, sums, is_leaf=_is_tiled)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)


def _probed_sums(
    layer: Layer, gradients: Float[Array, "N R p"], weights: Float[Array, " N"]
) -> ParameterSums:
    """Exact sums of a dense or diagonal block from its per-example gradients."""
    weights = weights.astype(gradients.dtype)
    dense = layer.block == "dense"
    if gradients.shape[1] == 0:
        identity = _identity(jnp.sum(weights)[None], layer.size, diagonal=not dense)
        return ParameterSums(jax.tree.map(lambda x: x[0], identity))
    weights = weights[:, None, None]
    if dense:
        return ParameterSums(_gram(gradients, weights))
    squares = jnp.real(weights * gradients * jnp.conj(gradients))
    return ParameterSums(jnp.sum(squares, axis=(0, 1)))


def _gradients(members: Sequence[Member], record: tuple[UseRecord, ...]) -> Float[Array, "N R p"]:
    """Per-example gradients of all parameters of a layer."""
    matrices = gradient_matrices(members, rotated_records(members, record))
    return matrices.reshape(*matrices.shape[:2], -1)


def _identity(counts: Float[Array, " stack"], size: int, *, diagonal: bool) -> Any:
    """A multiple of the identity for every stack index."""
    if diagonal:
        return counts[:, None] * jnp.ones(size, counts.dtype)
    return upper_tiles(counts[:, None, None] * jnp.eye(size, dtype=counts.dtype))


def _use_sums(
    layer: Layer,
    member: Member,
    record: UseRecord,
    weights: Float[Array, " N"],
    input_weights: Float[Array, " N"],
    kfac_approx: KfacApprox,
) -> KroneckerSums:
    claim = member.claim
    diagonal = layer.diagonal[::-1] if claim.transposed else layer.diagonal
    active, g = accumulate(record.active), accumulate(record.gradients)
    a = record.inputs if claim.indexed else accumulate(record.inputs)
    weights, input_weights = weights.astype(g.dtype), input_weights.astype(g.dtype)
    shares, counts = jnp.ones_like(active), active
    if kfac_approx == "reduce":
        positions = jnp.maximum(jnp.sum(active, axis=1, keepdims=True), 1.0)
        g = jnp.sum(g, axis=2, keepdims=True)
        if claim.indexed:
            shares = jnp.sum(same_row(a[..., 0]), axis=2) / positions**2
        else:
            a = jnp.sum(a, axis=1, keepdims=True) / positions[..., None]
        counts = jnp.max(active, axis=1, keepdims=True)
    count = jnp.einsum("n,nsk->k", input_weights, counts.astype(weights.dtype))
    inputs: Any
    if claim.indexed:
        inputs = sum_into_rows(claim.ids.shape[1], a[..., 0], input_weights[:, None, None] * shares)
    elif _from_operands(layer, claim, kfac_approx):
        inputs = _moment_of_operands(member, record.operands, input_weights, count)
    else:
        inputs = second_moment(a, input_weights[:, None, None, None], diagonal=diagonal[0])
    if g.shape[1] == 0:
        outputs = _identity(count, g.shape[-1], diagonal=diagonal[1])
    else:
        outputs = second_moment(g, weights[:, None, None, None, None], diagonal=diagonal[1])
    if claim.transposed:
        inputs, outputs = outputs, inputs
    return KroneckerSums(inputs, outputs, count)


def second_moment(
    x: Float[Array, "*n stack p"], weights: Float[Array, "..."], *, diagonal: bool
) -> Any:
    """Weighted sum of x x^T for every stack index, or its diagonal."""
    if diagonal:
        return jnp.sum(weights * x * x, axis=tuple(range(x.ndim - 2)))
    return _stacked_gram(x, weights)


def needs_inputs(resolved: Resolved, kfac_approx: KfacApprox) -> bool:
    """Whether sums of a layer are formed from its inputs, and not from what these are made of."""
    claims = [member.claim for member in resolved.members]
    return not all(_from_operands(resolved.layer, claim, kfac_approx) for claim in claims)


def _from_operands(layer: Layer, claim: Claim, kfac_approx: KfacApprox) -> bool:
    if layer.block != "kronecker" or kfac_approx != "expand" or layer.diagonal[claim.transposed]:
        return False
    return claim.moments is not None and claim.input_scale is None


def _moment_of_operands(
    member: Member,
    operands: tuple[ArrayLike, ...],
    weights: Float[Array, " N"],
    count: Float[Array, " stack"],
) -> Symmetric:
    """Weighted sum of a a^T for every stack index, where the inputs a need not be formed."""
    assert member.claim.moments is not None
    second, first = member.claim.moments(
        tuple(accumulate(jnp.asarray(x)) for x in operands), weights
    )
    if member.joint_bias is not None:
        corner = member.joint_bias**2 * count[:, None]
        border = jnp.concatenate([member.joint_bias * first, corner], axis=-1)
        second = bordered(second, border)
    return second if isinstance(second, Tiled) else upper_tiles(second)


@jax.custom_jvp
def _gram(x: Float[Array, "*n p"], weights: Float[Array, "..."]) -> Any:
    """Weighted sum of x x^T; the weights are not negative.

    Both operands of the product are one array, with the square roots of the weights multiplied in:
    of a tall x a second copy would take longer than the product.
    """
    return self_product((jnp.sqrt(weights) * x).reshape(-1, x.shape[-1]))


@_gram.defjvp
def _gram_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Symmetric, Symmetric]:
    """The derivative is that of the plain formula, for a root has none at a weight of zero."""

    def plain(x: Array, weights: Array) -> Symmetric:
        y, x = ((v * x).reshape(-1, x.shape[-1]) for v in (weights, 1.0))
        return upper_tiles(jnp.matmul(y.T, x, precision=_HIGHEST))

    return _gram(*primals), jax.jvp(plain, primals, tangents)[1]


def _stacked_gram(x: Float[Array, "*n stack p"], weights: Float[Array, "..."]) -> Symmetric:
    """Weighted sum of x[n, k] x[n, k]^T for every stack index k."""
    if x.shape[-2] == 1:  # a plain matrix product is faster than a batch of one
        return jax.tree.map(lambda tile: tile[None], _gram(x[..., 0, :], weights[..., 0, :]))
    y = (weights * x).reshape(-1, *x.shape[-2:])
    return upper_tiles(jnp.einsum("nkp,nkq->kpq", y, x.reshape(y.shape), precision=_HIGHEST))


# -- finalize ----------------------------------------------------------------------------------


def finalize(statistics: Statistics) -> tuple[Block, ...]:
    """Blocks of every layer from the sums: one eigendecomposition a factor.

    Raises:
        ValueError: If the statistics have seen no data.
    """
    require_data(statistics)
    return _blocks(statistics, eigh_each(_matrices(statistics)))


def require_data(statistics: Statistics) -> None:
    """Refuse statistics that have seen no data.

    Raises:
        ValueError: If they have not.
    """
    if not statistics.layers:
        msg = "`finalize` needs statistics of some data; call `update` first."
        raise ValueError(msg)


@jax.jit
def _matrices(statistics: Statistics) -> list[Array]:
    """The matrices to decompose, of all layers."""
    pairs = zip(statistics.layers, statistics.sums, strict=True)
    return [x for pair in pairs for x, diagonal in _sides(*pair) if not diagonal]


@jax.jit
def _blocks(statistics: Statistics, decomposed: Sequence[Side]) -> tuple[Block, ...]:
    """Blocks of all layers from the eigendecompositions of `_matrices`."""
    left, blocks = iter(decomposed), []
    for layer, sums in zip(statistics.layers, statistics.sums, strict=True):
        sides = [(x, None) if diagonal else next(left) for x, diagonal in _sides(layer, sums)]
        blocks.append(block_of_sides(sides) if sides else _block_of_parameters(layer, sums))
    return tuple(blocks)


def _sides(layer: Layer, sums: Sums) -> list[tuple[Array, bool]]:
    """Matrices whose Kronecker product is the layer's block, and whether each is diagonal."""
    if isinstance(sums, KroneckerSums):
        factors = _factors(sums)
        factors = factors if layer.stack > 1 else (factors[0][0], factors[1][0])
        return list(zip(factors, layer.diagonal, strict=True))
    return [(sums.gradients, False)] if sums is not None and layer.block == "dense" else []


def _block_of_parameters(layer: Layer, sums: Sums) -> Block:
    """The diagonal block of a layer without such matrices."""
    if sums is None:
        return diagonal_block(jnp.zeros(layer.size))
    assert isinstance(sums, ParameterSums)
    return Block((None, None) if layer.is_matrix else (None,), sums.gradients)


def _factors(sums: KroneckerSums) -> tuple[Array, Array]:
    """The two factors of a layer's block; their product is that of the curvature."""
    count = jnp.where(sums.count > 0, sums.count, 1.0)  # a branch never taken has zero sums
    count = count.reshape(*count.shape, *[1] * (sums.inputs.ndim - 2))
    return nearest_kronecker(sums.inputs / count, sums.outputs)


def nearest_kronecker(
    inputs: Float[Array, "U stack rows *rows"],
    outputs: Float[Array, "U stack out *out"],
    iterations: int = 100,
) -> tuple[Float[Array, "stack rows *rows"], Float[Array, "stack out *out"]]:
    """The Kronecker product nearest to ``sum_u inputs[u] kron outputs[u]`` in Frobenius norm.

    The nearest product lies in the span of the summands (Van Loan & Pitsianis 1993), so the power
    iteration runs on U coefficients, with the Gram matrices of the summands. These have no
    negative entries, for the summands are positive semi-definite; so have the coefficients, and
    the product is positive semi-definite too.
    """
    if inputs.shape[0] == 1:
        return inputs[0], outputs[0]
    gram_in, gram_out = _gram_of_uses(inputs), _gram_of_uses(outputs)

    def unit(
        w: Float[Array, "stack U"], gram: Float[Array, "stack U U"]
    ) -> Float[Array, "stack U"]:
        norm = jnp.sqrt(jnp.einsum("ku,kuv,kv->k", w, gram, w))[:, None]
        return w / jnp.where(norm > 0, norm, 1.0)

    def step(_: Int[Array, ""], w: Float[Array, "stack U"]) -> Float[Array, "stack U"]:
        v = unit(jnp.einsum("kuv,kv->ku", gram_in, w), gram_out)
        return unit(jnp.einsum("kuv,kv->ku", gram_out, v), gram_in)

    start = unit(jnp.ones(gram_in.shape[:2], gram_in.dtype), gram_in)
    w = jax.lax.fori_loop(0, iterations, step, start)
    v = jnp.einsum("kuv,kv->ku", gram_in, w)
    return jnp.einsum("ku,uk...->k...", w, inputs), jnp.einsum("ku,uk...->k...", v, outputs)


def _gram_of_uses(factors: Float[Array, "U stack p *p"]) -> Float[Array, "stack U U"]:
    flat = factors.reshape(*factors.shape[:2], -1)
    return jnp.einsum("ukp,vkp->kuv", flat, flat, precision=_HIGHEST)


def kronecker_factors(statistics: Statistics) -> tuple[list[Array | None], list[Array | None]]:
    """Input factors and output factors of all layers; None for those without."""
    pairs = [
        _factors(sums) if isinstance(sums, KroneckerSums) else (None, None)
        for sums in statistics.sums
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def with_kronecker_factors(
    statistics: Statistics, inputs: Sequence[Array | None], outputs: Sequence[Array | None]
) -> Statistics:
    """Statistics whose Kronecker layers have these factors."""
    sums = tuple(
        KroneckerSums(a[None], b[None], jnp.ones((1, a.shape[0]), a.dtype))
        if a is not None and b is not None
        else old
        for old, a, b in zip(statistics.sums, inputs, outputs, strict=True)
    )
    return replace(statistics, sums=sums)
