"""Parsing a model again, so that its layers are the blocks of a curvature."""

import glob
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import Batch, batch_size, first_example, to_arrays
from laplax_kfac.parsing.entries import Entries
from laplax_kfac.parsing.layer import CHOSEN, MADE, NORM, TABLE, Layer
from laplax_kfac.parsing.program import ModelFn, Program, parse
from laplax_kfac.parsing.segments import Scattered
from laplax_kfac.parsing.selection import CurvatureKind, FactorLimit, Selection, Wanted


def parse_like(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    example: PyTree,
    *,
    vmap_over_data: bool = True,
) -> Program:
    """Parse a model so that its layers get the blocks that a curvature of it has.

    Args:
        curvature: The curvature.
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters; only shapes and dtypes matter.
        example: One input, without a batch axis; only shapes and dtypes matter.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.

    Raises:
        ValueError: If the curvature is of another model.
    """
    wanted = [_grouping(layer) for layer in curvature.layers]
    for separate in (False, True):
        selection = _selection_of(curvature, separate=separate)
        program = parse(
            model_fn, params, example, vmap_over_data=vmap_over_data, selection=selection
        )
        if [_grouping(layer) for layer in program.layers] == wanted:
            return _with_sides_of(curvature, program)
    msg = (
        "`curvature` is of another model: it has the layers "
        f"{[layer.name for layer in curvature.layers]}, `model_fn` has "
        f"{[layer.name for layer in program.layers]}."
    )
    raise ValueError(msg)


@no_type_check
def checked_inputs(
    curvature: BlockDiagonal, params: PyTree, inputs: PyTree, name: str = "inputs"
) -> Batch:
    """New inputs of a model with a curvature, as a batch.

    Args:
        curvature: The curvature.
        params: The parameters of the model.
        inputs: The inputs, with an axis of examples in front.
        name: The argument that they come from.

    Raises:
        ValueError: If the parameters are not those of the curvature, or the inputs are no batch, or
            have other axes than the examples that the curvature is of.
        TypeError: If the inputs are not made of numbers.
    """
    curvature.space.require_like(params, "params")
    batch = to_arrays({"input": inputs}, name)
    batch_size(batch, name)
    origin = getattr(curvature, "origin", None)
    found = tuple(x.ndim for x in jax.tree.leaves(first_example(batch)))
    if origin and origin.input_ranks and found != origin.input_ranks:
        msg = (
            f"`{name}` must have an axis of examples in front, and behind it the axes of the "
            f"examples that the curvature is of: {axes(origin.input_ranks)} an example, found "
            f"{axes(found)}."
        )
        raise ValueError(msg)
    return batch


def axes(ranks: tuple[int, ...]) -> str:
    """Numbers of axes in words."""
    if len(ranks) == 1:
        return f"{ranks[0]} {'axis' if ranks[0] == 1 else 'axes'}"
    return f"{len(ranks)} arrays with {', '.join(map(str, ranks))} axes"


def _with_sides_of(curvature: BlockDiagonal, program: Program) -> Program:
    """The program whose factors are of the kinds that the curvature's are of."""
    pairs = zip(program.resolved, curvature.layers, strict=True)
    resolved = (replace(r, layer=replace(r.layer, sides=layer.sides)) for r, layer in pairs)
    return replace(program, resolved=tuple(resolved))


def _grouping(layer: Layer) -> tuple[Any, ...]:
    probed = layer.block in ("none", "diagonal")  # a block "none" is a diagonal of zeros
    return layer.segments, "diagonal" if probed else layer.block, layer.stack


def _selection_of(curvature: BlockDiagonal, *, separate: bool) -> Selection:
    """The selection that gives every parameter the kind of block it has in the curvature.

    Parameters without curvature are probed as a diagonal: they have the variance of their prior.
    """
    chosen = [ly for ly in curvature.layers if ly.pattern == CHOSEN]
    if chosen:
        ids = np.concatenate([curvature.space.ids(ly.segments[0]) for ly in chosen])
        full = chosen[0].block == "dense"
        return Selection(
            curvature="full" if full else "diagonal", entries=Entries(Scattered(np.sort(ids)))
        )
    name_of = dict(zip(curvature.space.paths, curvature.space.names, strict=True))
    frozen = {name_of[p] for layer in curvature.layers if layer.frozen for p in layer.params}
    kinds: dict[str, Wanted] = {}
    for layer in curvature.layers:
        if not layer.is_matrix or layer.pattern in (NORM, TABLE, MADE):
            kind: Wanted = "dense" if layer.block == "dense" else "diagonal"
            kind = "joint" if layer.is_matrix else kind
            kinds.update({glob.escape(name_of[p]): kind for p in layer.params})
    return Selection(
        lambda path: path not in frozen,
        tuple(kinds.items()),
        dense_limit=curvature.space.size,
        separate_weight_and_bias=separate,
        curvature=_kind(curvature),
        limit=FactorLimit(max(1, curvature.space.size)),  # what was affordable once is again
    )


def _kind(curvature: BlockDiagonal) -> CurvatureKind:
    """What the weights of a curvature have: Kronecker, diagonal or dense blocks."""
    blocks = {layer.block for layer in curvature.layers if layer.is_matrix}
    if "kronecker" in blocks or not blocks:
        return "kronecker"
    return "block" if "dense" in blocks else "diagonal"
