"""Closed-form linearised predictive: output covariances without a parameter-sized vector.

The Jacobian of output c in a Kronecker layer is ``sum_t a_t g_ct^T``. In the eigenbases of the
layer's block the posterior covariance is diagonal, so

    cov[c, c'] = sum_ij G'_c[i, j] G'_c'[i, j] / D[i, j]     with  G'_c = U_A^T G_c U_B;

with one position ``G'_c = a' g'_c^T``, and the sum over i needs only the squares of a'.
"""

import functools
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac.blocks import Block, BlockDiagonal, rotate
from laplax_kfac.capture import ParameterRecord, Record, capture, map_examples, unit_vectors
from laplax_kfac.data import batch_size as size_of
from laplax_kfac.factors import (
    gradient_matrices,
    has_one_position,
    is_lookup,
    lookup_gradients,
    rotated_records,
)
from laplax_kfac.layers import Layer
from laplax_kfac.parser import ModelFn, Program, parse
from laplax_kfac.posterior import make_posterior
from laplax_kfac.prior import PriorPrecision, Scalar
from laplax_kfac.resolve import Resolved
from laplax_kfac.selection import Fallback, Selection

_HIGHEST = jax.lax.Precision.HIGHEST

DEFAULT_BATCH_SIZE = 64
PART_BYTES = 2**28
"""Most memory for the Jacobians of the inputs that are worked on at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Predictive:
    """Gaussian over the model's outputs, one for each input.

    Attributes:
        mean: The model's outputs, raveled: shape (N, C).
        covariance: Shape (N, C, C).
    """

    mean: Float[Array, "N C"]
    covariance: Float[Array, "N C C"]

    @property
    def variance(self) -> Float[Array, "N C"]:
        """Diagonal of the covariances."""
        return jnp.diagonal(self.covariance, axis1=-2, axis2=-1)


def predictive_covariance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    *,
    prior_prec: PriorPrecision,
    sigma_squared: Scalar = 1.0,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Predictive:
    """Covariance ``J Sigma J^T`` of the linearised model at new inputs (Immer et al. 2021).

    Works under ``jit``, and under ``grad`` in ``prior_prec`` and ``sigma_squared``.

    Args:
        curvature: What `kfac` or `ekfac` returned for this model.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        prior_prec: Prior precision.
        sigma_squared: Factor of the curvature.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Inputs that are worked on at once.

    Raises:
        ValueError: If the curvature is of another model.
    """
    precision = make_posterior(curvature, prior_prec, sigma_squared=sigma_squared).precision
    covariance = precision.map(jnp.reciprocal)
    size_of({"input": inputs})
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.result_type(x)), inputs)
    program = matching_program(curvature, model_fn, params, example, vmap_over_data=vmap_over_data)
    leaves = jax.tree.leaves(params)

    def one(x: PyTree, *, sequential: bool = False) -> Predictive:
        linear = linearize(program, leaves, curvature, x, sequential=sequential)
        return Predictive(linear.mean, output_covariance(linear, covariance))

    return map_examples(one, inputs, batch_size)


# -- the linearised model at one input, before any prior ---------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullJacobian:
    """Jacobian of C outputs in one layer, in the eigenbasis of its block.

    Attributes:
        values: Shape (C, ...), with the axes of the block's eigenvalues.
    """

    values: Float[Array, "C *axes"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OuterJacobian:
    """Jacobian of a layer with one position: ``inputs[k, i] * gradients[c, k, o]``.

    Attributes:
        inputs: The layer's input in the basis, shape (stack, rows).
        gradients: Its output's gradients in the basis, shape (C, stack, out).
    """

    inputs: Float[Array, "stack rows"]
    gradients: Float[Array, "C stack out"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LookupJacobian:
    """Jacobian of a layer whose inputs pick rows of its weight; see `lookup_gradients`.

    Attributes:
        rows: Numbers of the rows, -1 for none, shape (S, stack).
        gradients: The rows of the Jacobian, shape (C, S, stack, out).
        shares: What each counts, so that a row that is picked twice counts once, (S, stack).
    """

    rows: Int[Array, "S stack"]
    gradients: Float[Array, "C S stack out"]
    shares: Float[Array, "S stack"]


LayerJacobian = FullJacobian | OuterJacobian | LookupJacobian | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linearized:
    """The model at one input, linear in the parameters; it depends on no prior.

    Attributes:
        mean: The model's output, raveled.
        jacobians: Jacobian in every layer; None where the layer does not influence the output.
    """

    mean: Float[Array, " C"]
    jacobians: tuple[LayerJacobian, ...]


def linearize(
    program: Program,
    leaves: Sequence[Array],
    curvature: BlockDiagonal,
    x: PyTree,
    *,
    sequential: bool = False,
) -> Linearized:
    """Linearise the model at one input, in the eigenbases of a curvature or posterior.

    Args:
        program: The model, from `matching_program`.
        leaves: Leaves of the parameters.
        curvature: A matrix on the parameters; only its bases matter.
        x: One input.
        sequential: Whether to pull the outputs back one after another, not vmapped.
    """
    output, records = capture(
        program, leaves, program.consts, x, unit_vectors, sequential=sequential
    )
    flat = jnp.concatenate([jnp.ravel(o) for o in jax.tree.leaves(output)])
    layers = zip(program.resolved, records, curvature.blocks, strict=True)
    return Linearized(flat, tuple(_layer_jacobian(r, record, block) for r, record, block in layers))


def output_covariance(linear: Linearized, covariance: BlockDiagonal) -> Float[Array, "C C"]:
    """``J Sigma J^T`` of one linearised input, with Sigma in the bases it was linearised in."""
    return _contracted(linear, covariance, "rs")


def output_variance(linear: Linearized, covariance: BlockDiagonal) -> Float[Array, " C"]:
    """Diagonal of `output_covariance`, without the rest of it."""
    return _contracted(linear, covariance, "r")


def linearize_all(
    program: Program,
    leaves: Sequence[Array],
    curvature: BlockDiagonal,
    inputs: PyTree,
    *,
    most_bytes: int,
) -> PyTree:
    """`linearize` stacked inputs if that takes at most ``most_bytes``; else leave them as they are.

    What comes back is for `output_spreads`, with any number of priors.
    """
    size, parts = _sizes(program, leaves, curvature, inputs)
    if size > most_bytes:
        return inputs

    def one(x: PyTree, *, sequential: bool = False) -> Linearized:
        return linearize(program, leaves, curvature, x, sequential=sequential)

    return map_examples(one, inputs, parts)


def output_spreads(
    program: Program,
    leaves: Sequence[Array],
    covariance: BlockDiagonal,
    linearized: PyTree,
    *,
    diagonal: bool,
) -> Float[Array, "N C *C"]:
    """Output variances or covariances at many inputs, in parts of bounded memory.

    Args:
        program: The model, from `matching_program`.
        leaves: Leaves of the parameters.
        covariance: The posterior covariance.
        linearized: What `linearize_all` returned.
        diagonal: Whether variances are enough.
    """
    contract = output_variance if diagonal else output_covariance
    if isinstance(linearized, Linearized):
        return map_examples(
            lambda linear, **_: contract(linear, covariance), linearized, DEFAULT_BATCH_SIZE
        )

    def one(x: PyTree, *, sequential: bool = False) -> Float[Array, "..."]:
        return contract(
            linearize(program, leaves, covariance, x, sequential=sequential), covariance
        )

    return map_examples(one, linearized, _sizes(program, leaves, covariance, linearized)[1])


def _sizes(
    program: Program, leaves: Sequence[Array], curvature: BlockDiagonal, inputs: PyTree
) -> tuple[int, int]:
    """Bytes of the linearised model at all inputs, and how many to work on at once."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    linear = jax.eval_shape(
        lambda x: linearize(program, leaves, curvature, x, sequential=True), example
    )
    each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(linear))
    parts = max(1, min(DEFAULT_BATCH_SIZE, PART_BYTES // max(each, 1)))
    return each * size_of({"input": inputs}), parts


def _contracted(linear: Linearized, covariance: BlockDiagonal, axes: str) -> Float[Array, "..."]:
    """Sum over layers of their share of the covariance ("rs") or of its diagonal ("r")."""
    total = jnp.zeros((linear.mean.size,) * len(axes))
    for jacobian, block in zip(linear.jacobians, covariance.blocks, strict=True):
        if jacobian is not None:
            total = total + jnp.real(_layer_share(jacobian, block.eigenvalues, axes))
    return total


def _layer_jacobian(resolved: Resolved, record: Record, block: Block) -> LayerJacobian:
    if record is None:
        return None
    if isinstance(record, ParameterRecord):
        return FullJacobian(jax.vmap(functools.partial(rotate, block))(record.gradients))
    if is_lookup(resolved):
        return LookupJacobian(*lookup_gradients(record[0], block))
    rotated = rotated_records(resolved.members, record, block)
    if has_one_position(record):
        ((a, g),) = rotated
        return OuterJacobian(a[0], g[:, 0])
    matrices = gradient_matrices(resolved.members, rotated)
    return FullJacobian(matrices.reshape(len(matrices), *resolved.layer.shape))


def _layer_share(
    jacobian: FullJacobian | OuterJacobian | LookupJacobian,
    covariance: Float[Array, "*axes"],
    axes: str,
) -> Float[Array, "..."]:
    """Contract one layer's Jacobian with the covariance's eigenvalues.

    With one position ``J = a' g'^T``: the sum over its rows needs only the squares of a'.
    """
    other = axes[-1]  # "s" for all pairs of outputs, "r" for each with itself
    if isinstance(jacobian, FullJacobian):
        values = jacobian.values.reshape(len(jacobian.values), -1)
        weighted, conjugate = values * covariance.reshape(-1), values.conj()
        if axes == "r":
            return jnp.sum(weighted * conjugate, axis=-1)
        return jnp.matmul(weighted, conjugate.T, precision=_HIGHEST)
    g = jacobian.gradients
    covariance = covariance.reshape(g.shape[-2], -1, g.shape[-1])  # (stack, rows, out)
    if isinstance(jacobian, LookupJacobian):
        rows, kept = jacobian.rows, (jacobian.rows >= 0) * jacobian.shares
        picked = covariance[jnp.arange(rows.shape[-1]), rows] * kept[..., None]
        return jnp.einsum(f"rtko,tko,{other}tko->{axes}", g, picked, g, precision=_HIGHEST)
    weights = jnp.einsum("ki,kio->ko", jacobian.inputs**2, covariance, precision=_HIGHEST)
    return jnp.einsum(f"rko,ko,{other}ko->{axes}", g, weights, g, precision=_HIGHEST)


def matching_program(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    example: Any,
    *,
    vmap_over_data: bool = True,
) -> Program:
    """Parse the model with the blocks that the curvature has.

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
            return program
    msg = (
        "`curvature` is of another model: it has the layers "
        f"{[layer.name for layer in curvature.layers]}, `model_fn` has "
        f"{[layer.name for layer in program.layers]}."
    )
    raise ValueError(msg)


def _grouping(layer: Layer) -> tuple[Any, ...]:
    probed = layer.block in ("none", "diagonal")  # a block "none" is a diagonal of zeros
    return layer.segments, "diagonal" if probed else layer.block, layer.stack, layer.diagonal


def _selection_of(curvature: BlockDiagonal, *, separate: bool) -> Selection:
    """The selection that gives every parameter the kind of block it has in the curvature.

    Parameters without curvature are probed as a diagonal: they have the variance of their prior.
    """
    name_of = dict(zip(curvature.space.paths, curvature.space.names, strict=True))
    frozen = {name_of[p] for layer in curvature.layers if layer.frozen for p in layer.params}
    kinds: dict[str, Fallback] = {}
    for layer in curvature.layers:
        if layer.block != "kronecker":
            kind: Fallback = "dense" if layer.block == "dense" else "diagonal"
            kinds.update({glob.escape(name_of[p]): kind for p in layer.params})
    return Selection(
        lambda path: path not in frozen,
        tuple(kinds.items()),
        dense_limit=curvature.space.size,
        separate_weight_and_bias=separate,
    )
