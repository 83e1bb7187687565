"""Sums of curvatures: of several tasks, or of a curvature and the precision that came before it.

The sum of two Kronecker products is none, and has no eigenbasis of that form. Three rules, by kind:

* blocks in the same basis, diagonal blocks and dense blocks are added exactly;
* otherwise, a Kronecker block gets the eigenbasis of the Kronecker product nearest to the exact sum
  (Van Loan & Pitsianis 1993), and in it the diagonal of the exact sum as its eigenvalues.

Of all matrices that are diagonal in that basis, the nearest Kronecker product among them, this is
the one nearest to the exact sum in Frobenius norm; its trace is the exact one; and it is exact
where both blocks share a basis, or one is a multiple of the identity. It holds for any eigenvalues:
those of KFAC, corrected ones (EKFAC), and those with a prior precision added.
"""

from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laplax_kfac.arguments import no_type_check
from laplax_kfac.blocks.blocks import Block, BlockDiagonal, dense_block, eigh
from laplax_kfac.parsing.layer import Layer

Matrix = TypeVar("Matrix", bound=BlockDiagonal)
_HIGHEST = jax.lax.Precision.HIGHEST
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
        ValueError: If the layers differ.
    """
    for curvature in (first, second):
        if not isinstance(curvature, BlockDiagonal):
            msg = (
                "`merge` takes two curvatures, as `kfac`, `ekfac` and `accumulator(...).finalize` "
                f"return them; found {type(curvature).__name__}. States of an accumulator have "
                "its own `merge`; a posterior holds its prior, so merge curvatures and make one "
                "posterior of the sum."
            )
            raise TypeError(msg)
    return add(first, second)


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
    return replace(first, blocks=tuple(add_blocks(a, b) for a, b in pairs))


def _kept(layer: Layer) -> Layer:
    """What two layers must share: not the number of positions, which the data decide."""
    return replace(layer, positions=0, reason="")


def add_blocks(first: Block, second: Block) -> Block:
    """The sum of two blocks; see the module for its rules."""
    if all(_same(a, b) for a, b in zip(first.basis, second.basis, strict=True)):
        return replace(first, eigenvalues=first.eigenvalues + second.eigenvalues)
    if len(first.basis) == 1:
        return _add_dense(first, second)
    return _add_kronecker(first, second)


def _same(first: Array | None, second: Array | None) -> bool:
    """Whether two bases are known to be the same."""
    if first is second:
        return True
    known = not any(x is None or isinstance(x, jax.core.Tracer) for x in (first, second))
    return known and np.array_equal(np.asarray(first), np.asarray(second))


@jax.jit
def _add_dense(first: Block, second: Block) -> Block:
    return dense_block(
        _in_columns(first.basis[0], first.eigenvalues)
        + _in_columns(second.basis[0], second.eigenvalues)
    )


def _in_columns(basis: Any, eigenvalues: Float[Array, "*stack n"]) -> Float[Array, "*stack n n"]:
    if basis is None:
        return eigenvalues[..., None] * jnp.eye(eigenvalues.shape[-1], dtype=eigenvalues.dtype)
    columns = basis * eigenvalues[..., None, :]
    return jnp.matmul(columns, basis.swapaxes(-1, -2), precision=_HIGHEST)


@jax.jit
def _add_kronecker(first: Block, second: Block) -> Block:
    """Power iteration for the nearest product A kron B, on coefficients.

    With U_k and V_k the bases of the summands, A is ``sum_k U_k diag(c_k) U_k^T``, and B the same
    with V_k and d_k: each half of a step takes ``c_k = eigenvalues_k @ diag(V_k^T B V_k)``. None
    of these numbers is negative, so that A and B are positive semi-definite.
    """
    values = first.eigenvalues, second.eigenvalues
    inputs, outputs = (_overlap(first.basis[k], second.basis[k]) for k in range(2))

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
        _eigenbasis(first.basis[0], second.basis[0], c),
        _eigenbasis(first.basis[1], second.basis[1], outputs_given(c)),
    )
    total = jnp.zeros_like(values[0])
    for block in (first, second):
        left, right = (_overlap(u, v) for u, v in zip(bases, block.basis, strict=True))
        part = block.eigenvalues
        if left is not None:
            part = jnp.matmul(left, part, precision=_HIGHEST)
        if right is not None:
            part = jnp.matmul(part, right.swapaxes(-1, -2), precision=_HIGHEST)
        total = total + part
    return Block(bases, total)


def _unit(coefficients: list[Array]) -> tuple[Array, Array]:
    """Coefficients of a matrix, scaled so that the largest is one: nothing overflows."""
    first, second = coefficients
    largest = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (first, second)))
    largest = jnp.where(largest > 0, largest, 1.0)
    return first / largest, second / largest


def _overlap(u: Any, v: Any) -> Float[Array, "*stack n n"] | None:
    """Squares of the inner products of two bases' vectors; None if both are the identity."""
    if u is None or v is None:
        if u is None and v is None:
            return None
        return (v if u is None else u.swapaxes(-1, -2)) ** 2
    return jnp.matmul(u.swapaxes(-1, -2), v, precision=_HIGHEST) ** 2


def _diagonals(
    overlap: Float[Array, "*stack n n"] | None, coefficients: Any
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n"]]:
    """Diagonals of ``sum_k U_k diag(c_k) U_k^T`` in each of the two bases."""
    c, d = coefficients
    if overlap is None:
        return c + d, c + d
    there = jnp.einsum("...ij,...j->...i", overlap, d, precision=_HIGHEST)
    back = jnp.einsum("...ij,...i->...j", overlap, c, precision=_HIGHEST)
    return c + there, back + d


def _eigenbasis(u: Any, v: Any, coefficients: Any) -> Float[Array, "*stack n n"] | None:
    if u is None and v is None:
        return None
    return eigh(_in_columns(u, coefficients[0]) + _in_columns(v, coefficients[1]))[1]
