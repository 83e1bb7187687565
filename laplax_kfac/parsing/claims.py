"""Uses as claims to a Kronecker block: matrices of distinct parameters, with factors of rank one.

A claim is a use whose parameters are distinct, viewed as matrices ``W[k]`` of shape (in, out), one
for every entry k of a stack. Scans around the use and the pattern's stack are *shared* along where
the ids are the same all along: these are weight-sharing positions. Along the others the block is
stacked.

Constant factors of a weight's entries are allowed if they have rank one: where the weight is the
elementwise product of ``u v^T`` and W, the gradient in W is ``(u * inputs) (v * cotangents)^T``, so
that u scales the inputs and v the cotangents.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from laplax_kfac.parsing.segments import Contiguous, Segment, make_segment
from laplax_kfac.parsing.uses import Fallback, Use
from laplax_kfac.parsing.values import FOREIGN
from laplax_kfac.patterns import Moments

Ids = Int[np.ndarray, "stack rows out"]
Side = TypeVar("Side")
ENTRY_BY_ENTRY = "scaled entry by entry, which no Kronecker product can follow"
Part = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]
"""Rows and columns of a weight."""


@dataclass(frozen=True, eq=False)
class Claim:
    """One use, seen as matrices of distinct parameters.

    Attributes:
        use: Number of the use.
        ids: The parameters, (stack, in, out).
        shared: For each enclosing scan, then the pattern's stack axis: whether the weight is
            shared along it (so that it counts as positions) or not (so that it is stacked).
        positions: Places one example shares the weight over.
        input_scale: Factor of every input, (stack, in), or None.
        output_scale: Factor of every output, (stack, out), or None.
        bias: None for a weight. For a bias, its constant input: d(use's output) / d(bias).
        indexed: Whether inputs are row numbers.
        transposed: Whether ids are those of the layer with in and out exchanged.
        moments: How sums over the inputs are formed without them, or None.
        part: The inputs and the outputs of the use that the ids are for, where constants take the
            place of a weight for the others; None for all.
        terms: Numbers of the uses whose inputs, one after the other, are those of the layer, where
            these are the terms of a sum; none where they are the inputs of ``use`` alone.
        keeps_outputs: Whether the outputs of the use are those of the layer, and not a map of them.
    """

    use: int
    ids: Ids
    shared: tuple[bool, ...]
    positions: int
    input_scale: Float[np.ndarray, "stack rows"] | None = None
    output_scale: Float[np.ndarray, "stack out"] | None = None
    bias: float | None = None
    indexed: bool = False
    transposed: bool = False
    moments: Moments | None = None
    part: Part | None = None
    terms: tuple[int, ...] = ()
    keeps_outputs: bool = True

    @classmethod
    def of(cls, number: int, use: Use, ids: Int[np.ndarray, "*scans stack rows out"]) -> "Claim":
        """The claim of a use to ids in all iterations of the scans around it."""
        # For each scan and the stack axis, whether the ids are the same all along it; a stack of
        # one is a stack.
        *scans, stack = range(ids.ndim - 2)
        alone = ids.shape[stack] == 1
        shared = *(constant_along(ids, a) for a in scans), not alone and constant_along(ids, stack)
        sizes = (*use.scans, ids.shape[-3])
        along = math.prod(n for n, s in zip(sizes, shared, strict=True) if s)
        return cls(number, take_first(ids, shared), shared, use.positions * along)

    def scaled(self, scale: Float[np.ndarray, "*scans stack rows out"]) -> "Claim | str":
        """This claim with factors of all entries, or why there is none."""
        if any(s and not constant_along(scale, a) for a, s in enumerate(self.shared)):
            return "scaled differently where it is shared"
        factors = rank_one(take_first(scale, self.shared))
        if factors is None:
            return ENTRY_BY_ENTRY
        return replace(self, input_scale=factors[0], output_scale=factors[1])

    @property
    def used(self) -> tuple[int, ...]:
        """Numbers of all uses that are read for it."""
        return self.terms or (self.use,)

    def as_layer_sides(self, computed: Side, cotangents: Side) -> tuple[Side, Side]:
        """What belongs to a use's inputs and to its outputs, as those of the layer's weight.

        The output of a transposed use has the size of the weight's rows: its cotangents stand where
        the layer has its inputs.
        """
        return (cotangents, computed) if self.computed_side else (computed, cotangents)

    @property
    def computed_side(self) -> int:
        """The side of the layer that the use's inputs belong to: 0 for its inputs, or 1."""
        return int(self.transposed)

    @property
    def lookup_side(self) -> int | None:
        """The side of the layer on which data pick rows, or None."""
        return self.computed_side if self.indexed else None

    @property
    def has_place_for_bias(self) -> bool:
        """Whether the weight's rows can be joined by a bias, whose input is a constant 1.

        The inputs of a transposed weight are its columns, those of a lookup are row numbers:
        neither has a place for a constant 1. A scale of the outputs is not one of the bias.
        """
        moved = self.transposed or self.indexed or not self.keeps_outputs
        return not moved and self.output_scale is None

    @functools.cached_property
    def segment(self) -> Segment:
        """The ids, as compactly as they allow."""
        return make_segment(self.ids)

    @property
    def entries(self) -> slice | Ids:
        """The ids as an index into an array of all parameters: nearly always a range."""
        place = self.segment.place
        return slice(place.start, place.stop) if isinstance(place, Contiguous) else self.ids

    @property
    def problem(self) -> str:
        """Why ids are no matrices of distinct parameters; empty if they are."""
        if self.ids.size == 0:
            return "has no entries"
        if isinstance(self.entries, slice):
            return ""
        if self.ids.min() == FOREIGN:
            return "combined with constants or data before its use"
        return "" if np.unique(self.ids).size == self.ids.size else "repeated within one weight"


Group = list[Claim]
"""Claims to the same ids: the uses of one weight, or of one bias."""


def claims_of(number: int, use: Use) -> list[Claim | Fallback]:
    """The claims of a use, one for each part of it that constants separate; fallbacks for others.

    An array that data may have been joined to (a class token, and a sequence) has no parts: it is
    data, whose layer has the other operand as its weight.
    """
    found: list[Claim | Fallback] = []
    for part in [None] if use.role.view.mixed else parts_of(use.ids):
        claim = _claim(number, use, part)
        if isinstance(claim, str):
            entry = Fallback.of(_of_part(use.ids, part), use.pattern.name, claim)
            made = claim == ENTRY_BY_ENTRY
            found.append(replace(entry, added=use.role.added, makes_weight=made))
        else:
            found.append(claim)
    return found


def _claim(number: int, use: Use, part: Part | None) -> Claim | str:
    """The claim of a part of a use, or why there is none."""
    if use.role.refusal:
        return use.role.refusal
    made = use.role.map
    moments = use.moments if part is None and made is None else None
    indexed = use.pattern.indexed and (made is None or made.diagonal[0])
    claim = Claim.of(number, use, _of_part(use.ids, part))
    claim = replace(claim, indexed=indexed, moments=moments, part=part)
    claim = replace(claim, keeps_outputs=made is None or made.keeps_outputs)
    if claim.problem or use.scale is None:
        return claim.problem or claim
    return claim.scaled(_of_part(use.scale, part))


def parts_of(ids: Int[np.ndarray, "*scans stack rows out"]) -> list[Part | None]:
    """The parts of a weight that hold parameters, where the rest is constants: padding, zeros.

    One for every set of rows with the same columns; none of these in two sets.
    """
    if ids.min(initial=0) != FOREIGN:
        return [None]
    inside = ids.reshape(-1, *ids.shape[-2:]) != FOREIGN
    columns = np.unique(inside[0][inside[0].any(axis=1)], axis=0)
    if not (inside == inside[:1]).all() or columns.sum(axis=0).max(initial=0) != 1:
        return [None]
    rows: list[Bool[np.ndarray, " rows"]] = [(inside[0] == c).all(axis=1) for c in columns]
    return [(np.flatnonzero(r), np.flatnonzero(c)) for r, c in zip(rows, columns, strict=True)]


def _of_part(
    x: Shaped[np.ndarray, "*scans stack rows out"], part: Part | None
) -> Shaped[np.ndarray, "*scans stack _ _"]:
    """The entries of a part of a weight."""
    return x if part is None else x[..., part[0], :][..., part[1]]


def constant_along(x: Num[np.ndarray, "..."], axis: int) -> bool:
    """Whether an array is the same all along an axis."""
    x = np.moveaxis(x, axis, 0)
    # The second entry decides nearly always, without a pass over all of them.
    return bool(len(x) == 1 or ((x[1] == x[0]).all() and (x == x[0]).all()))


def take_first(
    x: Num[np.ndarray, "*scans stack rows out"], shared: Sequence[bool]
) -> Num[np.ndarray, "_ rows out"]:
    """Drop the shared leading axes and merge the stacked ones."""
    x = x[tuple(0 if s else slice(None) for s in shared)]
    return x.reshape(-1, *x.shape[-2:])


def rank_one(
    scale: Float[np.ndarray, "stack rows out"],
) -> tuple[Float[np.ndarray, "stack rows"], Float[np.ndarray, "stack out"] | None] | None:
    """Factor scale[k, i, o] = u[k, i] v[k, o], with v None where it is all ones.

    With the largest entry s[i, o] as pivot, u is its column and v its row over the pivot: if s has
    rank one, s = u v^T and v[o] = 1. The pivot is the best conditioned one. Else there is no way.
    """
    u = np.empty(scale.shape[:2])
    v = np.ones((scale.shape[0], scale.shape[2]))
    for k, s in enumerate(scale):
        i, o = np.unravel_index(np.abs(s).argmax(), s.shape)
        u[k] = s[:, o]
        v[k] = s[i] / s[i, o] if s[i, o] else 1.0
        if not np.allclose(u[k][:, None] * v[k], s, rtol=1e-6, atol=1e-6 * abs(s[i, o])):
            return None
    return u, (None if np.allclose(v, 1.0, rtol=1e-7, atol=0.0) else v)
