"""Jacobians of layers in the eigenbases of their blocks, and their products with a covariance.

The Jacobian of output c in a Kronecker layer is ``G_c = sum_t a_t g_ct^T``, over the positions t of
a weight. In the eigenbases the posterior covariance is a diagonal V, so that two inputs have

    cov[c, c'] = sum_io G_c[i, o] G'_c'[i, o] V[i, o].

There are two orders of summation. ``DenseJacobian`` forms G, at C S numbers for every entry of the
weight. ``FactoredJacobian`` keeps a and g apart and sums over the rows first,

    cov[c, c'] = sum_tuo g_cto g'_c'uo W[t, u, o]     with   W[t, u, o] = sum_i a_ti a'_ui V[i, o],

at S^2 numbers for every entry of the weight: the cheaper one if there are fewer positions than
outputs, and with one position no numbers of the size of the weight are ever formed. The rows of a
table that a lookup picks (``PickedJacobian``) are the case in which a is a unit vector.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac import machine, pytrees
from laplax_kfac.arguments import positive_integer
from laplax_kfac.blocks.blocks import Block, rotate
from laplax_kfac.capture.batches import batch_size, even_batches, pad
from laplax_kfac.capture.capture import capture, record_size, unit_vectors
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.capture.layer_io import Cotangents, ParameterIO, Record, Rows
from laplax_kfac.capture.side_types import side_types
from laplax_kfac.curvature.memory import sum_bytes
from laplax_kfac.factors.gradients import gradient_matrices, rotated_uses
from laplax_kfac.parsing import cache_keys as fingerprint
from laplax_kfac.parsing.grouping import Resolved
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.program import ModelFn, Program

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@pytrees.register
@dataclass(frozen=True)
class DenseJacobian:
    """Jacobian of one example, entry by entry: shape (C, p)."""

    entries: Float[Array, "C p"]


@pytrees.register
@dataclass(frozen=True)
class FactoredJacobian:
    """Jacobian ``sum_t a_t g_ct^T`` of one example, as its inputs and cotangents."""

    inputs: Float[Array, "S stack rows"]
    gradients: Float[Array, "C S stack out"]


@pytrees.register
@dataclass(frozen=True)
class PickedJacobian:
    """Jacobian of one example in a table: row numbers, -1 for none, and the rows' cotangents."""

    rows: Int[Array, "S stack"]
    gradients: Float[Array, "C S stack out"]


Jacobian = DenseJacobian | FactoredJacobian | PickedJacobian


@pytrees.register
@dataclass(frozen=True)
class Linearised:
    """The model around one input; no prior. Of many inputs with a leading axis everywhere.

    Attributes:
        output: The model's output, raveled.
        jacobians: Jacobians of the layers that influence it, by number of the layer.
    """

    output: Float[Array, " C"]
    jacobians: dict[int, Jacobian]


def linearise(
    program: Program,
    leaves: Sequence[Array],
    consts: Sequence[ArrayLike],
    blocks: Sequence[Block],
    x: PyTree,
    *,
    sequential: bool = False,
) -> Linearised:
    """The model around one input.

    Args:
        program: The parsed model.
        leaves: Leaves of the parameters.
        consts: Values of ``program.consts``.
        blocks: A block of every layer, for the bases.
        x: One input, without a batch axis.
        sequential: Whether to do without vmap.
    """
    output, records = capture(program, (leaves, consts), x, unit_vectors, sequential=sequential)
    jacobians = {
        number: layer_jacobian(program.resolved[number], record, blocks[number])
        for number, record in enumerate(records)
        if record is not None
    }
    return Linearised(jnp.concatenate([o.ravel() for o in jax.tree.leaves(output)]), jacobians)


def layer_jacobian(resolved: Resolved, record: Record, block: Block) -> Jacobian:
    """Jacobian of one layer for one example, from unit vectors pulled back.

    Args:
        resolved: The layer.
        record: What `capture` saw of it; not None.
        block: Its block, for the basis.
    """
    if isinstance(record, ParameterIO):
        return DenseJacobian(jax.vmap(functools.partial(rotate, block))(record.gradients))
    assert record is not None
    outputs = record[0].num_columns
    form = form_of(resolved, outputs)
    if form is DenseJacobian and _is_rotated_last(resolved.layer, outputs):
        entries = gradient_matrices(rotated_uses(record))
        entries = entries.reshape(outputs, *block.eigenvalues.shape)
        rotated_entries = jax.vmap(functools.partial(rotate, block))(entries)
        return DenseJacobian(rotated_entries.reshape(outputs, -1))
    if form is DenseJacobian:
        matrices = gradient_matrices(rotated_uses(record, block.sides))
        return DenseJacobian(matrices.reshape(outputs, -1))
    inputs, basis = block.sides
    gradients = jnp.concatenate([use.gradients.rotated(basis) for use in record], axis=1)
    if form is PickedJacobian:
        rows = [use.inputs.numbers for use in record if isinstance(use.inputs, Rows)]
        return PickedJacobian(jnp.concatenate(rows), gradients)
    rotated = [use.inputs.rotated(inputs)[0] for use in record]
    return FactoredJacobian(jnp.concatenate(rotated), gradients)


def _is_rotated_last(layer: Layer, outputs: int) -> bool:
    """Whether to rotate the matrices, not the inputs and cotangents at more positions than they."""
    if layer.block == "dense":
        return True
    rows, out = layer.rows, layer.out_features
    matrices = outputs * rows * out * (rows + out)
    return matrices < layer.positions * (rows**2 + outputs * out**2)


def form_of(resolved: Resolved, outputs: int) -> type[Jacobian]:
    """The form that takes the fewest operations for a model with C = ``outputs`` outputs."""
    layer = resolved.layer
    if not resolved.members or layer.block == "dense":
        return DenseJacobian
    types = {side_types(member)[0] for member in resolved.members}
    if types == {Rows}:
        return PickedJacobian
    if types & {Rows, Cotangents} or Rows in {side_types(m)[1] for m in resolved.members}:
        return DenseJacobian
    positions, entries = layer.positions, layer.rows * layer.out_features
    outer = positions**2 * (entries + outputs * layer.out_features)
    outer += outputs**2 * positions * layer.out_features
    return FactoredJacobian if outer <= (positions + outputs) * outputs * entries else DenseJacobian


def num_elements(resolved: Resolved, outputs: int) -> tuple[int, int]:
    """How many numbers a layer's Jacobian takes, for an example, and its product, for a pair."""
    layer, form = resolved.layer, form_of(resolved, outputs)
    if layer.block == "none":
        return 0, 0
    if form is DenseJacobian:
        return 2 * outputs * layer.size, outputs**2
    places = layer.positions * layer.stack
    rows = layer.rows if form is FactoredJacobian else 1
    per_pair = layer.positions * places * (rows + 2 * layer.out_features)
    return (
        places * (rows + 2 * outputs * layer.out_features),
        per_pair + outputs * places * layer.out_features,
    )


def covariance(
    first: Jacobian, second: Jacobian, variances: Float[Array, "..."]
) -> Float[Array, "C C"]:
    """Covariance of the outputs for two examples, as far as one layer contributes to it.

    Args:
        first: Jacobian of the layer for one example.
        second: That for the other.
        variances: Posterior variances in the basis of the layer's block, in the block's shape.
    """
    if isinstance(first, DenseJacobian) and isinstance(second, DenseJacobian):
        weighted = first.entries * variances.reshape(-1)
        return jnp.matmul(weighted, second.entries.T, precision=jax.lax.Precision.HIGHEST)
    assert not isinstance(first, DenseJacobian)
    assert not isinstance(second, DenseJacobian)
    weighted = _weighted(first, second, variances)
    gradients = second.gradients.reshape(len(second.gradients), -1)
    return _einsum("cp,dp->cd", weighted.reshape(len(weighted), -1), gradients)


def variance(jacobian: Jacobian, variances: Float[Array, "..."]) -> Float[Array, " C"]:
    """Diagonal of the `covariance` of an example with itself."""
    if isinstance(jacobian, DenseJacobian):
        squares = jacobian.entries**2
        return jnp.matmul(squares, variances.reshape(-1), precision=jax.lax.Precision.HIGHEST)
    weighted = _weighted(jacobian, jacobian, variances)
    return jnp.sum(weighted * jacobian.gradients, axis=(1, 2, 3))


def _weighted(
    first: FactoredJacobian | PickedJacobian,
    second: FactoredJacobian | PickedJacobian,
    variances: Float[Array, "..."],
) -> Float[Array, "C S stack out"]:
    """The cotangents of the first, ``sum_t g_cto W[t, u, o]``, at the positions u of the second."""
    stack, out = first.gradients.shape[2:]
    variances = variances.reshape(stack, -1, out)
    if isinstance(first, FactoredJacobian) and isinstance(second, FactoredJacobian):
        products = first.inputs[:, None] * second.inputs[None]
        weights = _by_stack(products, variances)
    else:
        assert isinstance(first, PickedJacobian)
        assert isinstance(second, PickedJacobian)
        same = (first.rows[:, None] == second.rows[None]) & (first.rows[:, None] >= 0)
        picked = variances[jnp.arange(stack), first.rows]
        weights = picked[:, None] * same[..., None]
    return _einsum("ctko,tuko->cuko", first.gradients, weights)


def _by_stack(
    x: Float[Array, "*any stack i"], matrices: Float[Array, "stack i j"]
) -> Float[Array, "*any stack j"]:
    """Products with the matrix of each stack; no axis is moved if there is one."""
    if len(matrices) == 1:
        return jnp.matmul(x, matrices[0], precision=jax.lax.Precision.HIGHEST)
    return _einsum("...ki,kij->...kj", x, matrices)


# -- all layers --------------------------------------------------------------------------------


def output_covariance(
    first: Linearised, second: Linearised, variances: Sequence[Array]
) -> Float[Array, "C C"]:
    """Covariance between the outputs at two inputs.

    Args:
        first: The model around one input.
        second: The same around the other.
        variances: Posterior variances of every layer, in the basis of its block.
    """
    total = jnp.zeros((first.output.size, second.output.size))
    for number, jacobian in first.jacobians.items():
        total = total + covariance(jacobian, second.jacobians[number], variances[number])
    return total


def output_variance(linear: Linearised, variances: Sequence[Array]) -> Float[Array, " C"]:
    """Diagonal of the `output_covariance` of an input with itself."""
    total = jnp.zeros(linear.output.size)
    for number, jacobian in linear.jacobians.items():
        total = total + variance(jacobian, variances[number])
    return total


@functools.partial(jax.jit, static_argnames="diagonal")
def output_covariances(
    linear: Linearised, variances: Sequence[Array], *, diagonal: bool
) -> Float[Array, "N C *C"]:
    """Covariances of the outputs at many inputs, or their diagonals."""
    if diagonal:
        return jax.vmap(output_variance, in_axes=(0, None))(linear, variances)
    return jax.vmap(output_covariance, in_axes=(0, 0, None))(linear, linear, variances)


@jax.jit
def joint_output_covariances(
    first: Linearised, second: Linearised, variances: Sequence[Array]
) -> Float[Array, "M N C C"]:
    """Covariances between the outputs at any of M ``second`` and of N ``first`` inputs."""
    by_first = jax.vmap(output_covariance, in_axes=(0, None, None))
    return jax.vmap(by_first, in_axes=(None, 0, None))(first, second, variances)


# -- many inputs -------------------------------------------------------------------------------


class Expansion(NamedTuple):
    """What a model is linearised with, apart from the inputs: arguments of what is compiled."""

    leaves: list[Array]
    consts: list[ArrayLike]
    blocks: Sequence[Block]


def compiled_linearise(
    model_fn: ModelFn, program: Program
) -> Callable[[Expansion, PyTree], Linearised]:
    """`linearise` for many inputs, compiled once for a model that stays the same."""

    def make() -> Callable[[Expansion, PyTree], Linearised]:
        fixed = replace(program, consts=[])

        def linearise_all(expansion: Expansion, inputs: PyTree) -> Linearised:
            return map_examples(functools.partial(linearise, fixed, *expansion), inputs)

        return jax.jit(linearise_all)

    key = ("linearise", fingerprint.of_program(program))
    return fingerprint.kept(model_fn, program.consts, key, make)


def most_inputs(program: Program, most: object, *, traced: bool, pairs: bool = False) -> int:
    """Most inputs that are worked on at once: at least one, and at most ``most``.

    Their Jacobians and products fit into `Machine.record_bytes`. On a CPU they fit into memory that
    is used again for the next inputs, for new pages take as long as the work; but not in a compiled
    loop, where XLA's convolutions are slower by more than that.

    Args:
        program: The parsed model.
        most: The user's limit.
        traced: Whether the loop over the inputs is compiled.
        pairs: Whether Jacobians are multiplied for every pair of inputs.
    """
    outputs = sum(math.prod(o.shape) for o in jax.tree.leaves(program.output))
    linear = square = bases = 0
    for resolved in program.resolved:
        jacobian, product = num_elements(resolved, outputs)
        linear += record_size(resolved.layer, outputs) + jacobian
        square += product
        bases += sum_bytes(resolved.layer)
    room = num_that_fit(machine.MACHINE.record_bytes)
    if jax.default_backend() == "cpu" and not traced:
        room = min(
            room, num_that_fit(max(machine.MACHINE.reused_bytes, 4 * bases))
        )  # bases are read anew
    if pairs:  # n on either side: 2 linear n + square n^2 numbers
        fitting = (math.sqrt(linear**2 + square * room) - linear) / max(square, 1)
    else:
        fitting = room / max(linear + square, 1)
    return max(1, min(positive_integer("batch_size", most), int(fitting)))


def num_that_fit(size: int) -> int:
    """How many floating-point numbers fit into so many bytes."""
    return size // jnp.dtype(jnp.result_type(float)).itemsize


def in_chunks(function: Callable[[PyTree], Any], inputs: PyTree, most: int, *, traced: bool) -> Any:
    """Apply a function of many inputs to equal parts of at most ``most`` of them, in turn.

    Args:
        function: Of a pytree with a leading axis.
        inputs: The pytree.
        most: Largest part.
        traced: Whether a transformation is at work: the loop is then compiled as well.
    """
    count = batch_size({"input": inputs})
    parts = math.ceil(count / most)
    if parts == 1:
        return function(inputs)
    if not traced:
        stream = even_batches([{"input": inputs}], most)
        found = [function(part["input"]) for part, _ in stream]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[:count], *found)
    each = math.ceil(count / parts)
    padded, _ = pad({"input": inputs}, each * parts)
    split = jax.tree.map(lambda x: x.reshape(parts, each, *x.shape[1:]), padded["input"])
    # Recomputed in the backward pass, so that a gradient takes the memory of one part as well.
    results = jax.lax.map(jax.checkpoint(function, prevent_cse=False), split)
    return jax.tree.map(lambda x: x.reshape(parts * each, *x.shape[2:])[:count], results)
