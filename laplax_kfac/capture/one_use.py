"""Several uses of a weight as one, with the positions of all; for a sum over uses is one, too."""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp

from laplax_kfac.capture.layer_io import Cotangents, Features, LayerIO, Rows, SideIO
from laplax_kfac.capture.matrix_io import MatrixIO


def as_one_use(record: tuple[LayerIO, ...]) -> tuple[LayerIO, ...]:
    """Uses of a weight as one with the positions of all; transposed uses for themselves.

    A function that is called twice, and two copies of it that are vmapped, then are the same. Real
    and imaginary parts are no positions: those of all uses are one use each.
    """
    if any(isinstance(use, MatrixIO) for use in record):
        return record
    groups: dict[tuple[bool, bool], list[LayerIO]] = {}
    for use in record:
        kind = isinstance(use.inputs, Cotangents), use.imaginary
        groups.setdefault(kind, []).append(use)
    return tuple(
        LayerIO(
            side_by_side([use.inputs for use in group]),
            side_by_side([use.gradients for use in group]),
            jnp.concatenate([use.active for use in group], axis=-2),
            imaginary,
        )
        for (_, imaginary), group in sorted(groups.items(), key=lambda item: item[0])
    )


def side_by_side(sides: Sequence[SideIO]) -> SideIO:
    """One side with the positions of several of one origin."""
    if len(sides) == 1:
        return sides[0]
    cotangents = [side.values for side in sides if isinstance(side, Cotangents)]
    if len(cotangents) == len(sides):
        return Cotangents(jnp.concatenate(cotangents, axis=-3))
    rows = [side for side in sides if isinstance(side, Rows)]
    if len(rows) == len(sides):
        numbers = jnp.concatenate([side.numbers for side in rows], axis=-2)
        return replace(rows[0], numbers=numbers)
    return Features(jnp.concatenate([side.features()[..., 0, :, :, :] for side in sides], axis=-3))
