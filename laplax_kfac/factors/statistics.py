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

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from laplax_kfac import pytrees
from laplax_kfac.bases import UNROTATED, Kind, Sum, eigh_each
from laplax_kfac.bases.eigh import Eigh
from laplax_kfac.blocks.blocks import Block, block_of_sides, diagonal_block
from laplax_kfac.capture.capture import ParameterRecord, Record, UseRecord
from laplax_kfac.factors.eigenvalue_correction import second_moments
from laplax_kfac.factors.gradients import (
    NO_ROTATION,
    accumulate,
    gradient_matrices,
    rotated_records,
    same_row,
)
from laplax_kfac.gram import Symmetric, bordered
from laplax_kfac.parsing.claims import Claim
from laplax_kfac.parsing.grouping import Member, Resolved
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace

KfacApprox = Literal["expand", "reduce"]
KFAC_APPROXIMATIONS = ("expand", "reduce")


@pytrees.register
@dataclass(frozen=True)
class KroneckerSums:
    """Sums of one Kronecker layer, with a leading axis over its U uses.

    Attributes:
        inputs: A, a sum of the kind of the layer's input side.
        outputs: B, a sum of the kind of its output side.
        count: M, shape (U, stack).
    """

    inputs: Sum
    outputs: Sum
    count: Float[Array, "*U stack"]


@pytrees.register
@dataclass(frozen=True)
class ParameterSums:
    """Sums of a layer without two sides.

    Attributes:
        gradients: Of g g^T (p, p) for a dense block, of g^2, in the layer's shape, for a diagonal.
    """

    gradients: Sum


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
    pairs = zip(statistics.layers, statistics.sums, strict=True)
    return replace(statistics, sums=tuple(_finished(*pair) for pair in pairs))


def _finished(layer: Layer, sums: Sums) -> Sums:
    if isinstance(sums, KroneckerSums):
        inputs, outputs = layer.kinds
        return replace(
            sums, inputs=inputs.finished(sums.inputs), outputs=outputs.finished(sums.outputs)
        )
    if sums is None:
        return None
    return ParameterSums(layer.kinds[0].finished(sums.gradients))


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
        return ParameterSums(second_moments(resolved, record, weights, NO_ROTATION))
    sums = [
        _use_sums(resolved.layer, m, r, weights, input_weights, kfac_approx)
        for m, r in zip(resolved.members, record, strict=True)
    ]
    if len(sums) > 1:  # in one form, whatever they were formed from
        inputs, outputs = resolved.layer.kinds
        sums = [
            replace(x, inputs=inputs.aligned(x.inputs), outputs=outputs.aligned(x.outputs))
            for x in sums
        ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)


def _probed_sums(
    layer: Layer, gradients: Float[Array, "N R p"], weights: Float[Array, " N"]
) -> ParameterSums:
    """Exact sums of a dense or diagonal block from its per-example gradients."""
    weights, kind = accumulate(weights), layer.kinds[0]
    if gradients.shape[1] == 0:
        total = kind.identity(jnp.sum(weights)[None], layer.size)
    else:
        total = kind.sum(gradients[..., None, :], weights[:, None, None, None])
    return ParameterSums(jax.tree.map(lambda x: x[0], total))


def _gradients(members: Sequence[Member], record: tuple[UseRecord, ...]) -> Float[Array, "N R p"]:
    """Per-example gradients of all parameters of a layer."""
    matrices = gradient_matrices(members, rotated_records(members, record))
    return matrices.reshape(*matrices.shape[:2], -1)


def _use_sums(
    layer: Layer,
    member: Member,
    record: UseRecord,
    weights: Float[Array, " N"],
    input_weights: Float[Array, " N"],
    kfac_approx: KfacApprox,
) -> KroneckerSums:
    claim = member.claim
    kinds = layer.kinds[::-1] if claim.transposed else layer.kinds
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
    if claim.indexed:
        shares = input_weights[:, None, None] * shares
        inputs = kinds[0].sum_rows(a[..., 0], claim.ids.shape[1], shares)
    elif _from_operands(layer, claim, kfac_approx):
        moment = _moment_of_operands(member, record.operands, input_weights, count)
        inputs = kinds[0].of_matrix(moment)
    else:
        inputs = kinds[0].sum(a, input_weights[:, None, None, None])
    if g.shape[1] == 0:
        outputs = kinds[1].identity(count, g.shape[-1])
    else:
        outputs = kinds[1].sum(g, weights[:, None, None, None, None])
    if claim.transposed:
        inputs, outputs = outputs, inputs
    return KroneckerSums(inputs, outputs, count)


def needs_inputs(resolved: Resolved, kfac_approx: KfacApprox) -> bool:
    """Whether sums of a layer are formed from its inputs, and not from what these are made of."""
    claims = [member.claim for member in resolved.members]
    return not all(_from_operands(resolved.layer, claim, kfac_approx) for claim in claims)


def _from_operands(layer: Layer, claim: Claim, kfac_approx: KfacApprox) -> bool:
    if layer.block != "kronecker" or kfac_approx != "expand":
        return False
    if not layer.kinds[claim.transposed].holds_all:
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
    return second


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
    return [x for pair in pairs for kind, side in _sides(*pair) for x in kind.matrices(side)]


@jax.jit
def _blocks(statistics: Statistics, decomposed: Sequence[Eigh]) -> tuple[Block, ...]:
    """Blocks of all layers from the eigendecompositions of `_matrices`."""
    left, blocks = iter(decomposed), []
    for layer, sums in zip(statistics.layers, statistics.sums, strict=True):
        sides = []
        for kind, side in _sides(layer, sums):
            found = list(itertools.islice(left, len(kind.matrices(side))))
            sides.append(kind.eigenbasis(side, found))
        blocks.append(block_of_sides(sides) if sides else _block_of_parameters(layer, sums))
    return tuple(blocks)


def _sides(layer: Layer, sums: Sums) -> list[tuple[Kind, Sum]]:
    """Matrices whose Kronecker product is the layer's block, and their kinds."""
    if isinstance(sums, KroneckerSums):
        factors = _factors(layer, sums)
        if layer.stack == 1:
            factors = jax.tree.map(lambda x: x[0], factors)
        return list(zip(layer.kinds, factors, strict=True))
    if sums is not None and layer.block == "dense":
        return [(layer.kinds[0], sums.gradients)]
    return []


def _block_of_parameters(layer: Layer, sums: Sums) -> Block:
    """The diagonal block of a layer without such matrices."""
    if sums is None:
        return diagonal_block(jnp.zeros(layer.size))
    assert isinstance(sums, ParameterSums)
    return Block((UNROTATED,) * len(layer.kinds), sums.gradients)


def _factors(layer: Layer, sums: KroneckerSums) -> tuple[Sum, Sum]:
    """The two factors of a layer's block; their product is that of the curvature."""
    count = jnp.where(sums.count > 0, sums.count, 1.0)  # a branch never taken has zero sums
    means = jax.tree.map(
        lambda x: x / count.reshape(*count.shape, *[1] * (x.ndim - 2)), sums.inputs
    )
    return nearest_kronecker(layer.kinds, means, sums.outputs)


def nearest_kronecker(
    kinds: tuple[Kind, ...], inputs: Sum, outputs: Sum, iterations: int = 100
) -> tuple[Sum, Sum]:
    """The Kronecker product nearest to ``sum_u inputs[u] kron outputs[u]`` in Frobenius norm.

    The nearest product lies in the span of the summands (Van Loan & Pitsianis 1993), so the power
    iteration runs on U coefficients, with the Gram matrices of the summands. These have no
    negative entries, for the summands are positive semi-definite; so have the coefficients, and
    the product is positive semi-definite too.

    Args:
        kinds: Those of the inputs and of the outputs.
        inputs: Finished sums with an axis over U uses in front.
        outputs: The same of the other side.
        iterations: Steps.
    """
    if len(jax.tree.leaves(inputs)[0]) == 1:
        first: tuple[Sum, Sum] = jax.tree.map(lambda x: x[0], (inputs, outputs))
        return first
    gram_in, gram_out = (
        gram_of_uses(kind, total) for kind, total in zip(kinds, (inputs, outputs), strict=True)
    )

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

    def combined(weights: Float[Array, "stack U"], total: Sum) -> Sum:
        return jax.tree.map(lambda x: jnp.einsum("ku,uk...->k...", weights, x), total)

    return combined(w, inputs), combined(v, outputs)


def gram_of_uses(kind: Kind, total: Sum) -> Float[Array, "stack U U"]:
    """Inner products of the sums of all uses."""
    with_each = jax.vmap(jax.vmap(kind.inner, (None, 0)), (0, None))
    return jnp.moveaxis(with_each(total, total), -1, 0)


def kronecker_factors(statistics: Statistics) -> tuple[list[Sum | None], list[Sum | None]]:
    """Input factors and output factors of all layers; None for those without."""
    pairs = [
        _factors(layer, sums) if isinstance(sums, KroneckerSums) else (None, None)
        for layer, sums in zip(statistics.layers, statistics.sums, strict=True)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def with_kronecker_factors(
    statistics: Statistics, inputs: Sequence[Sum | None], outputs: Sequence[Sum | None]
) -> Statistics:
    """Statistics whose Kronecker layers have these factors."""
    sums: list[Sums] = []
    for layer, old, *new in zip(statistics.layers, statistics.sums, inputs, outputs, strict=True):
        if isinstance(old, KroneckerSums):
            first, second = jax.tree.map(lambda x: x[None], new)
            sums.append(KroneckerSums(first, second, jnp.ones((1, layer.stack))))
        else:
            sums.append(old)
    return replace(statistics, sums=tuple(sums))


def without_cotangents(resolved: Resolved) -> Resolved:
    """A layer to which nothing is pulled back: the factor of cotangents is the identity.

    A layer that a use and a transposed use share has cotangents, and inputs, on either side.
    """
    layer, (inputs, outputs) = resolved.layer, resolved.layer.sides
    where = {member.claim.transposed for member in resolved.members}
    if layer.block != "kronecker" or len(where) > 1:
        return resolved
    sides = ("identity", outputs) if where == {True} else (inputs, "identity")
    return replace(resolved, layer=replace(layer, sides=sides))
