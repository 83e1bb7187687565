"""Sums of curvatures: of several tasks, or of a curvature and the precision that came before it.

The sum of two Kronecker products is none, and has no eigenbasis of that form. The rules, by kind:

* blocks in the same basis, diagonal blocks and dense blocks are added exactly;
* sides of two kinds get the least general kind that contains both;
* otherwise, a Kronecker block gets the eigenbasis of the Kronecker product nearest to the exact sum
  (Van Loan & Pitsianis 1993), and in it the diagonal of the exact sum as its eigenvalues.

Of all matrices that are diagonal in that basis, the nearest Kronecker product among them, this is
the one nearest to the exact sum in Frobenius norm; its trace is the exact one; and it is exact
where both blocks share a basis, or one is a multiple of the identity. It holds for any eigenvalues:
those of KFAC, corrected ones (EKFAC), and those with a prior precision added.
"""

from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laplax_kfac import jaxprs
from laplax_kfac.arguments import no_type_check, shown
from laplax_kfac.bases import Basis, Side, common_kind
from laplax_kfac.blocks.blocks import Block, BlockDiagonal, block_of_sides, rotate_back
from laplax_kfac.parsing.layer import Layer

Matrix = TypeVar("Matrix", bound=BlockDiagonal)
_ITERATIONS = 50


@no_type_check
def merge(first: Matrix, second: BlockDiagonal) -> Matrix:
    """The sum of two curvatures of one model: of all data of both, with no prior in it.

    For continual learning: the curvature of all tasks so far is ``merge(total, new)``, its
    posterior with a prior precision is the prior of the next task. Products with the exact sum
    need no merging: they are the sums of the products with each (`Curvature.mv`,
    `Curvature.quadratic_form`).

    Exact for blocks in the same basis, for dense and for diagonal ones. Any other Kronecker block
    of the sum has the eigenbasis of the nearest Kronecker product, and the exact diagonal in it:
    as near to the sum as that product, or nearer, with the exact trace. Works under ``jit``.

    States of an `Accumulator` are merged by its own method, exactly: they are of one model at the
    same parameters, and factors are summed before their product is taken.

    Args:
        first: A curvature, from `kfac`, `ekfac`, or ``accumulator(...).finalize``.
        second: Another one, of the same layers; at other parameters, as a rule.

    Raises:
        TypeError: If one is no curvature.
        ValueError: If the layers differ, the losses, or the Fisher types.
    """
    require_curvature("first", first)
    require_curvature("second", second)
    degrees = [getattr(curvature, "degree", 1) for curvature in (first, second)]
    if degrees[0] != degrees[1]:
        msg = (
            "`merge` takes two curvatures of one Fisher type; found an empirical Fisher matrix, "
            "which scales with the square of the loss, and one that scales with the loss: no noise "
            "variance could scale their sum. Fit both with the same `fisher_type`."
        )
        raise ValueError(msg)
    for what in ("loss", "fisher_type"):
        ours, theirs = (getattr(getattr(m, "origin", None), what, "") for m in (first, second))
        if ours and theirs and ours != theirs:
            msg = (
                f"`first` and `second` must be curvatures of one `{what}`, found {ours!r} and "
                f"{theirs!r}: their sum is the curvature of neither. Fit both with the same."
            )
            raise ValueError(msg)
    return add(first, second)


@no_type_check
def require_curvature(name: str, value: object) -> None:
    """Refuse what is no curvature.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(value, BlockDiagonal):
        return
    hint = ""
    if hasattr(value, "precision"):
        hint = " A posterior holds its prior, too: pass the curvature that it was made of."
    elif hasattr(value, "sums"):
        hint = " Of a state of an accumulator, `finalize` makes one."
    elif isinstance(value, tuple):
        hint = " `laplax.laplace` returns a function and the curvature: pass the second."
    msg = (
        f"`{name}` must be a curvature, as `kfac`, `ekfac` and `accumulator(...).finalize` return "
        f"it; found {shown(value)}.{hint}"
    )
    raise TypeError(msg)


def add(first: Matrix, second: BlockDiagonal) -> Matrix:
    """The sum of two matrices on the same layers, block by block; see the module for its rules.

    Raises:
        ValueError: If the layers differ.
    """
    ours, theirs = ([_kept(layer) for layer in m.layers] for m in (first, second))
    if ours != theirs or first.space != second.space:
        msg = (
            "Curvatures that are added must be of the same layers; found "
            f"{[layer.name for layer in first.layers]} and "
            f"{[layer.name for layer in second.layers]}, which differ in names, blocks or places: "
            "fit both with the same model and options."
        )
        raise ValueError(msg)
    pairs = zip(first.blocks, second.blocks, strict=True)
    blocks = tuple(add_blocks(a, b) for a, b in pairs)
    layers = tuple(map(_with_kinds_of, first.layers, blocks))
    return replace(first, blocks=blocks, layers=layers)


def _kept(layer: Layer) -> Layer:
    """What two layers must share: not the number of positions, which the data decide."""
    return replace(layer, positions=0, reason="", sides=("dense", "dense"))


def _with_kinds_of(layer: Layer, block: Block) -> Layer:
    """A layer with the kinds that the sides of its block have."""
    if layer.block != "kronecker":
        return layer
    inputs, outputs = (basis.kind.text for basis in block.sides)
    return replace(layer, sides=(inputs, outputs))


def add_blocks(first: Block, second: Block) -> Block:
    """The sum of two blocks; see the module for its rules."""
    first, second = _promoted(first, second), _promoted(second, first)
    if all(map(_same, first.sides, second.sides)):
        return replace(first, eigenvalues=first.eigenvalues + second.eigenvalues)
    if len(first.sides) == 1:
        return _add_matrices(first, second)
    return _add_kronecker(first, second)


def _promoted(block: Block, other: Block) -> Block:
    """A block with the kinds of sides that contain those of another block, too."""
    sizes = block.eigenvalues.shape[-len(block.sides) :]
    sides = tuple(
        common_kind(mine.kind, theirs.kind).promote(mine, size)
        for mine, theirs, size in zip(block.sides, other.sides, sizes, strict=True)
    )
    return replace(block, sides=sides)


def _same(first: Basis, second: Basis) -> bool:
    """Whether two bases of one kind are known to be the same."""
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    if all(x is y for x, y in pairs):
        return True
    known = not jaxprs.is_traced(pairs)
    return known and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _eigenbasis(
    bases: tuple[Basis, Basis], values: tuple[Float[Array, "..."], Float[Array, "..."]]
) -> Side:
    """Of ``sum_k U_k diag(values_k) U_k^T``, for two bases of one kind."""
    matrices = [basis.matrix(x) for basis, x in zip(bases, values, strict=True)]
    return bases[0].kind.decompose(jax.tree.map(jnp.add, *matrices))


@jax.jit
def _add_matrices(first: Block, second: Block) -> Block:
    values = first.eigenvalues, second.eigenvalues
    return block_of_sides([_eigenbasis((first.sides[0], second.sides[0]), values)])


@jax.jit
def _add_kronecker(first: Block, second: Block) -> Block:
    """Power iteration for the nearest product A kron B, on coefficients.

    With U_k and V_k the bases of the summands, A is ``sum_k U_k diag(c_k) U_k^T``, and B the same
    with V_k and d_k: each half of a step takes ``c_k = eigenvalues_k @ diag(V_k^T B V_k)``. None
    of these numbers is negative, so that A and B are positive semi-definite.
    """
    values = first.eigenvalues, second.eigenvalues
    # Squares of the inner products of both bases' vectors, for either side.
    inputs, outputs = (u.times(v).squared() for u, v in zip(first.sides, second.sides, strict=True))

    def outputs_given(c: tuple[Array, Array]) -> tuple[Array, Array]:
        p = _diagonals(inputs, c)
        return _unit([jnp.einsum("...i,...ij->...j", p[k], values[k]) for k in range(2)])

    def inputs_given(d: tuple[Array, Array]) -> tuple[Array, Array]:
        q = _diagonals(outputs, d)
        return _unit([jnp.einsum("...ij,...j->...i", values[k], q[k]) for k in range(2)])

    def step(_: Int[Array, ""], c: tuple[Array, Array]) -> tuple[Array, Array]:
        return inputs_given(outputs_given(c))

    start = _unit([jnp.sum(x, axis=-1) for x in values])
    c = jax.lax.fori_loop(0, _ITERATIONS, step, start)
    bases = (
        _eigenbasis((first.sides[0], second.sides[0]), c)[1],
        _eigenbasis((first.sides[1], second.sides[1]), outputs_given(c))[1],
    )
    total = jnp.zeros_like(values[0])
    for block in (first, second):
        overlaps = (u.times(v).squared() for u, v in zip(bases, block.sides, strict=True))
        total = total + rotate_back(Block(tuple(overlaps), values[0]), block.eigenvalues)
    return Block(bases, total)


def _unit(coefficients: list[Array]) -> tuple[Array, Array]:
    """Coefficients of a matrix, scaled so that the largest is one: nothing overflows."""
    first, second = coefficients
    largest = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (first, second)))
    largest = jnp.where(largest > 0, largest, 1.0)
    return first / largest, second / largest


def _diagonals(
    overlap: Basis, coefficients: tuple[Float[Array, "*stack n"], Float[Array, "*stack n"]]
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n"]]:
    """Diagonals of ``sum_k U_k diag(c_k) U_k^T`` in each of the two bases."""
    c, d = coefficients
    return c + overlap.rotate_back(d), overlap.rotate(c) + d
