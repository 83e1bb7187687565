"""The marginal likelihood (evidence) of the Laplace approximation.

    log p(D) = log p(D | theta) + log p(theta) + P/2 log(2 pi) - 1/2 log det(H + tau I)

at the trained parameters theta (MacKay 1992; Immer et al. 2021, arXiv 2104.04975, Eq. 6), with H
the curvature of the negative log-likelihood and tau the prior precision. The constants of prior and
volume cancel, which leaves, with m the mean of the prior and lambda the eigenvalues of H,

    log p(D | theta) - tau/2 ||theta - m||^2 - 1/2 sum log(1 + lambda / tau).

No large terms cancel in it, however few of the parameters the data determine. After the fit it
costs one pass over the eigenvalues, two with the gradient, and is differentiable in every
hyperparameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import no_type_check
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.blocks.merging import require_curvature
from laplax_kfac.evidence.fit import DataFit, require_fit
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.posterior.posterior import Posterior, as_prior, make_posterior, prior_mean_of
from laplax_kfac.posterior.prior import (
    Hyperparameters,
    PriorPrecision,
    Scalar,
    log_prior_determinant,
    per_block,
    precision_matrix,
    prior_distance,
)


@pytrees.register
@dataclass(frozen=True)
class Evidence:
    """A log marginal likelihood and its terms: ``value = log_likelihood - complexity``.

    Attributes:
        value: The log marginal likelihood.
        log_likelihood: The fit, log p(D | theta).
        complexity: ``tau/2 ||theta - mean||^2 - P/2 log tau + 1/2 log_determinant``, for a scalar
            tau.
        log_determinant: Of the posterior precision.
    """

    value: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    complexity: Float[Array, ""]
    log_determinant: Float[Array, ""]


@no_type_check
@on_automatic_axes
def log_marginal_likelihood(
    curvature: BlockDiagonal,
    params: PyTree,
    *,
    log_likelihood: DataFit,
    prior_prec: PriorPrecision | Posterior,
    prior_mean: PyTree | None = None,
    noise_variance: Scalar | None = None,
) -> Evidence:
    """Log evidence of the Laplace approximation at the trained parameters.

    Args:
        curvature: Curvature of the loss over the data, from `kfac` or `ekfac`.
        params: The trained parameters.
        log_likelihood: The fit to the same data, from `data_fit`; of a likelihood of temperature T,
            ``fit.at_temperature(T)``.
        prior_prec: Prior precision tau: a scalar, an array with one value a layer, or a pytree
            prefix of the parameters. Or a matrix, which is added to the curvature by the rules of
            `merge` at every call: a pytree with one value for every parameter (or axes of length
            one: a feature, a unit), or the posterior of an earlier task. Or what
            `tune` returned, with its noise variance.
        prior_mean: Mean of the prior, a pytree like the parameters: for the posterior of an earlier
            task, the parameters it was fitted at, by default if it knows them. Else zero.
        noise_variance: Variance of the Gaussian noise, positive; only for ``mse``, 1/2 by default,
            for which the loss itself is the negative log-likelihood up to its constant.

    Raises:
        ValueError: If ``noise_variance`` is given for another loss than ``mse``, or if it or
            ``prior_prec`` is not positive.
        TypeError: If ``log_likelihood`` is no `DataFit`, or ``prior_prec`` is a function.
    """
    require_curvature("curvature", curvature)
    temperature = Hyperparameters.temperature_of(prior_prec, None)
    prior_prec, noise_variance = Hyperparameters.split(prior_prec, noise_variance)
    prior_mean = prior_mean_of(prior_prec, prior_mean)
    require_fit(log_likelihood, noise_variance)
    tempered = log_likelihood
    if log_likelihood.temperature is None:
        tempered = log_likelihood.at_temperature(temperature)
    fit = tempered.log_likelihood(noise_variance)
    factor = tempered.loss_factor(noise_variance)
    prior = as_prior(prior_prec)
    prior_determinant = log_prior_determinant(prior, curvature)
    if precision_matrix(prior, curvature) is not None:
        posterior = make_posterior(curvature, prior, sigma_squared=factor)
        growth = posterior.log_determinant() - prior_determinant
    else:
        growth = _growth(curvature.of_scaled_loss(factor), per_block(prior, curvature))
    complexity = 0.5 * (prior_distance(prior, curvature, params, prior_mean) + growth)
    return Evidence(fit - complexity, fit, complexity, prior_determinant + growth)


def _growth(
    curvature: BlockDiagonal, prior_prec: Sequence[Scalar | Float[Array, "*block"]]
) -> Float[Array, ""]:
    """By how much the data increase the log-determinant of the precision."""
    total = jnp.zeros(())
    for block, layer, value in zip(curvature.blocks, curvature.layers, prior_prec, strict=True):
        if not layer.frozen:
            total = total + jnp.sum(jnp.log(1.0 + (1.0 / value) * block.eigenvalues))
    return total
