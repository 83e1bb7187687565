"""From uses to layers: every parameter in exactly one, each with the best block it allows.

A *claim* is a use that could be a Kronecker block: distinct ids, viewed as ``(stack, in, out)``
matrices; a bias is a claim with one input, the constant 1. Claims on the same ids are one layer
with several uses. A claim stands only if nothing else touches its ids; what is left over is
probed at the parameter itself (exact, dense or diagonal), or does not influence the output.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from laplax_kfac import jaxprs
from laplax_kfac.parsing.indices import FOREIGN
from laplax_kfac.parsing.layer import FROZEN, BlockKind, Layer, unique_names
from laplax_kfac.parsing.layout import Contiguous, ParameterSpace, Segment, make_segment
from laplax_kfac.parsing.selection import DENSE_LIMIT, CurvatureKind, Selection
from laplax_kfac.parsing.walk import Findings, Opaque, Shift, Use
from laplax_kfac.patterns.registry import Moments

FACTOR_LIMIT = 16384
"""Largest Kronecker factor that is kept dense; larger ones are diagonal."""

Ids = Int[np.ndarray, "stack rows out"]
Part = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]


@dataclass(frozen=True)
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

    @functools.cached_property
    def segment(self) -> Segment:
        """The ids, as compactly as they allow."""
        return make_segment(self.ids)

    @property
    def entries(self) -> slice | Ids:
        """The ids as an index into an array of all parameters: nearly always a range."""
        place = self.segment.place
        return slice(place.start, place.stop) if isinstance(place, Contiguous) else self.ids


@dataclass(frozen=True)
class Member:
    """A claim as part of a layer, with the joint bias it may carry."""

    claim: Claim
    joint_bias: float | None = None


@dataclass(frozen=True)
class Resolved:
    """A layer and how its statistics are read: from uses, or from a probe on its parameters."""

    layer: Layer
    members: tuple[Member, ...] = ()


def resolve(
    findings: Findings, space: ParameterSpace, selection: Selection
) -> tuple[Resolved, ...]:
    """Group the findings into layers, ordered by their first parameter.

    Raises:
        ValueError: If parameters have no Kronecker form and their fallback is ``"error"``, or if a
            dense block is larger than `FACTOR_LIMIT`.
    """
    claims, opaque = _claims(findings)
    groups = _group(claims, opaque, space.size)
    groups = _without_partial_sums(groups, opaque, findings, space)
    if not selection.separate_weight_and_bias:
        groups = _join_biases(groups)
    layers = [_matrix_layer(group, findings, space, selection) for group in groups]
    taken = np.zeros(space.size, bool)
    for group in groups:
        for claim in group.parts:
            taken[claim.entries] = True
    layers += _fallback_layers(opaque, taken, space, selection)
    for resolved in layers:
        _require_affordable(resolved.layer)
    layers.sort(key=lambda r: (space.paths.index(r.layer.params[0]), r.layer.first))
    names = unique_names([r.layer for r in layers], space)
    selection.check_kinds(names)
    named = [replace(r.layer, name=name) for r, name in zip(layers, names, strict=True)]
    return tuple(
        replace(r, layer=replace(layer, sides=sides_of(layer, r.members, selection)))
        for r, layer in zip(layers, named, strict=True)
    )


def sides_of(layer: Layer, members: Sequence[Member], selection: Selection) -> tuple[str, str]:
    """Kinds of a layer's input and output factor: diagonal where data pick rows, or by size.

    Raises:
        ValueError: If another kind is asked for where data pick rows.
    """
    if layer.block != "kronecker":
        return layer.sides
    wanted, kinds = selection.kinds_for(layer.name), []
    for side, size in enumerate((layer.in_features, layer.out_features)):
        lookup = any(m.claim.indexed and m.claim.transposed == bool(side) for m in members)
        asked = wanted[side]
        if asked is not None and not (lookup and None in wanted):  # None: all that are no lookups
            if lookup and asked != "diagonal":
                msg = (
                    f"`factor_kinds` asks for {asked!r} in layer {layer.name!r}, a factor of which "
                    "is of rows that data pick: one row at a time, so that it is 'diagonal'. Give "
                    "that side the kind 'diagonal'."
                )
                raise ValueError(msg)
            kinds.append(asked)
        else:
            kinds.append("diagonal" if lookup or size > FACTOR_LIMIT else "dense")
    return kinds[0], kinds[1]


# -- claims ------------------------------------------------------------------------------------


def _claims(findings: Findings) -> tuple[list[Claim], list[Opaque]]:
    """Turn uses and shifts into claims; those that cannot be are opaque."""
    claims: list[Claim] = []
    opaque = list(findings.opaque)

    def refuse(ids: Int[np.ndarray, "..."], pattern: str, reason: str) -> None:
        opaque.append(Opaque(np.unique(ids[ids != FOREIGN]), pattern, reason))

    def claim(number: int) -> None:
        use = findings.use(number)
        for part in [None] if use.mixed else _parts(use.ids):
            found = _weight_claim(number, use, part)
            if isinstance(found, str):
                refuse(_of_part(use.ids, part), use.pattern.name, found)
            else:
                claims.append(found)

    biases = {s.bias for s in findings.shifts} | set(findings.sums)
    for number in range(len(findings.uses)):
        if number not in biases:
            claim(number)
    shifts_of: dict[int, list[Shift]] = {}
    for shift in findings.shifts:
        shifts_of.setdefault(shift.use, []).append(shift)
    for number, shifts in shifts_of.items():
        for shift, parts in _combined(shifts):
            bias = _bias_claim(number, findings.use(number), shift)
            if bias is None:  # no bias of the whole layer: each part is a layer of its own
                for part in parts:
                    claim(part)
            else:
                claims.append(bias)
    for number in findings.sums:
        claim(number)
    return claims, opaque


def _parts(ids: Int[np.ndarray, "*lanes stack rows out"]) -> list[Part | None]:
    """The parts of a weight that hold parameters, where the rest is constants: padding, zeros.

    One for every set of rows with the same columns; none of these in two sets.
    """
    if ids.min(initial=0) != FOREIGN:
        return [None]
    inside = ids.reshape(-1, *ids.shape[-2:]) != FOREIGN
    columns = np.unique(inside[0][inside[0].any(axis=1)], axis=0)
    if not (inside == inside[:1]).all() or columns.sum(axis=0).max(initial=0) != 1:
        return [None]
    return [(np.flatnonzero((inside[0] == c).all(axis=1)), np.flatnonzero(c)) for c in columns]


def _of_part(x: Shaped[np.ndarray, "*lanes stack rows out"], part: Part | None) -> Any:
    """The entries of a part of a weight."""
    return x if part is None else x[..., part[0], :][..., part[1]]


def _weight_claim(number: int, use: Use, part: Part | None) -> Claim | str:
    if not use.regular:
        return "added to different places unequally often"
    if use.pattern.name == "shift" and use.ids.shape[-1] > DENSE_LIMIT:
        return "added to data, differently at every position"
    every_id = _of_part(use.ids, part)
    shared = _shared_axes(every_id)
    ids = _take_first(every_id, shared)
    place = use.pattern.outputs(use.eqn, use.operand, jaxprs.numbered(use.eqn.outvars[0]))
    positions = place.shape[0] * _shared_size(use, use.ids.shape[-3], shared)
    claim = Claim(
        number, ids, shared, positions, indexed=use.pattern.indexed,
        moments=use.moments if part is None else None, part=part,
    )  # fmt: skip
    problem = _not_a_matrix(claim)
    if problem:
        return problem
    if use.operand < 0 and ids.size == 1 and place.size > 1:
        return "one number, added in several places"
    if use.scale is None:
        return claim
    scale = np.broadcast_to(use.scale, np.broadcast_shapes(use.scale.shape, use.ids.shape))
    scale = _of_part(scale, part)
    if any(s and not _constant_along(scale, a) for a, s in enumerate(shared)):
        return "scaled differently where it is shared"
    factors = _rank_one(_take_first(scale, shared))
    if factors is None:
        return "scaled entry by entry, which no Kronecker product can follow"
    return replace(claim, input_scale=factors[0], output_scale=factors[1])


def _bias_claim(number: int, use: Use, shift: Shift) -> Claim | None:
    """View a shift as (lanes, positions, stack, out): a bias is the same at all positions.

    None if it is not, or if it is added to a part or to copies of the layer's output.
    """
    entries = jaxprs.numbered(use.eqn.outvars[0])
    met = np.zeros(entries.size, bool)
    met[shift.output] = True
    if int(met.sum()) != shift.output.size or not met.all():
        return None
    lanes = shift.ids.shape[1:]
    ids_of_output = np.full((entries.size, *lanes), FOREIGN, dtype=shift.ids.dtype)
    ids_of_output[shift.output] = shift.ids
    place = use.pattern.outputs(use.eqn, use.operand, entries)
    ids = np.moveaxis(ids_of_output[place], range(3), range(-3, 0))  # (lanes, T, K, out)
    if shift.factor is None or (ids == FOREIGN).any() or not _constant_along(ids, len(lanes)):
        return None
    ids = ids.take(0, axis=len(lanes))[..., None, :]  # (lanes, K, 1, out)
    shared = _shared_axes(ids)
    positions = place.shape[0] * _shared_size(use, ids.shape[-3], shared)
    claim = Claim(number, _take_first(ids, shared), shared, positions, bias=shift.factor)
    return None if _not_a_matrix(claim) else claim


def _shared_axes(ids: Int[np.ndarray, "*lanes stack rows out"]) -> tuple[bool, ...]:
    """For each lane and the stack axis, whether the ids are the same all along it."""
    *lanes, stack = range(ids.ndim - 2)
    alone = ids.shape[stack] == 1  # a stack of one is a stack
    return (*(_constant_along(ids, a) for a in lanes), not alone and _constant_along(ids, stack))


def _shared_size(use: Use, stack: int, shared: Sequence[bool]) -> int:
    """Positions that come of scans and stack axes along which the weight is shared."""
    sizes = (*use.lanes, stack)
    return math.prod(n for n, s in zip(sizes, shared, strict=True) if s)


def _combined(shifts: list[Shift]) -> list[tuple[Shift, list[int]]]:
    """Join shifts of disjoint parts of one output: a split output takes its bias in pieces.

    Returns each joint shift with the numbers of the biases in it.
    """
    combined: list[tuple[Shift, list[int]]] = []
    for shift in shifts:
        for k, (other, parts) in enumerate(combined):
            if (
                other.ids.shape[1:] == shift.ids.shape[1:]
                and not np.isin(shift.output, other.output).any()
            ):
                joint = Shift(
                    shift.use,
                    shift.bias,
                    np.concatenate([other.output, shift.output]),
                    np.concatenate([other.ids, shift.ids]),
                    shift.factor if shift.factor == other.factor else None,
                )
                combined[k] = joint, [*parts, shift.bias]
                break
        else:
            combined.append((shift, [shift.bias]))
    return combined


def _constant_along(x: Num[np.ndarray, "..."], axis: int) -> bool:
    x = np.moveaxis(x, axis, 0)
    # The second entry decides nearly always, without a pass over all of them.
    return bool(len(x) == 1 or ((x[1] == x[0]).all() and (x == x[0]).all()))


def _take_first(
    x: Num[np.ndarray, "..."], shared: Sequence[bool]
) -> Num[np.ndarray, "stack rows out"]:
    """Drop the shared leading axes and merge the stacked ones."""
    index = tuple(0 if s else slice(None) for s in shared)
    x = x[index]
    return x.reshape(-1, *x.shape[-2:])


def _not_a_matrix(claim: Claim) -> str:
    """Why ids are no matrices of distinct parameters; empty if they are."""
    ids = claim.ids
    if ids.size == 0:
        return "has no entries"
    if isinstance(claim.entries, slice):
        return ""
    if ids.min() == FOREIGN:
        return "combined with constants or data before its use"
    return "" if np.unique(ids).size == ids.size else "repeated within one weight"


def _rank_one(
    scale: Float[np.ndarray, "stack rows out"],
) -> tuple[Float[np.ndarray, "stack rows"] | None, Float[np.ndarray, "stack out"] | None] | None:
    """Factor scale[k, i, o] = u[k, i] v[k, o], with v None where it is all ones."""
    u = np.empty(scale.shape[:2])
    v = np.ones((scale.shape[0], scale.shape[2]))
    for k, s in enumerate(scale):
        i, o = np.unravel_index(np.abs(s).argmax(), s.shape)
        u[k] = s[:, o]
        v[k] = s[i] / s[i, o] if s[i, o] else 1.0
        if not np.allclose(u[k][:, None] * v[k], s, rtol=1e-6, atol=1e-6 * abs(s[i, o])):
            return None
    return u, (None if np.allclose(v, 1.0, rtol=1e-7, atol=0.0) else v)


# -- groups ------------------------------------------------------------------------------------


@dataclass(eq=False)  # a group is the claims it collects, not their values
class Group:
    """Claims on the same ids, and those of the bias that is joint with them."""

    claims: list[Claim]
    bias: list[Claim]

    @property
    def ids(self) -> Ids:
        """Ids of the layer's matrix, without the bias."""
        return self.claims[0].ids

    @property
    def parts(self) -> list[Claim]:
        """A claim on the layer's matrix, and one on its bias if it has one."""
        return [*self.claims[:1], *self.bias[:1]]


def _group(claims: list[Claim], opaque: list[Opaque], size: int) -> list[Group]:
    """Claims on equal ids form groups; overlaps that are not equal are opaque."""
    groups: list[Group] = []
    owner = np.zeros(size, np.int32)  # number of the group, from 1
    for claim in claims:
        owners = owner[claim.entries]
        group = groups[owners.max() - 1] if owners.max() else None
        same = bool(owners.min() == owners.max())
        if group is None:
            groups.append(Group([claim], []))
            owner[claim.entries] = len(groups)
        elif same and np.array_equal(group.ids, claim.ids):
            group.claims.append(claim)
        elif same and np.array_equal(group.ids.swapaxes(1, 2), claim.ids):
            group.claims.append(replace(claim, transposed=True))
        else:
            reason = "used again in other parts or another arrangement"
            opaque.append(Opaque(np.unique(claim.ids), "other", reason))
    return _drop_opaque(groups, opaque, size)


def _drop_opaque(groups: list[Group], opaque: list[Opaque], size: int) -> list[Group]:
    """A group with one opaque parameter is opaque as a whole: repeat until nothing changes."""
    number = _causes(opaque, size)
    changed = bool(opaque)
    while changed:
        changed = False
        for group in list(groups):
            entries = group.claims[0].entries
            hit = number[entries].max()
            if hit:
                cause = opaque[hit - 1]
                opaque.append(Opaque(group.ids.ravel(), cause.pattern, cause.reason))
                number[entries] = np.where(number[entries], number[entries], len(opaque))
                groups.remove(group)
                changed = True
    return groups


def _causes(opaque: list[Opaque], size: int) -> Int[np.ndarray, " P"]:
    """For every parameter, which entry first made it opaque, from 1; 0 if none did."""
    number = np.zeros(size, dtype=np.int32)
    for k, entry in reversed(list(enumerate(opaque, start=1))):
        number[entry.ids] = k
    return number


def _without_partial_sums(
    groups: list[Group], opaque: list[Opaque], findings: Findings, space: ParameterSpace
) -> list[Group]:
    """Probe a leaf as a whole if a part of it is added to data, and the rest is idle.

    The probe is exact, and the leaf one layer instead of two.
    """
    used = np.zeros(space.size, bool)
    for entries in [g.claims[0].entries for g in groups] + [entry.ids for entry in opaque]:
        used[entries] = True
    kept = []
    for group in groups:
        if findings.use(group.claims[0].use).operand >= 0:
            kept.append(group)
            continue
        leaves = space.leaves_of(group.ids)
        idle = not all(used[space.offsets[k] : space.offsets[k + 1]].all() for k in leaves)
        if idle:
            whole = np.concatenate([space.leaf_ids(k).ravel() for k in leaves])
            opaque.append(Opaque(whole, "shift", "added to data in part"))
        else:
            kept.append(group)
    return kept


def _join_biases(groups: list[Group]) -> list[Group]:
    """Move a bias into its weight's group where every use of one is a use of the other."""
    weights = [g for g in groups if g.claims[0].bias is None]
    biases = {g.claims[0].use: g for g in reversed(groups) if g.claims[0].bias is not None}
    joined: list[Group] = []
    for group in weights:
        bias = biases.get(group.claims[0].use)
        if bias is not None and not any(bias is j for j in joined) and _joinable(group, bias):
            group.bias = bias.claims
            joined.append(bias)
    return [g for g in groups if not any(g is j for j in joined)]


def _joinable(weight: Group, bias: Group) -> bool:
    if bias.claims[0].bias is None or weight.ids.shape[::2] != bias.ids.shape[::2]:
        return False
    biases = {c.use: c for c in bias.claims}
    return (
        len(biases) == len(bias.claims) == len(weight.claims)
        and all(c.use in biases and biases[c.use].shared == c.shared for c in weight.claims)
        and not any(c.transposed or c.indexed for c in weight.claims)
        and all(c.output_scale is None for c in weight.claims)
    )


# -- layers ------------------------------------------------------------------------------------


_BLOCKS: dict[CurvatureKind, BlockKind] = {
    "kronecker": "kronecker",
    "diagonal": "diagonal",
    "block": "dense",
}


def _matrix_layer(
    group: Group, findings: Findings, space: ParameterSpace, selection: Selection
) -> Resolved:
    first = group.claims[0]
    biases = {c.use: c.bias for c in group.bias}
    stack, rows, columns = group.ids.shape
    parts = group.parts
    uses = {c.use: findings.use(c.use) for c in group.claims}
    names = sorted({use.pattern.name for use in uses.values()})
    reason = f"weight of `{uses[first.use].eqn.primitive.name}`"
    if first.bias is not None:
        names, reason = ["bias"], "added to the output of a layer, not joint with its weight"
    elif names in (["bias"], ["shift"]):
        reason = "added to data"
    if selection.curvature != "kronecker":
        reason = f"{reason}; `curvature` is {selection.curvature!r}"
    elif columns > FACTOR_LIMIT or (rows > FACTOR_LIMIT and not first.indexed):
        reason += f"; a factor is diagonal, for it is larger than {FACTOR_LIMIT}"
    if len(group.claims) > 1 and selection.curvature == "kronecker":
        reason += f"; nearest Kronecker product of the sum of {len(group.claims)} uses"
    layer = Layer(
        name="",
        pattern="+".join(names),
        params=_paths([c.ids for c in parts], space),
        block=_BLOCKS[selection.curvature],
        in_features=rows,
        out_features=columns,
        positions=sum(c.positions for c in group.claims),
        stack=stack,
        bias=bool(group.bias),
        uses=len(group.claims),
        reason=reason,
        segments=tuple(c.segment for c in parts),
    )
    return Resolved(layer, tuple(Member(c, biases.get(c.use)) for c in group.claims))


def _fallback_layers(
    opaque: list[Opaque], taken: np.ndarray, space: ParameterSpace, selection: Selection
) -> list[Resolved]:
    """One layer a leaf for what is probed, and one for what does not influence the output."""
    number = _causes(opaque, space.size)
    layers = []
    for leaf, (path, name) in enumerate(zip(space.paths, space.names, strict=True)):
        here = slice(space.offsets[leaf], space.offsets[leaf + 1])
        if here.start < here.stop and taken[here].all():
            continue
        ids = space.leaf_ids(leaf).ravel()
        probed = ids[(number[here] > 0) & ~taken[here]]
        idle = ids[(number[here] == 0) & ~taken[here]]
        if probed.size:
            cause = opaque[number[probed[0]] - 1]
            real = not space.is_complex(leaf)
            kind = selection.block_of(name, probed.size, cause.reason, real=real)
            layers.append(_plain_layer(path, cause.pattern, kind, probed, cause.reason))
        if idle.size or not ids.size:
            pattern, reason = _why_idle(leaf, space, selection)
            layers.append(_plain_layer(path, pattern, "none", idle, reason))
    return layers


def _require_affordable(layer: Layer) -> None:
    if layer.block == "dense" and layer.size > FACTOR_LIMIT:
        msg = (
            f"the dense block of {', '.join(layer.params)} would have {layer.size:,} parameters; "
            f"at most {FACTOR_LIMIT:,} are allowed. Lower `dense_limit`, leave parameters out by "
            "`params_filter` ('last_layer' for the last layer alone), or choose "
            "`curvature='kronecker'`."
        )
        raise ValueError(msg)


def _why_idle(leaf: int, space: ParameterSpace, selection: Selection) -> tuple[str, str]:
    """Pattern and reason of parameters in a leaf that have no curvature."""
    if 0 in space.shapes[leaf]:
        return "unused", "has no entries"
    if not selection.covers(space.names[leaf]):
        return FROZEN, "left out by `params_filter`: fixed at its value"
    if not jnp.issubdtype(space.dtypes[leaf], jnp.inexact):
        return "unused", "an integer leaf"
    return "unused", "does not influence the output"


def _plain_layer(
    path: str, pattern: str, block: BlockKind, ids: Int[np.ndarray, " n"], reason: str
) -> Resolved:
    segments = (make_segment(ids),)
    return Resolved(
        Layer("", pattern, (path,), block, ids.size, 1, reason=reason, segments=segments)
    )


def _paths(ids: list[Int[np.ndarray, "_ _ _"]], space: ParameterSpace) -> tuple[str, ...]:
    leaves = sorted({leaf for i in ids for leaf in space.leaves_of(i)})
    return tuple(space.paths[leaf] for leaf in leaves)
