"""Single numbers of one module, as the gains of its branches or a temperature: one dense block.

A number that scales a branch has no Kronecker form, and its exact block is 1 x 1. A few of them in
one module have one block together, which takes nothing to speak of, and holds what is between them.
Numbers of different modules stay apart, so that each module can have a prior of its own.
"""

from dataclasses import replace

import numpy as np

from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import make_segment
from laplax_kfac.parsing.selection import DENSE_LIMIT


def joined(layers: list[Layer], space: ParameterSpace) -> list[Layer]:
    """Layers in which single numbers of one module and dtype are one layer, if they are few.

    Args:
        layers: Layers of parameters without a Kronecker form, at most one a leaf.
        space: Structure of the parameters.
    """
    groups: dict[tuple[str, str], list[Layer]] = {}
    kept: list[Layer] = []
    for layer in layers:
        if layer.size == 1 and layer.block == "dense" and not layer.is_matrix:
            leaf = space.leaf_at(layer.first)
            module = space.names[leaf].rpartition("/")[0]
            groups.setdefault((module, str(space.dtypes[leaf])), []).append(layer)
        else:
            kept.append(layer)
    for group in groups.values():
        if not 1 < len(group) <= DENSE_LIMIT:
            kept += group
            continue
        group = sorted(group, key=lambda layer: layer.first)
        kept.append(
            replace(
                group[0],
                pattern="+".join(sorted({layer.pattern for layer in group})),
                params=tuple(path for layer in group for path in layer.params),
                in_features=len(group),
                reason=f"{len(group)} single numbers, of which the first {group[0].reason}",
                segments=(make_segment(np.asarray([layer.first for layer in group])),),
            )
        )
    return kept
