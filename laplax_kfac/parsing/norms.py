"""Scale and shift of a norm layer, ``y = scale * x + shift``: one exact block for every feature.

Neither has a Kronecker form, for the gradient of feature k,

    (sum_t x_tk g_tk, sum_t g_tk)        over the positions t that share the parameters,

is elementwise. The block of the pair is 2 x 2, exact, and holds what the two diagonals lack: a
layer with two rows and one column, stacked over the features, whose inputs are these gradients and
whose gradients are 1: one position, at which the Kronecker product is exact.

Pairs get it in the place of diagonals. Small leaves have a dense block each.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from laplax_kfac.parsing.layer import NORM, Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import make_segment
from laplax_kfac.parsing.selection import Selection
from laplax_kfac.parsing.uses import Findings, Ids
from laplax_kfac.parsing.values import FOREIGN, Symbolic


def pair(scale: Symbolic | None, shift: Symbolic, findings: Findings) -> None:
    """Note which scale and which shift are in the same entries, one next to the other."""
    if scale is None:
        return
    both = np.broadcast_arrays(scale.index, shift.index)
    # Where an array is broadcast it repeats itself: one of its entries is enough.
    repeated = (all(x.strides[a] == 0 for x in both) for a in range(both[0].ndim))
    where = tuple(slice(0, 1) if r else slice(None) for r in repeated)
    scales, shifts = (x[where].ravel() for x in both)
    present = (scales != FOREIGN) & (shifts != FOREIGN)
    findings.pairs.append((scales[present], shifts[present]))


def pairs_of(
    findings: Findings, free: Bool[np.ndarray, " P"], space: ParameterSpace, selection: Selection
) -> Iterator[tuple[Ids, Ids]]:
    """Scales and shifts that get a block a pair: two whole leaves, one shift for every scale.

    Args:
        findings: What the walk found.
        free: Which parameters are in no layer, and influence the output.
        space: Structure of the parameters.
        selection: Which blocks are wanted.
    """
    found: dict[tuple[int, ...], list[tuple[Ids, Ids]]] = {}
    for scales, shifts in findings.pairs:
        leaves = *space.leaves_of(scales), *space.leaves_of(shifts)
        found.setdefault(leaves, []).append((scales, shifts))
    if selection.separate_weight_and_bias:
        return
    number = Counter(leaf for leaves in found for leaf in leaves)
    for leaves, pairs in found.items():
        if len(leaves) != 2 or any(number[leaf] > 1 for leaf in leaves):
            continue
        scale, shift = (space.leaf_ids(leaf).ravel() for leaf in leaves)
        scales, shifts = map(np.concatenate, zip(*pairs, strict=True))
        shift_of = np.full(scale.size, FOREIGN, scale.dtype)
        shift_of[scales - scale[0]] = shifts
        one_to_one = np.array_equal(np.sort(shift_of), shift)
        if (
            one_to_one
            and (shift_of[scales - scale[0]] == shifts).all()
            and free[scale].all()
            and free[shift].all()
            and len({space.dtypes[leaf] for leaf in leaves}) == 1
            and all(selection.joins(space.names[leaf], scale.size) for leaf in leaves)
        ):
            yield scale, shift_of


def layer_of(scale: Ids, shift: Ids, space: ParameterSpace) -> Layer:
    """The layer of a pair: the scale as a weight of one input, joint with its bias."""
    leaves = sorted(space.leaf_at(int(ids[0])) for ids in (scale, shift))
    return Layer(
        name="",
        pattern=NORM,
        params=tuple(space.paths[leaf] for leaf in leaves),
        block="kronecker",
        in_features=1,
        out_features=1,
        stack=scale.size,
        bias=True,
        reason="scale and shift of a norm layer: one exact block a feature",
        segments=tuple(make_segment(ids.reshape(-1, 1, 1)) for ids in (scale, shift)),
    )
