"""Closed-form linearised predictive: output covariances without a parameter-sized vector.

The Jacobian of output c in a Kronecker layer is ``sum_t a_t g_ct^T``. In the eigenbases of the
layer's block the posterior covariance is diagonal, so

    cov[c, c'] = sum_ij G'_c[i, j] G'_c'[i, j] / D[i, j]     with  G'_c = U_A^T G_c U_B;

with one position ``G'_c = a' g'_c^T``, and the sum over i needs only the squares of a'.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

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
from laplax_kfac.matching import parse_like
from laplax_kfac.parser import ModelFn
from laplax_kfac.posterior import make_posterior
from laplax_kfac.prior import PriorPrecision, Scalar
from laplax_kfac.resolve import Resolved

_HIGHEST = jax.lax.Precision.HIGHEST


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
    batch_size: int = 64,
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
    size_of({"input": inputs})
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.result_type(x)), inputs)
    program = parse_like(curvature, model_fn, params, example, vmap_over_data=vmap_over_data)
    leaves = jax.tree.leaves(params)

    def one(x: PyTree, *, sequential: bool = False) -> Predictive:
        output, records = capture(
            program, leaves, program.consts, x, unit_vectors, sequential=sequential
        )
        flat = jnp.concatenate([jnp.ravel(o) for o in jax.tree.leaves(output)])
        parts = [
            _layer_covariance(r, record, block)
            for r, record, block in zip(program.resolved, records, precision.blocks, strict=True)
            if record is not None
        ]
        zero = jnp.zeros((flat.size, flat.size))
        return Predictive(flat, functools.reduce(jnp.add, parts, zero))

    return map_examples(one, inputs, batch_size)


def _layer_covariance(resolved: Resolved, record: Record, block: Block) -> Float[Array, "C C"]:
    """One layer's share of the output covariance of one example."""
    covariance = 1.0 / block.eigenvalues
    if isinstance(record, ParameterRecord):
        jacobian = jax.vmap(functools.partial(rotate, block))(record.gradients)
        product = jnp.matmul(jacobian * covariance, jacobian.conj().T, precision=_HIGHEST)
        return jnp.real(product)
    assert record is not None
    layer = resolved.layer
    if layer.block == "dense":
        matrices = gradient_matrices(resolved.members, rotated_records(resolved.members, record))
        jacobian = jax.vmap(functools.partial(rotate, block))(matrices.reshape(len(matrices), -1))
        return jnp.matmul(jacobian * covariance, jacobian.T, precision=_HIGHEST)
    covariance = covariance.reshape(layer.stack, layer.rows, layer.out_features)
    if is_lookup(resolved):
        rows, gradients, shares = lookup_gradients(record[0], block)
        picked = covariance[jnp.arange(layer.stack), rows] * ((rows >= 0) * shares)[..., None]
        return jnp.einsum("rtko,tko,stko->rs", gradients, picked, gradients, precision=_HIGHEST)
    rotated = rotated_records(resolved.members, record, block)
    if has_one_position(record):
        ((a, g),) = rotated
        weights = jnp.einsum("ki,kio->ko", a[0] ** 2, covariance, precision=_HIGHEST)
        return jnp.einsum("rko,ko,sko->rs", g[:, 0], weights, g[:, 0], precision=_HIGHEST)
    jacobian = gradient_matrices(resolved.members, rotated)
    return jnp.einsum("rkio,kio,skio->rs", jacobian, covariance, jacobian, precision=_HIGHEST)
