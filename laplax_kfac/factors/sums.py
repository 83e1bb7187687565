"""Streaming statistics of all layers: sums over batches, to be added up and merged.

With layer inputs a (N, S, rows) and cotangents g (N, R, S, out), a Kronecker layer's block of the
curvature is ``A kron B / M`` (Eschenhagen et al. 2023, arXiv 2311.00636), where

* ``expand`` (their Eq. 17): A = sum_nt a a^T,  B = sum_nrt g g^T,  M = N S;
* ``reduce`` (their Eq. 22): A = sum_n a_n a_n^T with a_n = mean_t a, B likewise with
  g_nr = sum_t g, M = N.

Positions t of ``reduce`` are those of all uses of a weight; uses have sums of their own otherwise.
Sums are taken in float32, or float64 where x64 is on, at full matrix-product precision. Statistics
are sums, so they may be accumulated in any order, over any split of the data.
"""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laplax_kfac import pytrees
from laplax_kfac.bases import Sum
from laplax_kfac.faults import Faults, added
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace


@pytrees.register
@dataclass(frozen=True)
class KroneckerSums:
    """Sums of one Kronecker layer, with a leading axis over its U uses.

    Attributes:
        inputs: A, a sum of the kind of the layer's input side.
        outputs: B, a sum of the kind of its output side.
        count: M, shape (U, stack).
    """

    inputs: Sum
    outputs: Sum
    count: Float[Array, "*U stack"]


@pytrees.register
@dataclass(frozen=True)
class ParameterSums:
    """Sums of a layer without two sides.

    Attributes:
        gradients: Of g g^T (p, p) for a dense block, of g^2, in the layer's shape, for a diagonal.
    """

    gradients: Sum


Sums = KroneckerSums | ParameterSums | None


@pytrees.register
@dataclass(frozen=True)
class Statistics:
    """The state of an accumulation; without layers before the first update.

    Attributes:
        num_examples: Examples seen, each counted with its weight, a float scalar.
        num_updates: Updates made, an integer scalar: it tells the random keys of updates apart.
        sums: Sums of every layer.
        layers: The layers.
        space: Structure of the parameters.
        faults: What is wrong with the data so far, and which sums are not finite.
    """

    num_examples: Float[Array, ""]
    num_updates: Int[Array, ""]
    sums: tuple[Sums, ...]
    layers: tuple[Layer, ...] = field(metadata={"static": True})
    space: ParameterSpace | None = field(metadata={"static": True})
    faults: Faults = field(default_factory=Faults.none)


def empty_statistics() -> Statistics:
    """The state before any data: the neutral element of `merge`."""
    return Statistics(jnp.zeros(()), jnp.zeros((), jnp.int32), (), (), None)


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Statistics of the data of both.

    Raises:
        ValueError: If they are of different models.
    """
    if first.layers and second.layers:
        require_same_blocks(first, second)
        sums, faults = added((first.sums, first.faults), (second.sums, second.faults))
    else:
        seen = first if first.layers else second
        sums, faults = seen.sums, seen.faults
    return Statistics(
        first.num_examples + second.num_examples,
        first.num_updates + second.num_updates,
        sums,
        first.layers or second.layers,
        first.space or second.space,
        faults,
    )


def require_same_blocks(first: Statistics, second: Statistics) -> None:
    """Refuse statistics of two models; numbers of positions may differ between batches.

    Raises:
        ValueError: If the sums are of different blocks.
    """
    ours, theirs = ([replace(ly, positions=0) for ly in s.layers] for s in (first, second))
    if ours != theirs or first.space != second.space:
        msg = "`merge` needs statistics of one model; the layers of these two differ."
        raise ValueError(msg)
    if first.faults.of != second.faults.of:
        msg = "`merge` needs statistics of one loss; what these two take as targets differs."
        raise ValueError(msg)


def edge(layer: Layer, sums: Sums) -> list[Float[Array, "..."]]:
    """Some entries of a layer's sums: NaN or infinite wherever what was summed was."""
    if isinstance(sums, KroneckerSums):
        inputs, outputs = layer.kinds
        return [*inputs.edge(sums.inputs), *outputs.edge(sums.outputs)]
    return [] if sums is None else layer.kinds[0].edge(sums.gradients)


def nonfinite_layers(statistics: Statistics) -> list[str]:
    """Names of the layers whose sums are not finite."""
    return [
        layer.name
        for layer, sums in zip(statistics.layers, statistics.sums, strict=True)
        if not all(np.isfinite(x).all() for x in edge(layer, sums))
    ]


def mirrored(statistics: Statistics) -> Statistics:
    """Statistics with all entries of the matrices of which sums keep the upper tiles."""
    pairs = zip(statistics.layers, statistics.sums, strict=True)
    return replace(statistics, sums=tuple(_finished(*pair) for pair in pairs))


def _finished(layer: Layer, sums: Sums) -> Sums:
    if isinstance(sums, KroneckerSums):
        inputs, outputs = layer.kinds
        return replace(
            sums, inputs=inputs.finished(sums.inputs), outputs=outputs.finished(sums.outputs)
        )
    if sums is None:
        return None
    return ParameterSums(layer.kinds[0].finished(sums.gradients))
