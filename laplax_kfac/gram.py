"""Symmetric matrices by tiles: products x^T x, and sums of which only the upper tiles are kept.

A product x^T x needs half the operations of another one of its shape. On a CPU the tiles on and
above the diagonal of a wide one are formed by themselves; sums over batches keep these alone, so
that half the memory is moved with every batch, and are mirrored once, at the end.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from laplax_kfac import jaxprs, machine, pytrees


@pytrees.register
@dataclass(frozen=True)
class UpperTiles:
    """A symmetric matrix, or a stack of them.

    Attributes:
        rows: For every row of tiles those on and above the diagonal.
    """

    rows: tuple[tuple[Float[Array, "*stack _ _"], ...], ...]


@pytrees.register
@dataclass(frozen=True)
class SharedTiles:
    """A symmetric matrix, or a stack of them, of square tiles that are sums of fewer products.

    Attributes:
        products: The products, k of them in an array.
        sums: For every row of tiles those on and below the diagonal: the sign and the number, in
            the order of the arrays, of every product in the sum.
        border: One more column, with its last entry on the diagonal, if there is one.
    """

    products: tuple[Float[Array, "*stack t _ t"], ...]
    sums: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] = field(metadata={"static": True})
    border: Float[Array, "*stack _"] | None = None


Tiled = UpperTiles | SharedTiles
Symmetric = Float[Array, "... _ _"] | Tiled


def _spans(width: int) -> list[tuple[int, int]]:
    """Where the tiles along a side begin and end."""
    if width < machine.MACHINE.wide or not machine.on_cpu():
        return [(0, width)]
    tile = max(machine.MACHINE.tile, width // machine.MACHINE.most_tiles // 16 * 16)
    edges = [tile * k for k in range(round(width / tile))]
    return list(itertools.pairwise([*edges, width]))


def self_product(x: Float[Array, "n p"]) -> Symmetric:
    """x^T x at full precision, by tiles if it is wide."""
    width = x.shape[1]
    if width in machine.MACHINE.slow_widths and machine.on_cpu():
        wider = jnp.pad(x, ((0, 0), (0, 1)))
        return jnp.matmul(wider.T, wider, precision=jax.lax.Precision.HIGHEST)[:width, :width]
    parts = [x[:, left:right] for left, right in _spans(x.shape[1])]
    rows = tuple(
        tuple(jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) for b in parts[k:])
        for k, a in enumerate(parts)
    )
    return UpperTiles(rows) if len(parts) > 1 else rows[0][0]


@jax.custom_jvp
def weighted_product(x: Float[Array, "*n p"], weights: Float[Array, "..."]) -> Symmetric:
    """Weighted sum of x x^T over all leading axes; the weights are not negative.

    Both operands of the product are one array, with the square roots of the weights multiplied in:
    of a tall x a second copy would take longer than the product.
    """
    return self_product((jnp.sqrt(weights) * x).reshape(-1, x.shape[-1]))


@weighted_product.defjvp
def _weighted_product_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Symmetric, Symmetric]:
    """The derivative is that of the plain formula, for a root has none at a weight of zero."""

    def plain(x: Array, weights: Array) -> Symmetric:
        y, x = ((v * x).reshape(-1, x.shape[-1]) for v in (weights, 1.0))
        return upper_tiles(jnp.matmul(y.T, x, precision=jax.lax.Precision.HIGHEST))

    return weighted_product(*primals), jax.jvp(plain, primals, tangents)[1]


def upper_tiles(matrix: Symmetric) -> Symmetric:
    """The form that `self_product` gives a matrix of this size."""
    matrix = whole(matrix)
    spans = _spans(matrix.shape[-1])
    if len(spans) == 1:
        return matrix
    return UpperTiles(
        tuple(
            tuple(matrix[..., top:bottom, left:right] for left, right in spans[k:])
            for k, (top, bottom) in enumerate(spans)
        )
    )


def first_rows(matrix: Symmetric) -> list[Float[Array, "..."]]:
    """The first row of a matrix in any form, or of the products that its tiles are sums of.

    In a sum of products x x^T it is NaN or infinite wherever an x is, for zero times NaN is NaN.
    """
    if isinstance(matrix, UpperTiles):
        return [tile[..., 0, :] for tile in matrix.rows[0]]
    if isinstance(matrix, SharedTiles):
        border = [] if matrix.border is None else [matrix.border]
        return [*(x[..., 0, :, :] for x in matrix.products), *border]
    return [matrix[..., 0, :]]


def bordered(matrix: Symmetric, border: Float[Array, "*stack _"]) -> Symmetric:
    """A matrix with one more column and row; the last entry is that on the diagonal."""
    if isinstance(matrix, SharedTiles):
        return replace(matrix, border=border)
    return _bordered(whole(matrix), border)


def _bordered(
    matrix: Float[Array, "*stack p p"], border: Float[Array, "*stack p+1"]
) -> Float[Array, "*stack p+1 p+1"]:
    wider = jnp.concatenate([matrix, border[..., :-1, None]], axis=-1)
    return jnp.concatenate([wider, border[..., None, :]], axis=-2)


def whole(matrix: Symmetric) -> Float[Array, "*stack p p"]:
    """The matrix with all its entries."""
    if isinstance(matrix, UpperTiles):
        return _mirrored(matrix)
    return _summed(matrix) if isinstance(matrix, SharedTiles) else matrix


@jax.jit
def _mirrored(tiles: UpperTiles) -> Float[Array, "*stack p p"]:
    full = [
        jnp.concatenate([*(r[k - j].mT for j, r in enumerate(tiles.rows[:k])), *row], axis=-1)
        for k, row in enumerate(tiles.rows)
    ]
    return jnp.concatenate(full, axis=-2)


def _summed(tiles: SharedTiles) -> Float[Array, "*stack p p"]:
    """Put together by NumPy where it can be, which has nothing to compile."""
    xp: Any = jnp if jaxprs.is_traced(tiles) else np
    arrays = [x if xp is jnp else np.asarray(x) for x in tiles.products]
    products = [x[..., k, :] for x in arrays for k in range(x.shape[-2])]

    def tile(terms: Sequence[tuple[int, int]]) -> Any:
        signed = [products[n] if sign > 0 else -products[n] for sign, n in terms]
        return functools.reduce(xp.add, signed) if signed else xp.zeros_like(products[0])

    rows = [[tile(terms) for terms in row] for row in tiles.sums]
    for row in rows:  # rounding differs across the diagonal
        row[-1] = (row[-1] + row[-1].swapaxes(-1, -2)) / 2
    full = [
        [*row, *(below[k].swapaxes(-1, -2) for below in rows[k + 1 :])]
        for k, row in enumerate(rows)
    ]
    if tiles.border is not None:
        border = tiles.border if xp is jnp else np.asarray(tiles.border)
        size = products[0].shape[-1]
        for k, row in enumerate(full):
            row.append(border[..., k * size : (k + 1) * size, None])
        full.append([border[..., None, :]])
    return jnp.asarray(xp.concatenate([xp.concatenate(row, axis=-1) for row in full], axis=-2))
