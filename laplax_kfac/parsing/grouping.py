"""From uses to layers: every parameter in exactly one, each with the best block it allows.

Claims on the same ids are one layer with several uses. A claim stands only if nothing else touches
its ids; what is left over are fallback parameters (their own gradient gives an exact block, dense
or diagonal), or does not influence the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from laplax_kfac.parsing import biases, norms, scalars, tables
from laplax_kfac.parsing.claims import Claim, Group
from laplax_kfac.parsing.entries import trainable_ids
from laplax_kfac.parsing.groups import causes, claims_and_fallbacks, group
from laplax_kfac.parsing.layer import CHOSEN, FROZEN, MADE, BlockKind, Layer, unique_names
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import make_segment
from laplax_kfac.parsing.selection import CurvatureKind, Selection
from laplax_kfac.parsing.uses import Fallback, Findings

_BLOCKS: dict[CurvatureKind, BlockKind] = {
    "kronecker": "kronecker",
    "diagonal": "diagonal",
    "block": "dense",
    "full": "dense",
}


@dataclass(frozen=True)
class Member:
    """A claim as part of a layer, with the joint bias it may carry."""

    claim: Claim
    joint_bias: float | None = None


@dataclass(frozen=True)
class Resolved:
    """A layer and how its statistics are read: from uses, or from its parameters themselves."""

    layer: Layer
    members: tuple[Member, ...] = ()


def resolve(
    findings: Findings, space: ParameterSpace, selection: Selection
) -> tuple[Resolved, ...]:
    """Group the findings into layers, ordered by their first parameter.

    Raises:
        ValueError: If parameters have no Kronecker form and their fallback is ``"error"``, or if a
            dense block or a factor is larger than the selection's limit, and shall not be.
    """
    claims, fallbacks = claims_and_fallbacks(findings, space)
    groups = group(claims, fallbacks, space.size)
    groups = biases.without_partial_sums(groups, fallbacks, findings, space)
    separate = selection.separate_weight_and_bias
    pairs = [(g, Group()) for g in groups] if separate else biases.join(groups)
    layers = [_matrix_layer(*pair, findings, space, selection) for pair in pairs]
    taken = np.zeros(space.size, bool)
    for mine in groups:
        taken[mine[0].entries] = True
    findings = replace(findings, fallbacks=fallbacks)
    layers += _fallback_layers(findings, taken, space, selection)
    for resolved in layers:
        _require_affordable(resolved.layer, selection.limit.size)
    layers.sort(key=lambda r: (space.paths.index(r.layer.params[0]), r.layer.first))
    names = unique_names([r.layer for r in layers], space)
    selection.check_kinds(names)
    named = [replace(r.layer, name=name) for r, name in zip(layers, names, strict=True)]
    return tuple(
        replace(r, layer=with_sides(layer, r.members, selection))
        for r, layer in zip(layers, named, strict=True)
    )


def with_sides(layer: Layer, members: Sequence[Member], selection: Selection) -> Layer:
    """A layer with the kinds of its factors: diagonal where data pick rows, or by size.

    Raises:
        ValueError: If another kind is asked for where data pick rows, or a factor is wider than
            allowed.
    """
    if layer.block != "kronecker":
        return layer
    wanted, kinds, reason = selection.kinds_for(layer.name), [], layer.reason
    for side, size in enumerate((layer.rows, layer.out_features)):
        lookup = any(m.claim.lookup_side == side for m in members)
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
            kinds.append("diagonal" if lookup else selection.limit.kind_for(layer.name, size))
            if not lookup and kinds[-1] != "dense":
                reason += (
                    f"; the {'output' if side else 'input'} factor is {kinds[-1]}: {size:,} "
                    f"features are more than `max_factor_size` = {selection.limit.size:,}; "
                    "`wide_factors` and `factor_kinds` have other kinds"
                )
    return replace(layer, sides=(kinds[0], kinds[1]), reason=reason)


def _matrix_layer(
    claims: Group, bias: Group, findings: Findings, space: ParameterSpace, selection: Selection
) -> Resolved:
    """The layer of a weight, joint with its bias if it has one, or of a bias alone."""
    first = claims[0]
    inputs = {c.use: c.bias for c in bias}
    stack, rows, columns = first.ids.shape
    parts = [*claims[:1], *bias[:1]]  # claims of one group are on the same ids
    names = sorted({findings.uses[c.use].pattern.name for c in claims})
    reason = findings.uses[first.use].role.reason
    if first.bias is not None:
        names, reason = ["bias"], "added to the output of a layer, not joint with its weight"
    if selection.curvature != "kronecker":
        reason = f"{reason}; `curvature` is {selection.curvature!r}"
    if len(claims) > 1 and selection.curvature == "kronecker":
        reason += f"; nearest Kronecker product of the sum of {len(claims)} uses"
        if any(findings.uses[c.use].imaginary for c in claims):
            reason += ", of real and imaginary parts"
    leaves = sorted({leaf for c in parts for leaf in space.leaves_of(c.ids)})
    layer = Layer(
        name="",
        pattern="+".join(names),
        params=tuple(space.paths[leaf] for leaf in leaves),
        block=_BLOCKS[selection.curvature],
        in_features=rows,
        out_features=columns,
        positions=sum(c.positions for c in claims),
        stack=stack,
        bias=bool(bias),
        uses=len(claims),
        reason=reason,
        segments=tuple(c.segment for c in parts),
    )
    return Resolved(layer, tuple(Member(c, inputs.get(c.use)) for c in claims))


# -- blocks of parameters, whatever their use --------------------------------------------------


def resolve_entries(
    space: ParameterSpace, covered: Sequence[bool], selection: Selection
) -> tuple[Resolved, ...]:
    """One dense block of all parameters that are covered, or a diagonal of those in every leaf.

    Args:
        space: The parameters.
        covered: Whether a leaf is covered.
        selection: Which of its parameters are, and which block they get.

    Raises:
        ValueError: If none are, if a dense block is larger than the selection's limit, or if
            parameters in one are complex.
    """
    ids = trainable_ids(space, covered, selection.entries)
    leaves, layers = space.leaves_of(ids), []
    if selection.curvature == "full":
        if any(map(space.is_complex, leaves)):
            msg = "`curvature='full'` is for real parameters; leave complex ones out."
            raise ValueError(msg)
        paths = tuple(space.paths[leaf] for leaf in leaves)
        whole = vector_layer(paths, CHOSEN, "dense", ids, "`curvature` is 'full': one block of all")
        _require_affordable(whole.layer, selection.limit.size)
        layers.append(replace(whole, layer=replace(whole.layer, name="full")))
    for leaf, (path, name) in enumerate(zip(space.paths, space.names, strict=True)):
        everything = space.leaf_ids(leaf).ravel()
        mine = everything[np.isin(everything, ids)]
        if mine.size and selection.curvature != "full":
            found = vector_layer((path,), CHOSEN, "diagonal", mine, "chosen by `params_filter`")
            layers.append(replace(found, layer=replace(found.layer, name=name)))
        rest = np.setdiff1d(everything, mine)
        if rest.size or not everything.size:
            frozen = rest.size and jnp.issubdtype(space.dtypes[leaf], jnp.inexact)
            pattern, reason = (
                (FROZEN, "left out by `params_filter`: fixed at its value")
                if frozen
                else _why_idle(leaf, space, selection)
            )
            left = vector_layer((path,), pattern, "none", rest, reason)
            named = replace(left.layer, name=f"{name}/rest" if mine.size else name)
            layers.append(replace(left, layer=named))
    return tuple(layers)


# -- parameters that are no matrix -------------------------------------------------------------


def _fallback_layers(
    findings: Findings,
    taken: Bool[np.ndarray, " P"],
    space: ParameterSpace,
    selection: Selection,
) -> list[Resolved]:
    """One layer a leaf for fallback parameters, and one for what does not influence the output."""
    fallbacks = findings.fallbacks
    number = causes(fallbacks, space.size)
    free = (number > 0) & ~taken
    layers = []
    for scale, shift in norms.pairs_of(findings, free, space, selection):
        layers.append(Resolved(norms.layer_of(scale, shift, space)))
        taken[np.concatenate([scale, shift])] = True
    for leaf, (path, name) in enumerate(zip(space.paths, space.names, strict=True)):
        here = slice(space.offsets[leaf], space.offsets[leaf + 1])
        if here.start < here.stop and taken[here].all():
            continue
        ids = space.leaf_ids(leaf).ravel()
        mine = ids[(number[here] > 0) & ~taken[here]]
        idle = ids[(number[here] == 0) & ~taken[here]]
        if mine.size:
            cause = fallbacks[number[mine[0]] - 1]
            shape = space.shapes[leaf]
            tabular = cause.added and not space.is_complex(leaf)
            table = tables.layer_of(path, mine, shape[-1:]) if tabular else None
            whole = mine.size == ids.size and len(shape) > 1 and not space.is_complex(leaf)
            if table is not None and selection.joins(name, mine.size):
                layers.append(Resolved(table))
            elif whole and cause.makes_weight and selection.betters_diagonal(name, mine.size):
                layers.append(Resolved(made_layer(path, mine.reshape(1, -1, shape[-1]), cause)))
            else:
                kind = selection.block_of(name, mine.size, cause.reason)
                layers.append(vector_layer((path,), cause.pattern, kind, mine, cause.reason))
        if idle.size or not ids.size:
            pattern, reason = _why_idle(leaf, space, selection)
            layers.append(vector_layer((path,), pattern, "none", idle, reason))
    together = selection.curvature == "kronecker" and not selection.separate_weight_and_bias
    found = [resolved.layer for resolved in layers]
    return [Resolved(layer) for layer in (scalars.joined(found, space) if together else found)]


def made_layer(path: str, ids: Int[np.ndarray, "1 rows out"], cause: Fallback) -> Layer:
    """The layer of a matrix of parameters that has no uses, but gradients."""
    return Layer(
        name="",
        pattern=MADE,
        params=(path,),
        block="kronecker",
        in_features=ids.shape[1],
        out_features=ids.shape[2],
        reason=f"{cause.reason}; from second moments of both sides of its own gradients",
        segments=(make_segment(ids),),
    )


def _why_idle(leaf: int, space: ParameterSpace, selection: Selection) -> tuple[str, str]:
    """Pattern and reason of parameters in a leaf that have no curvature."""
    if 0 in space.shapes[leaf]:
        return "unused", "has no entries"
    if not selection.covers(space.names[leaf]):
        return FROZEN, "left out by `params_filter`: fixed at its value"
    if not jnp.issubdtype(space.dtypes[leaf], jnp.inexact):
        return "unused", "an integer leaf"
    return "unused", "does not influence the output"


def vector_layer(
    paths: tuple[str, ...],
    pattern: str,
    block: BlockKind,
    ids: Int[np.ndarray, " n"],
    reason: str,
) -> Resolved:
    """A layer of parameters that are no weight, in one leaf but for the block of all."""
    segments = (make_segment(ids),)
    return Resolved(Layer("", pattern, paths, block, ids.size, 1, reason=reason, segments=segments))


def _require_affordable(layer: Layer, most: int) -> None:
    if layer.block == "dense" and layer.size > most:
        msg = (
            f"the dense block of {', '.join(layer.params[:3])}"
            f"{' and others' if len(layer.params) > 3 else ''} would have {layer.size:,} "
            f"parameters; at most {most:,} are allowed. Lower `dense_limit`, leave parameters out "
            "by `params_filter` ('last_layer' for the last layer alone; a mask for a subnetwork), "
            "choose `curvature='kronecker'`, or raise `max_factor_size`."
        )
        raise ValueError(msg)
