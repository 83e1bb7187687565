"""One forward pass, R pullbacks: the inputs of every layer and the cotangents at its outputs.

The program's jaxpr is evaluated with a zero added to the output of every use and to every parameter
without a Kronecker form. One ``jax.vjp`` with respect to all of these zero perturbations, vmapped
over the R vectors at the model's output, gives the cotangents; no gradient of a Kronecker layer's
parameters is ever formed.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

from laplax_kfac.capture.batches import Batch
from laplax_kfac.capture.evaluator import Inputs, run
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.capture.layer_io import Record
from laplax_kfac.capture.plan import (
    Perturbations,
    perturbations_of_parameters,
    perturbations_of_uses,
    perturbed,
    plan_of,
)
from laplax_kfac.capture.records import Sides, records_of, sides_of
from laplax_kfac.fisher import Columns
from laplax_kfac.parsing.layer import MADE, Layer
from laplax_kfac.parsing.program import Program

Values = tuple[Sequence[Array], Sequence[ArrayLike]]
"""Leaves of the parameters, and values of ``program.consts``."""


def capture(
    program: Program,
    values: Values | tuple[Sequence[Array], Sequence[ArrayLike], Sides],
    example: PyTree,
    vectors: Callable[[PyTree], PyTree] | None,
    *,
    by_units: bool = False,
    sequential: bool = False,
) -> tuple[PyTree, list[Record]]:
    """Evaluate the model on one example and pull ``vectors(output)`` back to all layers.

    Args:
        program: The parsed model.
        values: Leaves of the parameters, values of ``program.consts``, and what `sides_of` gives if
            it has been asked for already.
        example: One input without a batch axis.
        vectors: Output -> R vectors like the output, stacked in front; None pulls nothing back:
            the records then have R = 0.
        by_units: Whether to pull the unit vectors back and to combine the results. That makes a
            difference only for rules that are not linear: then it defines the Jacobian.
        sequential: Whether to pull them back one after another, not vmapped.

    Returns:
        The model's output, and for every layer what its uses, or its parameters, saw; None for a
        layer that does not influence the output.
    """
    leaves, consts = values[:2]
    sides = values[2] if len(values) == 3 else sides_of(program, leaves, consts)
    plan = plan_of(program)
    treedef = jax.tree.structure(program.output)

    def forward(perturbations: tuple[Perturbations, Perturbations]) -> tuple[list[Array], Inputs]:
        at_uses, at_parameters = perturbations
        moved = perturbed(program, leaves, at_parameters)
        arguments = [*consts, *moved, *jax.tree.leaves(example)]
        return run(program.jaxpr, arguments, plan, at_uses)

    zeros = (perturbations_of_uses(program), perturbations_of_parameters(program))
    if vectors is None:
        outputs, inputs = forward(zeros)
        none = jax.tree.map(lambda zero: jnp.zeros((0, *zero.shape), zero.dtype), zeros)
        records = records_of(program, inputs, none[0], none[1], sides)
        return jax.tree.unflatten(treedef, outputs), records
    outputs, pullback, inputs = jax.vjp(forward, zeros, has_aux=True)
    output = jax.tree.unflatten(treedef, outputs)
    wanted = jax.tree.leaves(vectors(output))
    pulled = jax.tree.leaves(unit_vectors(output)) if by_units else wanted
    cotangents = [_cotangent(v, o) for v, o in zip(pulled, outputs, strict=True)]
    if sequential:
        ((at_uses, at_parameters),) = lax.map(pullback, cotangents)
    elif len(pulled[0]) == 1:  # on a CPU, reductions beside an axis of one entry are slow
        (single,) = pullback([c.reshape(c.shape[1:]) for c in cotangents])
        at_uses, at_parameters = jax.tree.map(lambda g: g[None], single)
    else:
        ((at_uses, at_parameters),) = jax.vmap(pullback)(cotangents)
    if by_units:
        mix = jnp.concatenate([v.reshape(len(v), -1) for v in wanted], axis=1)  # (R, C)
        at_uses, at_parameters = jax.tree.map(
            lambda g: jnp.tensordot(mix.astype(g.dtype), g, 1, precision=lax.Precision.HIGHEST),
            (at_uses, at_parameters),
        )
    return output, records_of(program, inputs, at_uses, at_parameters, sides)


def unit_vectors(output: PyTree) -> PyTree:
    """The unit vectors at an output, stacked in front."""
    leaves, treedef = jax.tree.flatten(output)
    ends = np.cumsum([x.size for x in leaves])
    columns = jnp.split(jnp.eye(int(ends[-1])), ends[:-1], axis=1)
    parts = [c.reshape(-1, *x.shape) for c, x in zip(columns, leaves, strict=True)]
    return jax.tree.unflatten(treedef, parts)


def record_size(layer: Layer, pulled: int, *, inputs: bool = True) -> int:
    """Numbers that the record of one layer holds for one example.

    Args:
        layer: The layer.
        pulled: The number R of columns.
        inputs: Whether those of its inputs count.
    """
    gradients = 0 if layer.block == "none" else pulled * layer.size
    if not layer.is_matrix or layer.pattern == MADE:
        return gradients
    rows = 1 if layer.pattern == "embedding" else layer.rows
    each = (rows if inputs else 0) + pulled * layer.out_features
    uses = layer.positions * layer.stack * each
    return uses + (gradients if layer.block == "dense" else 0)


def _cotangent(vector: Array, output: Array) -> Array | np.ndarray:
    if jnp.issubdtype(output.dtype, jnp.inexact):
        return vector.astype(output.dtype)
    return np.zeros(vector.shape, jax.dtypes.float0)


# -- batches -------------------------------------------------------------------------------------


def capture_batch(
    program: Program,
    values: Values,
    batch: Batch,
    columns: Columns,
    *,
    keys: Key[Array, " N"],
    window: tuple[Int[Array, ""], int] | None = None,
) -> list[Record]:
    """`capture` every example of a batch; the records' leaves get a leading axis N.

    Args:
        program: The parsed model.
        values: Leaves of the parameters, and values of ``program.consts``.
        batch: The batch.
        columns: The vectors that are pulled back.
        keys: Random keys of the examples.
        window: The first column, and how many, if only some are pulled back; zeros beyond the last.
    """
    sides = sides_of(program, *values)  # here, for the examples may be worked on in a loop

    def one(
        example: tuple[PyTree, PyTree, Key[Array, ""]], *, sequential: bool = False
    ) -> list[Record]:
        x, y, key = example

        def vectors(f: PyTree) -> PyTree:
            everything = columns.vectors(key, f, y)
            return everything if window is None else _in_window(everything, *window)

        by_units = program.custom_vjp and columns.are_root(program.output, y)
        pulled = vectors if columns.pull_back else None
        everything = *values, sides
        return capture(program, everything, x, pulled, by_units=by_units, sequential=sequential)[1]

    return map_examples(one, (batch["input"], batch["target"], keys))


def _in_window(vectors: PyTree, first: Int[Array, ""], number: int) -> PyTree:
    def cut(v: Float[Array, "R *output"]) -> Float[Array, "number *output"]:
        padded = jnp.pad(v, [(0, number), *[(0, 0)] * (v.ndim - 1)])
        return lax.dynamic_slice_in_dim(padded, first, number)

    return jax.tree.map(cut, vectors)
