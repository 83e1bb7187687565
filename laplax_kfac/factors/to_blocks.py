"""From sums to blocks: the factors of every layer, and one eigendecomposition a factor."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from laplax_kfac.bases import UNROTATED, Kind, Sum, eigh_each
from laplax_kfac.bases.eigh import Eigh
from laplax_kfac.blocks.blocks import Block, block_of_sides, diagonal_block
from laplax_kfac.factors.nearest_kronecker import nearest_kronecker
from laplax_kfac.factors.sums import KroneckerSums, ParameterSums, Statistics, Sums
from laplax_kfac.parsing.layer import Layer


def finalize(statistics: Statistics) -> tuple[Block, ...]:
    """Blocks of every layer from the sums: one eigendecomposition a factor.

    Raises:
        ValueError: If the statistics have seen no data.
    """
    require_data(statistics)
    return _blocks(statistics, eigh_each(_matrices(statistics)))


def require_data(statistics: Statistics) -> None:
    """Refuse statistics that have seen no data, or no example that counts.

    Raises:
        ValueError: If they have not.
    """
    if not statistics.layers:
        msg = "`finalize` needs statistics of some data; call `update` first."
        raise ValueError(msg)
    count = statistics.num_examples
    if isinstance(count, jax.core.Tracer | jax.ShapeDtypeStruct):  # only shapes are known
        return
    if float(count) == 0:
        msg = "All weights in `data` are zero: no example is left to be a curvature of."
        raise ValueError(msg)


@jax.jit
def _matrices(statistics: Statistics) -> list[Array]:
    """The matrices to decompose, of all layers."""
    pairs = zip(statistics.layers, statistics.sums, strict=True)
    return [x for pair in pairs for kind, side in _sides(*pair) for x in kind.matrices(side)]


@jax.jit
def _blocks(statistics: Statistics, decomposed: Sequence[Eigh]) -> tuple[Block, ...]:
    """Blocks of all layers from the eigendecompositions of `_matrices`."""
    left, blocks = iter(decomposed), []
    for layer, sums in zip(statistics.layers, statistics.sums, strict=True):
        sides = []
        for kind, side in _sides(layer, sums):
            found = list(itertools.islice(left, len(kind.matrices(side))))
            sides.append(kind.eigenbasis(side, found))
        blocks.append(block_of_sides(sides) if sides else _block_of_parameters(layer, sums))
    return tuple(blocks)


def _sides(layer: Layer, sums: Sums) -> list[tuple[Kind, Sum]]:
    """Matrices whose Kronecker product is the layer's block, and their kinds."""
    if isinstance(sums, KroneckerSums):
        factors = _factors(layer, sums)
        if layer.stack == 1:
            factors = jax.tree.map(lambda x: x[0], factors)
        return list(zip(layer.kinds, factors, strict=True))
    if sums is not None and layer.block == "dense":
        return [(layer.kinds[0], sums.gradients)]
    return []


def _block_of_parameters(layer: Layer, sums: Sums) -> Block:
    """The diagonal block of a layer without such matrices."""
    if sums is None:
        return diagonal_block(jnp.zeros(layer.size))
    assert isinstance(sums, ParameterSums)
    return Block((UNROTATED,) * len(layer.kinds), sums.gradients)


def _factors(layer: Layer, sums: KroneckerSums) -> tuple[Sum, Sum]:
    """The two factors of a layer's block; their product is that of the curvature."""
    count = jnp.where(sums.count > 0, sums.count, 1.0)  # a branch never taken has zero sums
    means = jax.tree.map(
        lambda x: x / count.reshape(*count.shape, *[1] * (x.ndim - 2)), sums.inputs
    )
    return nearest_kronecker(layer.kinds, means, sums.outputs)


def kronecker_factors(statistics: Statistics) -> tuple[list[Sum | None], list[Sum | None]]:
    """Input factors and output factors of all layers; None for those without."""
    pairs = [
        _factors(layer, sums) if isinstance(sums, KroneckerSums) else (None, None)
        for layer, sums in zip(statistics.layers, statistics.sums, strict=True)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def with_kronecker_factors(
    statistics: Statistics, inputs: Sequence[Sum | None], outputs: Sequence[Sum | None]
) -> Statistics:
    """Statistics whose Kronecker layers have these factors."""
    sums: list[Sums] = []
    for layer, old, *new in zip(statistics.layers, statistics.sums, inputs, outputs, strict=True):
        if isinstance(old, KroneckerSums):
            first, second = jax.tree.map(lambda x: x[None], new)
            sums.append(KroneckerSums(first, second, jnp.ones((1, layer.stack))))
        else:
            sums.append(old)
    return replace(statistics, sums=tuple(sums))
