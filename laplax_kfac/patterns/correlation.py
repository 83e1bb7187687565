"""Second moments of patches by correlation: one product for all entries at the same distance.

With patches at positions t, places p and q of a patch, and an image x, the tile (p, q) of the
second moment is the sum of ``x[t + p] x[t + q]^T`` over t: that of ``x[n] x[n + q - p]^T`` over the
entries n = t + p that place p sees. All places see nearly the same entries: all of the image (with
strides, all of its entries that are a multiple of the stride apart) but a few at its edges. So the
tile is, at distance d = q - p,

    sum over all n of x[n] x[n + d]^T  -  the same over the few n that place p does not see.

The first is the correlation of the image with itself: one convolution that has the image as its
kernel, for all distances, serves all tiles of the same distance. The others are correlations of one
entry. Along several axes the terms multiply. Images and patches are as in `patches`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from laplax_kfac import machine
from laplax_kfac.caches import Cache
from laplax_kfac.gram import SharedTiles
from laplax_kfac.patterns.patches import Axis, row_products


@dataclass(frozen=True)
class _Entries:
    """Evenly spaced entries along an axis of an image."""

    first: int
    count: int = 1
    step: int = 1

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.step


@dataclass(frozen=True)
class _Term:
    """Sum, times a sign, of the products of entries and those at a distance; one entry an axis."""

    sign: int
    entries: tuple[_Entries, ...]
    distance: tuple[int, ...]

    @classmethod
    def product(cls, terms: Sequence["_Term"]) -> "_Term":
        """The term along several axes, from one along each."""
        return cls(
            math.prod(term.sign for term in terms),
            tuple(entries for term in terms for entries in term.entries),
            tuple(distance for term in terms for distance in term.distance),
        )


@dataclass(frozen=True)
class _Piece:
    """Products of entries with those at all distances from the least to the most."""

    entries: tuple[_Entries, ...]
    least: tuple[int, ...]
    most: tuple[int, ...]

    @property
    def distances(self) -> tuple[int, ...]:
        """How many there are along each axis."""
        return tuple(b - a + 1 for a, b in zip(self.least, self.most, strict=True))

    def number(self, distance: tuple[int, ...]) -> int:
        """Where the product at a distance is among them."""
        place = [d - a for d, a in zip(distance, self.least, strict=True)]
        return int(np.ravel_multi_index(place, self.distances))

    def work(self) -> int:
        """Products of two entries."""
        return math.prod(e.count for e in self.entries) * math.prod(self.distances)


@dataclass(frozen=True)
class _Plan:
    """Convolutions, and which of their results add up to a tile: see `SharedTiles`."""

    pieces: tuple[_Piece, ...]
    sums: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]


def is_cheaper(axes: Sequence[Axis], shape: Sequence[int]) -> bool:
    """Whether `second_moment` is cheaper than that of `patches`, for images of some shape."""
    images, *_, channels = shape
    if images < machine.MACHINE.fewest_images or channels < machine.MACHINE.fewest_channels:
        return False
    if any(axis.spread > 1 or axis.dilation > 1 for axis in axes):
        return False
    if math.prod(axis.patch for axis in axes) > machine.MACHINE.most_places:
        return False
    # In double precision XLA has no fast product for kernels smaller than what comes out.
    small = any(axis.size < 2 * axis.patch - 1 for axis in axes)
    if small and jnp.result_type(float) == jnp.float64:
        return False
    pieces = plan_of(tuple(axes)).pieces
    work = sum(piece.work() for piece in pieces)
    by_rows = sum(len(p.rows) for p in row_products(axes[0]))
    by_rows *= math.prod(axis.positions * axis.patch**2 for axis in axes[1:])
    return 0 < len(pieces) <= machine.MACHINE.most_correlations and work <= by_rows


def second_moment(
    axes: tuple[Axis, ...],
    images: Float[Array, "n *space channels"],
    weights: Float[Array, " n"],
) -> SharedTiles:
    """Weighted sum of x x^T over all patches x of all images."""
    plan = plan_of(axes)
    weighted = images * weights.reshape(-1, *[1] * (images.ndim - 1))

    def products(images: Array, weighted: Array) -> tuple[Array, ...]:
        x, y = jnp.moveaxis(images, 0, -1), jnp.moveaxis(weighted, 0, -2)
        x = jnp.moveaxis(x, -2, 0)
        return tuple(_correlation(piece, x, y) for piece in plan.pieces)

    chunks, each = _chunks(images.size * images.dtype.itemsize, len(images))
    if chunks == 1:
        return SharedTiles(products(images, weighted), plan.sums)
    missing = each * chunks - len(images)
    split = [
        jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)]).reshape(
            chunks, each, *x.shape[1:]
        )
        for x in (images, weighted)
    ]
    zeros = [jnp.zeros(s.shape, s.dtype) for s in jax.eval_shape(products, *(x[0] for x in split))]

    def add(total: list[Array], chunk: tuple[Array, ...]) -> tuple[list[Array], None]:
        return list(map(jnp.add, total, products(*chunk))), None

    return SharedTiles(tuple(lax.scan(add, zeros, tuple(split))[0]), plan.sums)


def _chunks(size: int, images: int) -> tuple[int, int]:
    """The number of chunks to work in, and of images in each: a multiple of the fewest."""
    chunks = math.ceil(size / machine.MACHINE.cached_bytes)
    if chunks == 1:
        return 1, images
    each = (
        math.ceil(images / chunks / machine.MACHINE.fewest_images) * machine.MACHINE.fewest_images
    )
    return math.ceil(images / each), each


def _correlation(
    piece: _Piece, x: Float[Array, "channels *space n"], y: Float[Array, "*space n channels"]
) -> Float[Array, "channels distances channels"]:
    """Sums of products of y's entries with those of x that are at a distance from them.

    In this layout the convolution is a fast one on a CPU, in the body of a loop too.
    """
    space = range(len(piece.entries))
    padding = []
    for axis, (entries, least, most) in enumerate(
        zip(piece.entries, piece.least, piece.most, strict=True)
    ):
        y = lax.slice_in_dim(y, entries.first, entries.last + 1, entries.step, axis)
        start, stop, size = entries.first + least, entries.last + most + 1, x.shape[axis + 1]
        x = lax.slice_in_dim(x, max(0, start), max(0, min(stop, size)), 1, axis + 1)
        padding.append((max(0, -start), max(0, stop - size)))
    ndim = len(space)
    images = (0, ndim + 1, *(axis + 1 for axis in space))
    found = lax.conv_general_dilated(
        x, y, [1] * ndim, padding,
        rhs_dilation=[entries.step for entries in piece.entries],
        dimension_numbers=lax.ConvDimensionNumbers(images, (ndim + 1, ndim, *space), images),
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    return found.reshape(x.shape[0], -1, y.shape[-1])


# -- what adds up to a tile --------------------------------------------------------------------


_PLANS: Cache[_Plan] = Cache(64)


def plan_of(axes: tuple[Axis, ...]) -> _Plan:
    """The plan for images and patches of these sizes."""
    return _PLANS.get(axes, lambda: _plan(axes))


def _plan(axes: tuple[Axis, ...]) -> _Plan:
    """Terms of every tile on and below the diagonal; those of the same entries are one piece.

    A piece is computed for all distances between the least and the most that a tile wants, for they
    come out of one convolution. Its results are numbered behind those of the pieces before it.
    """
    along = [_terms_along(axis) for axis in axes]

    def terms_of(left: tuple[int, ...], right: tuple[int, ...]) -> list[_Term]:
        choices = [along[n][pair] for n, pair in enumerate(zip(left, right, strict=True))]
        return [_Term.product(terms) for terms in itertools.product(*choices)]

    places = list(np.ndindex(*(axis.patch for axis in axes)))
    tiles = [[terms_of(left, right) for left in places[: k + 1]] for k, right in enumerate(places)]
    distances: dict[tuple[_Entries, ...], list[tuple[int, ...]]] = {}
    for term in (term for row in tiles for terms in row for term in terms):
        distances.setdefault(term.entries, []).append(term.distance)
    pieces: dict[tuple[_Entries, ...], _Piece] = {}
    start: dict[tuple[_Entries, ...], int] = {}
    end = 0
    for entries, found in distances.items():
        piece = _Piece(entries, tuple(np.min(found, 0).tolist()), tuple(np.max(found, 0).tolist()))
        pieces[entries], start[entries] = piece, end
        end += math.prod(piece.distances)

    def number(term: _Term) -> int:
        return start[term.entries] + pieces[term.entries].number(term.distance)

    sums = tuple(
        tuple(tuple((term.sign, number(term)) for term in terms) for terms in row) for row in tiles
    )
    return _Plan(tuple(pieces.values()), sums)


def _terms_along(axis: Axis) -> dict[tuple[int, int], list[_Term]]:
    """For every two places in a patch, what adds up to the products of their entries."""
    entries = axis.entries()
    terms: dict[tuple[int, int], list[_Term]] = {}
    for left, right in itertools.product(range(axis.patch), repeat=2):
        both = (entries[:, left] >= 0) & (entries[:, right] >= 0)
        seen = set(entries[both, left].tolist())
        # The products sum_p x[e_l(p)] x[e_r(p)] over positions p where both places meet an entry
        # are sums over entries e of x[e] x[e + distance]. These are the same for all pairs of
        # places at one distance in one phase, but for entries that only some of them meet: take
        # the sum over all entries of the phase once, and subtract those, where they are few.
        # Places a multiple of the stride apart see the same entries but for those at the edges.
        phase = entries[:, left % axis.stride :: axis.stride]
        every = np.unique(phase[phase >= 0]).tolist()
        distance = right - left
        unseen = {n for n in every if 0 <= n + distance < axis.size} - seen
        if len(unseen) < len(seen):
            spaced = _Entries(every[0], len(every), axis.stride if len(every) > 1 else 1)
            signed = [(1, spaced), *((-1, _Entries(n)) for n in sorted(unseen))]
        else:
            signed = [(1, _Entries(n)) for n in sorted(seen)]
        terms[left, right] = [_Term(sign, (found,), (distance,)) for sign, found in signed]
    return terms
