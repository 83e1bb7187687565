"""Closed-form linearised predictive: output covariances without a parameter-sized vector.

Inputs are worked on in chunks of bounded memory, and all their Jacobians stay in the eigenbases of
the blocks (`jacobians`).
"""

from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import first_example
from laplax_kfac.curvature.matching import checked_inputs
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.program import ModelFn
from laplax_kfac.posterior.posterior import make_posterior
from laplax_kfac.posterior.prior import PriorPrecision, Scalar
from laplax_kfac.predictive.gaussians import Marginals, Predictive
from laplax_kfac.predictive.linear_model import LinearModel


@no_type_check
@on_automatic_axes
def predictive_covariance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    *,
    prior_prec: PriorPrecision,
    noise_variance: Scalar | None = None,
    sigma_squared: Scalar | None = None,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Predictive:
    """Covariance ``J Sigma J^T`` of the linearised model at new inputs (Immer et al. 2021).

    Works under ``jit``, and under ``grad`` and ``vmap`` in ``prior_prec`` and ``sigma_squared``;
    what does not depend on them is then computed once. Outside of these it is compiled once for a
    model and inputs of one shape.

    Args:
        curvature: What `kfac` or `ekfac` returned for this model.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        prior_prec: Prior precision, or what `tune` returned; see `make_posterior`.
        noise_variance: Variance of the Gaussian noise, for ``mse``; see `make_posterior`.
        sigma_squared: In place of it, 1 / (2 noise_variance).
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most inputs that are worked on at once; fewer if their Jacobians are large.

    Raises:
        ValueError: If the curvature is of another model, other parameters, or examples of other
            axes than ``inputs``; or if a number is not as it must be.
        TypeError: If an argument is of an unsupported type.
    """
    posterior = make_posterior(
        curvature, prior_prec, noise_variance=noise_variance, sigma_squared=sigma_squared
    )
    inputs = checked_inputs(curvature, params, inputs)["input"]
    model = LinearModel.of(posterior, model_fn, params, inputs, vmap_over_data=vmap_over_data)
    mean, covariance = model.spreads(batch_size, diagonal=False)
    return Predictive(model.in_output_shape(mean), covariance)


@no_type_check
@on_automatic_axes
def predictive_variance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    *,
    prior_prec: PriorPrecision,
    noise_variance: Scalar | None = None,
    sigma_squared: Scalar | None = None,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Marginals:
    """Variances of the linearised model: the diagonals of `predictive_covariance`.

    Cheaper where there are many outputs, for no C x C matrix is formed.

    Args:
        curvature: As for `predictive_covariance`, and so are all other arguments.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        prior_prec: Prior precision, or what `tune` returned; see `make_posterior`.
        noise_variance: Variance of the Gaussian noise, for ``mse``; see `make_posterior`.
        sigma_squared: In place of it, 1 / (2 noise_variance).
        vmap_over_data: Whether ``model_fn`` takes one example or a batch.
        batch_size: Most inputs that are worked on at once.

    Raises:
        ValueError: If the curvature is of another model, other parameters, or examples of other
            axes than ``inputs``; or if a number is not as it must be.
        TypeError: If an argument is of an unsupported type.
    """
    posterior = make_posterior(
        curvature, prior_prec, noise_variance=noise_variance, sigma_squared=sigma_squared
    )
    inputs = checked_inputs(curvature, params, inputs)["input"]
    model = LinearModel.of(posterior, model_fn, params, inputs, vmap_over_data=vmap_over_data)
    return Marginals(*map(model.in_output_shape, model.spreads(batch_size, diagonal=True)))


@no_type_check
@on_automatic_axes
def joint_covariance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    others: PyTree | None = None,
    *,
    prior_prec: PriorPrecision,
    noise_variance: Scalar | None = None,
    sigma_squared: Scalar | None = None,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Float[Array, "N C M C"]:
    """Covariance between the outputs at different inputs: the linearised model's GP kernel.

    The predictive of all inputs together is Gaussian, and this is its covariance.

    Args:
        curvature: As for `predictive_covariance`.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        others: Inputs with a leading axis M; ``inputs`` themselves by default.
        prior_prec: Prior precision, or what `tune` returned; see `make_posterior`.
        noise_variance: Variance of the Gaussian noise, for ``mse``; see `make_posterior`.
        sigma_squared: In place of it, 1 / (2 noise_variance).
        vmap_over_data: Whether ``model_fn`` takes one example or a batch.
        batch_size: Most inputs of either side that are worked on at once.

    Returns:
        Shape (N, C, M, C), with outputs raveled.

    Raises:
        ValueError: As for `predictive_covariance`, and if ``others`` are not like ``inputs``.
        TypeError: If an argument is of an unsupported type.
    """
    posterior = make_posterior(
        curvature, prior_prec, noise_variance=noise_variance, sigma_squared=sigma_squared
    )
    inputs = checked_inputs(curvature, params, inputs)["input"]
    model = LinearModel.of(posterior, model_fn, params, inputs, vmap_over_data=vmap_over_data)
    if others is not None:
        others = checked_inputs(curvature, params, others, "others")["input"]
        mine, theirs = (first_example({"input": x}) for x in (model.inputs, others))
        if _shapes(mine) != _shapes(theirs):
            msg = (
                "`others` must be like `inputs`, apart from their number: expected examples "
                f"{mine}, found {theirs}."
            )
            raise ValueError(msg)
    return model.joint(others, batch_size)


def _shapes(example: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(example)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
