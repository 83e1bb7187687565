"""Where the entries of a block sit among the parameters.

Blocks are defined on *ids*, positions in the flattened parameter vector (``jax.tree.leaves``, each
raveled: laplax's order), not on leaves: a leaf may hold several blocks (stacked or fused weights)
and a block several leaves (a weight and its bias). A `Segment` says which ids form some rows of a
block. Nearly always they are a permuted contiguous range, so that reading and writing a block is a
reshape and a transpose; anything else keeps its ids and is a gather.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Contiguous:
    """Ids ``start, start + 1, ...`` laid out as ``sizes`` and transposed by ``permutation``."""

    start: int
    sizes: tuple[int, ...]
    permutation: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + math.prod(self.sizes)


class Scattered:
    """Ids in no simple order; hashable by content, so that it can be static under ``jit``."""

    def __init__(self, ids: Int[np.ndarray, "..."]) -> None:
        self.ids = np.ascontiguousarray(ids)
        self._content = (self.ids.shape, self.ids.tobytes())

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scattered) and self._content == other._content

    def __repr__(self) -> str:
        return f"Scattered(<{self.ids.size} ids>)"


@dataclass(frozen=True)
class Segment:
    """Some rows of a block: the shape ``(stack, rows, columns)`` of their ids, and the ids."""

    shape: tuple[int, ...]
    place: Contiguous | Scattered

    @property
    def first(self) -> int:
        """The smallest id."""
        place = self.place
        return place.start if isinstance(place, Contiguous) else int(place.ids.min())


def make_segment(ids: Int[np.ndarray, "..."]) -> Segment:
    """Describe an array of distinct ids as compactly as it allows."""
    return Segment(ids.shape, _as_contiguous(ids) or Scattered(ids))


def _as_contiguous(ids: Int[np.ndarray, "..."]) -> Contiguous | None:
    """Write ``ids`` as a transposed reshape of a range, if it is one.

    Then ids are a number in mixed radix: along every axis they count in digits (size, stride), and
    the digits of all axes, by falling stride, are the axes of the range. The candidate that they
    give is compared with the ids, for only the first line along each axis was read.
    """
    if ids.size == 0:
        return None
    base = int(ids.flat[0])
    radices: list[tuple[int, int]] = []  # (size, stride) of every digit, in the order of ids
    for axis in range(ids.ndim):
        index = [0] * ids.ndim
        line = ids[tuple(slice(None) if a == axis else i for a, i in enumerate(index))]
        digits = _mixed_radix(line.astype(np.int64) - base)
        if digits is None:
            return None
        radices += digits
    order = sorted(range(len(radices)), key=lambda k: -radices[k][1])
    sizes = tuple(radices[k][0] for k in order)
    permutation = tuple(int(p) for p in np.argsort(order))
    candidate = np.arange(base, base + math.prod(sizes), dtype=ids.dtype).reshape(sizes)
    if math.prod(sizes) != ids.size:
        return None
    if not np.array_equal(candidate.transpose(permutation).reshape(ids.shape), ids):
        return None
    return Contiguous(base, sizes, permutation)


def _mixed_radix(line: Int[np.ndarray, " n"]) -> list[tuple[int, int]] | None:
    """Factor ``0, s, 2s, ..., t, t + s, ...`` into digits (size, stride), slowest first."""
    digits: list[tuple[int, int]] = []
    while line.size > 1:
        stride = int(line[1] - line[0])
        steps = np.flatnonzero(np.diff(line) != stride)
        size = int(steps[0]) + 1 if steps.size else line.size
        if stride <= 0 or line.size % size:
            return None
        digits.insert(0, (size, stride))
        line = line[::size]
    return digits
