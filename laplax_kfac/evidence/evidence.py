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

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from laplax_kfac import pytrees
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import Batch, batches, even_batches
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.curvature.kfac import DEFAULT_BATCH_SIZE
from laplax_kfac.likelihood.losses import resolve_likelihood
from laplax_kfac.parsing.program import ModelFn, per_example
from laplax_kfac.posterior.posterior import Posterior, as_prior, make_posterior
from laplax_kfac.posterior.prior import (
    PriorPrecision,
    Scalar,
    log_prior_determinant,
    per_block,
    precision_matrix,
    prior_distance,
    require_positive,
)


@pytrees.register
@dataclass(frozen=True)
class DataFit:
    """How well the trained parameters fit the data: all that the evidence needs of the data.

    Attributes:
        loss: Sum of the loss over the data.
        num_outputs: Number of scalar outputs over the data, N C; weighted as the loss is.
        gaussian: Whether the loss is ``mse``, so that it is a likelihood only with a noise
            variance. (`likelihood.gaussian` has one, and needs none here.)
    """

    loss: Float[Array, ""]
    num_outputs: Float[Array, ""]
    gaussian: bool = field(metadata={"static": True})

    def log_likelihood(self, noise_variance: Scalar | None = None) -> Float[Array, ""]:
        """Fit, log p(D | theta); ``mse`` is a Gaussian, of variance 1/2 where none is given."""
        if not self.gaussian:
            return -self.loss
        variance = 0.5 if noise_variance is None else noise_variance
        normaliser = 0.5 * self.num_outputs * jnp.log(2 * math.pi * variance)
        return -self.loss / (2 * variance) - normaliser

    def curvature_factor(self, noise_variance: Scalar | None = None) -> Scalar:
        """Curvature of the negative log-likelihood over that of the loss."""
        return 1.0 / (2 * noise_variance) if noise_variance is not None else 1.0


def data_fit(
    model_fn: ModelFn,
    params: PyTree,
    data: Any,
    *,
    loss_fn: Any,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    transform: Callable[[Any], Any] | None = None,
) -> DataFit:
    """Sum the loss over the data, in one streaming pass.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        data: One batch or an iterable of batches, as for `kfac`.
        loss_fn: As for `kfac`. A callable must be a negative log-likelihood, with its constants;
            so are the losses of `likelihood`.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most examples that are worked on at once.
        transform: Applied to every batch first.
    """
    compiled = jax.jit(fit_of_batch(model_fn, loss_fn, vmap_over_data=vmap_over_data))
    stream = even_batches(batches(data, transform), batch_size)
    return summed_fit(compiled(params, batch, weights) for batch, weights in stream)


def summed_fit(parts: Iterable[DataFit]) -> DataFit:
    """The fit to the data of all parts."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)


def fit_of_batch(
    model_fn: ModelFn, loss_fn: Any, *, vmap_over_data: bool
) -> Callable[[PyTree, Batch, Float[Array, " N"]], DataFit]:
    """The fit to one batch, as a function of the parameters, the batch, and weights of examples."""
    likelihood = resolve_likelihood(loss_fn)
    single = per_example(model_fn, vmap_over_data=vmap_over_data)

    def fit(params: PyTree, batch: Batch, weights: Float[Array, " N"]) -> DataFit:
        def one(example: tuple[PyTree, PyTree], *, sequential: bool = False) -> tuple[Array, Array]:
            del sequential  # one example has nothing to vmap
            x, y = example
            out = single(params, x)
            return likelihood.loss(out, y), likelihood.num_outputs(out, y)

        losses, sizes = map_examples(one, (batch["input"], batch["target"]))
        squared = likelihood.squared_error
        return DataFit(jnp.sum(losses * weights), jnp.sum(sizes * weights), squared)

    return fit


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
        log_likelihood: The fit to the same data, from `data_fit`.
        prior_prec: Prior precision tau: a scalar, an array with one value a layer, or a pytree
            prefix of the parameters. Or a matrix, which is added to the curvature by the rules of
            `merge` at every call: a pytree with one value for every parameter (or axes of length
            one: a feature, a unit), or the posterior of an earlier task.
        prior_mean: Mean of the prior, a pytree like the parameters: for the posterior of an earlier
            task, the parameters it was fitted at. Zero by default.
        noise_variance: Variance of the Gaussian noise, positive; only for ``mse``, 1/2 by default,
            for which the loss itself is the negative log-likelihood up to its constant.

    Raises:
        ValueError: If ``noise_variance`` is given for another loss than ``mse``, or if it or
            ``prior_prec`` is not positive.
        TypeError: If ``log_likelihood`` is no `DataFit`, or ``prior_prec`` is a function.
    """
    require_fit(log_likelihood, noise_variance)
    fit = log_likelihood.log_likelihood(noise_variance)
    factor = log_likelihood.curvature_factor(noise_variance)
    prior = as_prior(prior_prec)
    prior_determinant = log_prior_determinant(prior, curvature)
    if precision_matrix(prior, curvature) is not None:
        posterior = make_posterior(curvature, prior, sigma_squared=factor)
        growth = posterior.log_determinant() - prior_determinant
    else:
        growth = _growth(curvature, per_block(prior, curvature), factor)
    complexity = 0.5 * (prior_distance(prior, curvature, params, prior_mean) + growth)
    return Evidence(fit - complexity, fit, complexity, prior_determinant + growth)


def require_fit(log_likelihood: Any, noise_variance: Scalar | None) -> None:
    """Refuse what is no `DataFit`, and a noise variance that does not belong to it.

    Raises:
        TypeError: If ``log_likelihood`` is no `DataFit`.
        ValueError: If there is a noise variance and the loss is not ``mse``, or it is not positive.
    """
    if not isinstance(log_likelihood, DataFit):
        msg = f"`log_likelihood` must come from `data_fit`, got {type(log_likelihood).__name__}."
        raise TypeError(msg)
    if noise_variance is not None and not log_likelihood.gaussian:
        msg = "`noise_variance` belongs to the Gaussian likelihood of `mse`; leave it out here."
        raise ValueError(msg)
    if noise_variance is not None:
        require_positive("noise_variance", noise_variance)


def _growth(
    curvature: BlockDiagonal, prior_prec: Sequence[Scalar], factor: Scalar
) -> Float[Array, ""]:
    """By how much the data increase the log-determinant of the precision."""
    total = jnp.zeros(())
    for block, layer, value in zip(curvature.blocks, curvature.layers, prior_prec, strict=True):
        if not layer.frozen:
            total = total + jnp.sum(jnp.log(1.0 + (factor / value) * block.eigenvalues))
    return total
