"""Patches that slide over images: their entries, and sums of products of these.

The second moment of patches has a block for every pair (i, j) of a patch's rows.
Patches that overlap have entries in common, and so have the products of their rows: those of rows
y and y + d of the images serve all pairs of a patch's rows at distance d. So the second moment of
all patches takes a fraction of the work, and of the memory, of a product of the patches themselves.

Images are (examples, *space, channels). The entries of a patch are in the order of its places,
then channels.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from laplax_kfac import machine
from laplax_kfac.caches import Cache
from laplax_kfac.gram import UpperTiles, whole

_HIGHEST = lax.Precision.HIGHEST


@dataclass(frozen=True)
class Axis:
    """Patches along one axis of an image.

    Attributes:
        size: Entries of the image.
        patch: Entries of a patch.
        stride: Steps from one patch to the next.
        padding: Entries added before and after; taken away where negative.
        spread: Steps from one entry of the image to the next, the others being zero.
        dilation: Steps from one entry of a patch to the next.
    """

    size: int
    patch: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    spread: int = 1
    dilation: int = 1

    @property
    def positions(self) -> int:
        """Number of patches."""
        padded = (self.size - 1) * self.spread + 1 + sum(self.padding)
        return max(0, (padded - (self.patch - 1) * self.dilation - 1) // self.stride + 1)

    def entries(self) -> Int[np.ndarray, "positions patch"]:
        """Which entry of the image an entry of a patch is, -1 for none."""
        start = np.arange(self.positions)[:, None] * self.stride - self.padding[0]
        place = start + np.arange(self.patch) * self.dilation
        entry, rest = np.divmod(place, self.spread)
        return np.where((rest == 0) & (entry >= 0) & (entry < self.size), entry, -1)


def extract(
    axes: Sequence[Axis], images: Float[Array, "n *space channels"], first: int = 1
) -> Float[Array, "n *positions entries"]:
    """The entries of all patches.

    Args:
        axes: Patches along the axes of the images.
        images: The images.
        first: Axis of the images that the first of ``axes`` is about.
    """
    for number in reversed(range(len(axes))):
        images = _unfold(axes[number], images, first + number)
    return images


def _unfold(axis: Axis, x: Float[Array, "..."], place: int) -> Float[Array, "..."]:
    """Put the entries of patches along one axis beside each other, in front of the last axis'."""
    config = [(0, 0, 0)] * x.ndim
    config[place] = (*axis.padding, axis.spread - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    span = (axis.positions - 1) * axis.stride + 1
    starts = axis.dilation * np.arange(axis.patch)
    if axis.positions and axis.patch <= machine.MACHINE.most_slices:
        parts = [lax.slice_in_dim(x, int(k), int(k) + span, axis.stride, place) for k in starts]
        return jnp.concatenate(parts, axis=-1)
    entries = np.arange(axis.positions)[:, None] * axis.stride + starts
    x = jnp.moveaxis(jnp.take(x, entries, axis=place), place + 1, -2)
    return x.reshape(*x.shape[:-2], axis.patch * x.shape[-1])


# -- second moments ----------------------------------------------------------------------------


def has_cheap_moment(axes: Sequence[Axis]) -> bool:
    """Whether patches share enough entries for `second_moment` to be cheaper than their product."""
    if not axes or axes[0].patch < 2 or axes[0].patch > machine.MACHINE.most_slices:
        return False
    products = row_products(axes[0])
    rows = sum(len(p.rows) for p in products)
    of_patches = axes[0].positions * math.comb(axes[0].patch + 1, 2)
    return (
        len(products) <= machine.MACHINE.most_row_products
        and rows <= machine.MACHINE.worthwhile_rows * of_patches
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def second_moment(
    axes: tuple[Axis, ...],
    images: Float[Array, "n *space channels"],
    weights: Float[Array, " n"],
) -> Float[Array, "entries entries"]:
    """Weighted sum of x x^T over all patches x of all images; the weights are not negative."""
    rows, *rest = axes
    # w x x^T = (sqrt(w) x) (sqrt(w) x)^T: so products are of one array with itself.
    x = images * jnp.sqrt(weights).reshape(-1, *[1] * (images.ndim - 1))
    if _whole_rows_are_cheaper(axes, images.shape):
        products = _products(rows, x.reshape(*x.shape[:2], -1))
        blocks = _of_patches(rest, x.shape[2:], products)
    else:
        blocks = _by_chunks(axes, x)
    block = dict(zip(_pairs(rows.patch), blocks, strict=True))
    tiles = [[block[i, j] for j in range(i, rows.patch)] for i in range(rows.patch)]
    return whole(UpperTiles(tuple(map(tuple, tiles))))


@second_moment.defjvp
def _second_moment_jvp(
    axes: tuple[Axis, ...], primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The derivative is that of the plain formula, for a root has none at a weight of zero."""

    def plain(images: Array, weights: Array) -> Array:
        x = extract(axes, images)
        x = x.reshape(len(x), -1, x.shape[-1])
        return jnp.einsum("n,nsp,nsq->pq", weights, x, x, precision=_HIGHEST)

    return second_moment(axes, *primals), jax.jvp(plain, primals, tangents)[1]


@dataclass(frozen=True)
class _RowProduct:
    """Products of rows of an image with those that are some distance further.

    Attributes:
        rows: The rows.
        distance: From a row to the other.
        pairs: The pairs of a patch's rows that they belong to.
    """

    rows: Int[np.ndarray, " rows"]
    distance: int
    pairs: tuple[tuple[int, int], ...]


_ROW_PRODUCTS: Cache[list[_RowProduct]] = Cache(64)


def row_products(axis: Axis) -> list[_RowProduct]:
    """All products of rows that patches need, those of the same pairs together."""
    return _ROW_PRODUCTS.get(axis, lambda: _row_products(axis))


def _row_products(axis: Axis) -> list[_RowProduct]:
    entries = axis.entries()
    pairs_of: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in _pairs(axis.patch):
        both = (entries[:, i] >= 0) & (entries[:, j] >= 0)
        for row, other in entries[both][:, (i, j)].tolist():
            pairs_of.setdefault((other - row, row), []).append((i, j))
    together: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = {}
    for (distance, row), pairs in sorted(pairs_of.items()):
        together.setdefault((distance, tuple(pairs)), []).append(row)
    return [_RowProduct(np.array(rows), d, pairs) for (d, pairs), rows in together.items()]


def _pairs(patch: int) -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(patch), 2))


def _products(axis: Axis, x: Float[Array, "n rows *q p"]) -> Float[Array, "pairs p p"]:
    """For every pair of a patch's rows, the sum of the products of images' rows at them."""
    x = x.swapaxes(0, 1)  # then rows that follow each other are one block of memory
    total: dict[tuple[int, int], Array] = {}
    # The block of a pair (i, j) is the sum over patches t of x[t + i]^T x[t + j], each of which is
    # x[y]^T x[y + d] with y = t + i, d = j - i: what pairs have in common is computed once.
    for product in row_products(axis):
        left, right = (_take(x, product.rows + d) for d in (0, product.distance))
        new = jnp.matmul(left.T, right, precision=_HIGHEST)
        for pair in product.pairs:
            total[pair] = total[pair] + new if pair in total else new
    zero = jnp.zeros((x.shape[-1],) * 2, x.dtype)
    return jnp.stack([total.get(pair, zero) for pair in _pairs(axis.patch)])


def _take(x: Float[Array, "rows n *q p"], rows: Int[np.ndarray, " k"]) -> Float[Array, "m p"]:
    steps = {int(step) for step in np.diff(rows)} or {1}
    even = len(steps) == 1
    taken = x[int(rows[0]) : int(rows[-1]) + 1 : steps.pop()] if even else x[rows]
    return taken.reshape(-1, x.shape[-1])


def _by_chunks(
    axes: tuple[Axis, ...], x: Float[Array, "n *space channels"]
) -> Float[Array, "pairs p p"]:
    """Products of patches in all axes but the first, of so many images as a core has at hand."""

    def products(x: Array) -> Array:
        z = extract(axes[1:], x, first=2)
        return _products(axes[0], z)

    sums = jax.eval_shape(products, x[:1])
    image = math.prod(jax.eval_shape(lambda x: extract(axes[1:], x, first=2), x[:1]).shape)
    most = max(machine.MACHINE.cached_bytes // x.dtype.itemsize, 4 * sums.size)
    num_chunks = math.ceil(len(x) * image / most)
    if num_chunks <= 1:
        return products(x)
    each = math.ceil(len(x) / num_chunks)
    x = jnp.concatenate([x, jnp.zeros((each * num_chunks - len(x), *x.shape[1:]), x.dtype)])
    chunks = x.reshape(num_chunks, each, *x.shape[1:])
    add = lambda total, chunk: (total + products(chunk), None)  # noqa: E731
    return lax.scan(add, jnp.zeros(sums.shape, sums.dtype), chunks)[0]


def _whole_rows_are_cheaper(axes: Sequence[Axis], shape: Sequence[int]) -> bool:
    """Compare estimates for products of whole rows and of patches in rows, in nanoseconds a row.

    Products of few entries take as long as it takes to read them.
    """
    images, height, *space, channels = shape
    rest = axes[1:]
    positions = math.prod(axis.positions for axis in rest)
    patch, row = (math.prod(ns) * channels for ns in ([a.patch for a in rest], space))
    in_patches = positions * (patch**2 / 70 + 2 * patch)
    sums = (axes[0].patch + 1) * positions * patch**2 / (images * height)
    return (
        positions <= machine.MACHINE.most_row_products and row**2 / 70 + 2 * row + sums < in_patches
    )


def _of_patches(
    axes: Sequence[Axis], space: Sequence[int], products: Float[Array, "pairs row row"]
) -> Float[Array, "pairs p p"]:
    """From products of whole rows to sums of those of the patches in them."""
    n = len(axes)
    products = products.reshape(-1, *space, *space)
    padding = [(*axis.padding, axis.spread - 1) for axis in axes]
    none = (0, 0, 0)
    zero = jnp.zeros((), products.dtype)
    products = lax.pad(products, zero, [none, *padding, none, *padding, none])
    total: Array | None = None
    # Of the products P[y, z] of entries y and z of two rows, the patch at position t has those with
    # y = t + k and z = t + l for all its places k, l: a part of P for every position.
    for position in np.ndindex(*(axis.positions for axis in axes)):
        start = [p * axis.stride for p, axis in zip(position, axes, strict=True)]
        index = [
            slice(s, s + (axis.patch - 1) * axis.dilation + 1, axis.dilation)
            for s, axis in zip(start, axes, strict=True)
        ]
        term = products[(slice(None), *index, slice(None), *index, slice(None))]
        total = term if total is None else total + term
    assert total is not None
    width = math.prod(total.shape[1 : n + 2])
    return total.reshape(-1, width, width)
