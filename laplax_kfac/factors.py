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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac.blocks import Block, block_of_sides, diagonal_block, eigh_each, rotate
from laplax_kfac.capture import ParameterRecord, Record, UseRecord
from laplax_kfac.layers import Layer
from laplax_kfac.layout import ParameterSpace
from laplax_kfac.patterns import one_hot
from laplax_kfac.resolve import Claim, Member, Resolved
from laplax_kfac.symmetric import Symmetric, Tiled, bordered, self_product, upper_tiles, whole

KfacApprox = Literal["expand", "reduce"]
KFAC_APPROXIMATIONS = ("expand", "reduce")
_HIGHEST = jax.lax.Precision.HIGHEST
_FORMED = 2**23
"""Numbers that are formed at once from the records of several examples."""
_STORED = 200
"""Multiply-adds of a large product in the time of writing a number to memory and reading it."""

_UNROTATED = Block((None, None), jnp.ones(()))

RotatedUses = tuple[tuple[Array, Array], ...]
"""(inputs, cotangents) of every use of a layer, in the eigenbases of its block."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerSums:
    """Sums of one Kronecker layer, with a leading axis over its U uses.

    Attributes:
        inputs: A, shape (U, stack, rows, rows), or (U, stack, rows) if it is diagonal.
        outputs: B, shape (U, stack, out, out), or (U, stack, out) if it is diagonal.
        count: M, shape (U, stack).
    """

    inputs: Float[Array, "U stack rows *rows"]
    outputs: Float[Array, "U stack out *out"]
    count: Float[Array, "U stack"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ParameterSums:
    """Sums of a probed layer: of g g^T (p, p) for a dense block, of g^2 (p,) for a diagonal."""

    gradients: Float[Array, "p *p"]


Sums = KroneckerSums | ParameterSums | None


@jax.tree_util.register_dataclass
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
    return jax.tree.unflatten(treedef, [whole(leaf) for leaf in leaves])


def _is_tiled(x: Any) -> bool:
    return isinstance(x, Tiled)


def batch_sums(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    kfac_approx: Callable[[Layer], KfacApprox] = lambda _: "expand",
) -> tuple[Sums, ...]:
    """Sums of every layer over one batch of records, whose leaves have a leading axis N.

    Wide matrices are given by their upper tiles; see `mirrored`.
    """
    return tuple(
        _layer_sums(r, record, weights, kfac_approx(r.layer))
        for r, record in zip(resolved, records, strict=True)
    )


def _layer_sums(
    resolved: Resolved, record: Record, weights: Float[Array, " N"], kfac_approx: KfacApprox
) -> Sums:
    if record is None:
        return None
    if isinstance(record, ParameterRecord):
        return _probed_sums(resolved.layer, _accumulate(record.gradients), weights)
    if resolved.layer.block == "dense":
        return _probed_sums(resolved.layer, _gradients(resolved.members, record), weights)
    if resolved.layer.block == "diagonal":
        return ParameterSums(_second_moments(resolved, record, weights, _UNROTATED))
    sums = [
        _use_sums(resolved.layer, m, r, weights, kfac_approx)
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
    kfac_approx: KfacApprox,
) -> KroneckerSums:
    claim = member.claim
    diagonal = layer.diagonal[::-1] if claim.transposed else layer.diagonal
    active, g = _accumulate(record.active), _accumulate(record.gradients)
    a = record.inputs if claim.indexed else _accumulate(record.inputs)
    weights = weights.astype(g.dtype)
    shares, counts = jnp.ones_like(active), active
    if kfac_approx == "reduce":
        positions = jnp.maximum(jnp.sum(active, axis=1, keepdims=True), 1.0)
        g = jnp.sum(g, axis=2, keepdims=True)
        if claim.indexed:
            shares = jnp.sum(_same_row(a[..., 0]), axis=2) / positions**2
        else:
            a = jnp.sum(a, axis=1, keepdims=True) / positions[..., None]
        counts = jnp.max(active, axis=1, keepdims=True)
    count = jnp.einsum("n,nsk->k", weights, counts.astype(weights.dtype))
    inputs: Any
    if claim.indexed:
        inputs = sum_into_rows(claim.ids.shape[1], a[..., 0], weights[:, None, None] * shares)
    elif kfac_approx == "expand" and _has_moments(claim) and not diagonal[0]:
        inputs = _moment_of_operands(member, record.operands, weights, count)
    else:
        inputs = _second_moment(a, weights[:, None, None, None], diagonal=diagonal[0])
    if g.shape[1] == 0:
        outputs = _identity(count, g.shape[-1], diagonal=diagonal[1])
    else:
        outputs = _second_moment(g, weights[:, None, None, None, None], diagonal=diagonal[1])
    if claim.transposed:
        inputs, outputs = outputs, inputs
    return KroneckerSums(inputs, outputs, count)


def _second_moment(
    x: Float[Array, "*n stack p"], weights: Float[Array, "..."], *, diagonal: bool
) -> Any:
    """Weighted sum of x x^T for every stack index, or its diagonal."""
    if diagonal:
        return jnp.sum(weights * x * x, axis=tuple(range(x.ndim - 2)))
    return _stacked_gram(x, weights)


def _has_moments(claim: Claim) -> bool:
    return claim.moments is not None and claim.input_scale is None


def _moment_of_operands(
    member: Member,
    operands: tuple[Array, ...],
    weights: Float[Array, " N"],
    count: Float[Array, " stack"],
) -> Symmetric:
    """Weighted sum of a a^T for every stack index, where the inputs a need not be formed."""
    assert member.claim.moments is not None
    second, first = member.claim.moments(tuple(map(_accumulate, operands)), weights)
    if member.joint_bias is not None:
        corner = member.joint_bias**2 * count[:, None]
        border = jnp.concatenate([member.joint_bias * first, corner], axis=-1)
        second = bordered(second, border)
    return second if isinstance(second, Tiled) else upper_tiles(second)


def _same_row(rows: Int[Array, "N S stack"]) -> Float[Array, "N S S stack"]:
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


def _accumulate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


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


# -- eigenvalue correction ---------------------------------------------------------------------


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
        _second_moments(r, record, weights, block)
        if isinstance(record, tuple) and r.layer.block == "kronecker"
        else jnp.zeros_like(block.eigenvalues)
        for r, record, block in zip(resolved, records, blocks, strict=True)
    )


def _second_moments(
    resolved: Resolved, record: tuple[UseRecord, ...], weights: Float[Array, " N"], block: Block
) -> Float[Array, "..."]:
    if is_lookup(resolved):
        rows, gradients, shares = jax.vmap(lambda r: lookup_gradients(r, block))(record[0])
        squares = jnp.sum(gradients**2, axis=1) * (shares * weights[:, None, None])[..., None]
        moments = sum_into_rows(resolved.layer.rows, rows, squares)
        return moments.reshape(resolved.layer.shape)
    members, layer = resolved.members, resolved.layer
    weights = _accumulate(weights)
    if _in_pairs(resolved, record):
        uses = rotated_records(members, record, block)
        numbers = _num_positions(record) ** 2 * layer.stack * (layer.rows + layer.out_features)
        moments = _sum_in_parts(_moments_by_pairs, (uses, weights), numbers)
        return moments.reshape(layer.shape)
    before, after = _rotations(layer, record, block)

    def by_matrices(uses: RotatedUses, weights: Float[Array, " n"]) -> Array:
        matrices = rotate(after, gradient_matrices(members, uses))
        return jnp.einsum("n,nrkio->kio", weights, matrices**2, precision=_HIGHEST)

    uses = rotated_records(members, record, before)
    numbers = layer.size * record[0].gradients.shape[1]
    return _sum_in_parts(by_matrices, (uses, weights), numbers).reshape(layer.shape)


def _in_pairs(resolved: Resolved, record: tuple[UseRecord, ...]) -> bool:
    """Whether to multiply pairs of positions out, and not the positions' outer products.

    ``sum_r G_rio^2 = sum_tu (a_ti a_ui) (sum_r g_rto g_ruo)`` is one product over pairs, for all
    examples and columns: at S^2 multiply-adds an entry of the weight instead of R S, and no numbers
    of the size of the weight. With one position the pairs are squares.
    """
    if any(m.claim.transposed for m in resolved.members):
        return False
    layer, columns = resolved.layer, record[0].gradients.shape[1]
    positions = _num_positions(record)
    entries = layer.rows * layer.out_features
    pairs = positions**2 * (entries + _STORED * (layer.rows + 2 * columns * layer.out_features))
    return pairs <= columns * entries * (positions + 3 * _STORED)


def _moments_by_pairs(
    uses: RotatedUses, weights: Float[Array, " n"]
) -> Float[Array, "stack rows out"]:
    a = jnp.concatenate([a for a, _ in uses], axis=1)
    g = jnp.concatenate([g for _, g in uses], axis=2)
    inputs = weights[:, None, None, None, None] * a[:, :, None] * a[:, None]
    outputs = jnp.sum(g[:, :, :, None] * g[:, :, None], axis=1)
    moments = jnp.einsum("ntuki,ntuko->kio", inputs, outputs, precision=_HIGHEST)
    return jnp.maximum(moments, 0.0)  # sums of squares, up to rounding


def _rotations(layer: Layer, record: tuple[UseRecord, ...], block: Block) -> tuple[Block, Block]:
    """What to rotate first, inputs and cotangents, and what later, matrices that are smaller."""
    positions, columns = _num_positions(record), record[0].gradients.shape[1]
    fewer = positions < columns * layer.out_features, positions < layer.rows
    pairs = list(zip(block.basis, fewer, strict=True))
    before = tuple(basis if first else None for basis, first in pairs)
    after = tuple(None if first else basis for basis, first in pairs)
    return replace(block, basis=before), replace(block, basis=after)


def _sum_in_parts(
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

    def add(total: Array, part: tuple[PyTree, ...]) -> tuple[Array, None]:
        return total + function(*part), None

    split_examples = jax.tree.map(split, examples)
    first = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], split_examples))
    return jax.lax.scan(add, jnp.zeros(first.shape, first.dtype), split_examples)[0]


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
    g = _in_basis(_accumulate(record.gradients), block.basis[1])
    same = _same_row(rows[None])[0].astype(g.dtype)
    gradients = jnp.einsum("stk,rtko->rsko", same, g, precision=_HIGHEST)
    return rows, gradients, 1.0 / jnp.sum(same, axis=1)


def _num_positions(record: tuple[UseRecord, ...]) -> int:
    """Over all uses: per-example gradients of a layer are sums of so many outer products a g^T."""
    return sum(use.inputs.shape[-3] for use in record)


def rotated_records(
    members: Sequence[Member], record: tuple[UseRecord, ...], block: Block = _UNROTATED
) -> RotatedUses:
    """Inputs and cotangents of every use in the eigenbases of the layer's block, if given.

    A transposed use has its inputs in the layer's output space, and the cotangents in its inputs'.
    """
    rotated = []
    for member, use in zip(members, record, strict=True):
        bases = block.basis[::-1] if member.claim.transposed else block.basis
        g = _accumulate(use.gradients)
        if member.claim.indexed:
            a = one_hot(use.inputs, member.claim.ids.shape[1], g.dtype)
        else:
            a = _accumulate(use.inputs)
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


# -- optimal factors ---------------------------------------------------------------------------


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
        rows, gradients, shares = jax.vmap(lambda r: lookup_gradients(r, _UNROTATED))(record[0])
        shares = (rows >= 0) * shares * weights[:, None, None]
        if side == 0:
            sizes = jnp.sum(_form(gradients, factor, diagonal=contracted), axis=1)
            return sum_into_rows(layer.rows, rows, sizes * shares)
        shares = shares * factor[jnp.arange(layer.stack), rows]
        return whole(_second_moment(gradients, shares[:, None, ..., None], diagonal=kept))
    if _num_positions(record) == 1:  # G = a g^T
        a, g = _accumulate(record[0].inputs), _accumulate(record[0].gradients)
        if side == 0:
            sizes = jnp.sum(_form(g, factor, diagonal=contracted), axis=1)
            return whole(
                _second_moment(a, (weights[:, None, None] * sizes)[..., None], diagonal=kept)
            )
        sizes = weights[:, None, None] * _form(a, factor, diagonal=contracted)
        return whole(_second_moment(g, sizes[:, None, ..., None], diagonal=kept))

    def by_matrices(uses: RotatedUses, weights: Float[Array, " n"]) -> Array:
        matrices = gradient_matrices(resolved.members, uses)  # (n, R, stack, rows, out)
        matrices = matrices if side == 0 else matrices.swapaxes(-1, -2)
        products = weights[:, None, None, None, None] * matrices
        if contracted:
            products = products * factor[:, None]
        else:
            products = jnp.matmul(products, factor, precision=_HIGHEST)
        equation = "nrkip,nrkip->ki" if kept else "nrkip,nrkjp->kij"
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
    columns, positions = record[0].gradients.shape[1], _num_positions(record)
    numbers = {
        by_matrices: 2 * columns * layer.size,
        by_pairs: positions * layer.stack * (positions + layer.rows + columns * layer.out_features),
    }
    function = by_pairs if _contracts_in_pairs(resolved, record) else by_matrices
    return _sum_in_parts(function, (uses, weights.astype(factor.dtype)), numbers[function])


def _contracts_in_pairs(resolved: Resolved, record: tuple[UseRecord, ...]) -> bool:
    """Whether to go over pairs of positions, and not over gradients: what takes less."""
    if any(m.claim.transposed for m in resolved.members):
        return False
    layer, columns = resolved.layer, record[0].gradients.shape[1]
    positions, rows, out = _num_positions(record), layer.rows, layer.out_features
    widths = rows + columns * out
    pairs = positions * (rows**2 + columns * out**2 + positions * (widths + _STORED))
    sizes = positions + rows + out + 2 * _STORED
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


# -- finalize ----------------------------------------------------------------------------------


def finalize(statistics: Statistics) -> tuple[Block, ...]:
    """Blocks of every layer from the sums: one eigendecomposition a factor.

    Raises:
        ValueError: If the statistics have seen no data.
    """
    require_data(statistics)
    return _blocks(statistics)


def require_data(statistics: Statistics) -> None:
    """Refuse statistics that have seen no data.

    Raises:
        ValueError: If they have not.
    """
    if not statistics.layers:
        msg = "`finalize` needs statistics of some data; call `update` first."
        raise ValueError(msg)


@jax.jit
def _blocks(statistics: Statistics) -> tuple[Block, ...]:
    pairs = list(zip(statistics.layers, statistics.sums, strict=True))
    sides = [_sides(*pair) for pair in pairs]
    matrices = [x for of_layer in sides for x, diagonal in of_layer if not diagonal]
    decomposed = iter(eigh_each(matrices))
    return tuple(
        block_of_sides([(x, None) if diagonal else next(decomposed) for x, diagonal in of_layer])
        if of_layer
        else _block_of_parameters(*pair)
        for of_layer, pair in zip(sides, pairs, strict=True)
    )


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

    def step(_: int, w: Float[Array, "stack U"]) -> Float[Array, "stack U"]:
        v = unit(jnp.einsum("kuv,kv->ku", gram_in, w), gram_out)
        return unit(jnp.einsum("kuv,kv->ku", gram_out, v), gram_in)

    start = unit(jnp.ones(gram_in.shape[:2], gram_in.dtype), gram_in)
    w = jax.lax.fori_loop(0, iterations, step, start)
    v = jnp.einsum("kuv,kv->ku", gram_in, w)
    return jnp.einsum("ku,uk...->k...", w, inputs), jnp.einsum("ku,uk...->k...", v, outputs)


def _gram_of_uses(factors: Float[Array, "U stack p *p"]) -> Float[Array, "stack U U"]:
    flat = factors.reshape(*factors.shape[:2], -1)
    return jnp.einsum("ukp,vkp->kuv", flat, flat, precision=_HIGHEST)
