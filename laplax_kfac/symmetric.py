"""Symmetric matrices by tiles: products x^T x, and sums of which only the upper tiles are kept.

A product x^T x needs half the operations of another one of its shape. On a CPU the tiles on and
above the diagonal of a wide one are formed by themselves; sums over batches keep these alone, so
that half the memory is moved with every batch, and are mirrored once, at the end.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_WIDE = 384
"""Width from which tiles pay."""
_TILE = 208
"""Width of a tile: a multiple of the registers of matrix products, and not of a large power of two,
at which the rows of an array share their place in a cache."""
_MOST = 6
"""Most tiles along a side: those of wider matrices are wider."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UpperTiles:
    """A symmetric matrix, or a stack of them.

    Attributes:
        rows: For every row of tiles those on and above the diagonal.
    """

    rows: tuple[tuple[Float[Array, "*stack height width"], ...], ...]


Symmetric = Float[Array, "*stack p p"] | UpperTiles


def _spans(width: int) -> list[tuple[int, int]]:
    """Where the tiles along a side begin and end."""
    if width < _WIDE or jax.default_backend() != "cpu":
        return [(0, width)]
    tile = max(_TILE, width // _MOST // 16 * 16)
    edges = [tile * k for k in range(round(width / tile))]
    return list(itertools.pairwise([*edges, width]))


def self_product(x: Float[Array, "n p"]) -> Symmetric:
    """x^T x at full precision, by tiles if it is wide."""
    parts = [x[:, left:right] for left, right in _spans(x.shape[1])]
    rows = tuple(
        tuple(jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) for b in parts[k:])
        for k, a in enumerate(parts)
    )
    return UpperTiles(rows) if len(parts) > 1 else rows[0][0]


def upper_tiles(matrix: Float[Array, "*stack p p"]) -> Symmetric:
    """The form that `self_product` gives a matrix of this size."""
    spans = _spans(matrix.shape[-1])
    if len(spans) == 1:
        return matrix
    return UpperTiles(
        tuple(
            tuple(matrix[..., top:bottom, left:right] for left, right in spans[k:])
            for k, (top, bottom) in enumerate(spans)
        )
    )


def whole(matrix: Symmetric) -> Float[Array, "*stack p p"]:
    """The matrix with all its entries."""
    return _mirrored(matrix) if isinstance(matrix, UpperTiles) else matrix


@jax.jit
def _mirrored(tiles: UpperTiles) -> Float[Array, "*stack p p"]:
    full = [
        jnp.concatenate([*(r[k - j].mT for j, r in enumerate(tiles.rows[:k])), *row], axis=-1)
        for k, row in enumerate(tiles.rows)
    ]
    return jnp.concatenate(full, axis=-2)
