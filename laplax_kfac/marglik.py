"""The marginal likelihood (evidence) of the Laplace approximation, and tuning by it.

    log p(D) = log p(D | theta) + log p(theta) + P/2 log(2 pi) - 1/2 log det(H + tau I)

at the trained parameters theta (MacKay 1992; Immer et al. 2021, arXiv 2104.04975, Eq. 6), with H
the curvature of the negative log-likelihood and tau the prior precision. After the fit it costs
sums over eigenvalues only, and is differentiable in every hyperparameter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from laplax_kfac.blocks import BlockDiagonal
from laplax_kfac.capture import map_examples
from laplax_kfac.curvature import DEFAULT_BATCH_SIZE
from laplax_kfac.data import batches, even_batches
from laplax_kfac.likelihood import resolve_likelihood
from laplax_kfac.parser import ModelFn, per_example
from laplax_kfac.posterior import make_posterior
from laplax_kfac.prior import PriorPrecision, Scalar, log_prior, per_block, require_positive


@jax.tree_util.register_dataclass
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
    likelihood = resolve_likelihood(loss_fn)
    single = per_example(model_fn, vmap_over_data=vmap_over_data)

    @jax.jit
    def sums(params: PyTree, batch: Any, weights: Array) -> tuple[Array, Array]:
        def one(example: tuple[PyTree, PyTree], *, sequential: bool = False) -> tuple[Array, Array]:
            del sequential  # one example has nothing to vmap
            x, y = example
            out = single(params, x)
            return likelihood.loss(out, y), likelihood.num_outputs(out, y)

        losses, sizes = map_examples(one, (batch["input"], batch["target"]))
        return jnp.sum(losses * weights), jnp.sum(sizes * weights)

    loss, count = jnp.zeros(()), jnp.zeros(())
    for batch, weights in even_batches(batches(data, transform), batch_size):
        more_loss, more_count = sums(params, batch, weights)
        loss, count = loss + more_loss, count + more_count
    return DataFit(loss, count, likelihood.squared_error)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """A log marginal likelihood and its terms: ``value = log_likelihood - complexity``.

    Attributes:
        value: The log marginal likelihood.
        log_likelihood: The fit, log p(D | theta).
        complexity: ``tau/2 ||theta||^2 - P/2 log tau + 1/2 log_determinant``, for a scalar tau.
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
    prior_prec: PriorPrecision,
    noise_variance: Scalar | None = None,
) -> Evidence:
    """Log evidence of the Laplace approximation at the trained parameters.

    Args:
        curvature: Curvature of the loss over the data, from `kfac` or `ekfac`.
        params: The trained parameters.
        log_likelihood: The fit to the same data, from `data_fit`.
        prior_prec: Prior precision tau: a scalar, an array with one value a layer, or a pytree
            prefix of the parameters.
        noise_variance: Variance of the Gaussian noise, positive; only for ``mse``, 1/2 by default,
            for which the loss itself is the negative log-likelihood up to its constant.

    Raises:
        ValueError: If ``noise_variance`` is given for another loss than ``mse``, or if it or
            ``prior_prec`` is not positive.
        TypeError: If ``log_likelihood`` is no `DataFit`.
    """
    if not isinstance(log_likelihood, DataFit):
        msg = f"`log_likelihood` must come from `data_fit`, got {type(log_likelihood).__name__}."
        raise TypeError(msg)
    if noise_variance is not None and not log_likelihood.gaussian:
        msg = "`noise_variance` belongs to the Gaussian likelihood of `mse`; leave it out here."
        raise ValueError(msg)
    if noise_variance is not None:
        require_positive("noise_variance", noise_variance)
    factor = log_likelihood.curvature_factor(noise_variance)
    posterior = make_posterior(curvature, prior_prec, sigma_squared=factor)
    determinant = posterior.log_determinant()
    volume = 0.5 * (curvature.num_free() * jnp.log(2 * jnp.pi) - determinant)
    complexity = -log_prior(prior_prec, curvature, params) - volume
    fit = log_likelihood.log_likelihood(noise_variance)
    return Evidence(fit - complexity, fit, complexity, determinant)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tuned:
    """Hyperparameters that maximise the evidence.

    Attributes:
        prior_prec: Prior precision, in the form it was given.
        noise_variance: Noise variance; None where the likelihood has none.
        evidence: The evidence there.
        trace: Evidence at every step, shape (steps,).
        converged: Whether the gradient in log hyperparameters fell below the tolerance, relative
            to the number of parameters.
    """

    prior_prec: PyTree
    noise_variance: Float[Array, ""] | None
    evidence: Evidence
    trace: Float[Array, " steps"]
    converged: Array


def tune(
    curvature: BlockDiagonal,
    params: PyTree,
    *,
    log_likelihood: DataFit,
    prior_prec: PriorPrecision = 1.0,
    noise_variance: Scalar | None = None,
    steps: int = 300,
    learning_rate: float = 0.1,
    tolerance: float = 1e-4,
) -> Tuned:
    """Maximise the evidence in the prior precision, and in the noise variance if one is given.

    Adam on the logarithms of the hyperparameters, in one compiled loop; no factorisation.

    Args:
        curvature: Curvature of the loss over the data.
        params: The trained parameters.
        log_likelihood: The fit to the same data, from `data_fit`.
        prior_prec: Where to start: a scalar, an array with one value a layer, or a pytree prefix
            of the parameters; every value is tuned.
        noise_variance: Where to start; None leaves it out.
        steps: Steps of Adam.
        learning_rate: Its step size, in natural logarithms; it decays to zero by a cosine.
        tolerance: See `Tuned.converged`.
    """
    per_block(prior_prec, curvature)  # inside the loop its values are not known
    start = {"prior_prec": _logarithms(prior_prec)}
    if noise_variance is not None:
        require_positive("noise_variance", noise_variance)
        start["noise_variance"] = _logarithms(noise_variance)
    # The usual b2 = 0.999 would remember the steep gradients far from the optimum all the way.
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps), b2=0.9)

    def evidence(logs: dict[str, PyTree], curvature: BlockDiagonal, params: PyTree) -> Evidence:
        values = jax.tree.map(jnp.exp, logs)
        return log_marginal_likelihood(curvature, params, log_likelihood=log_likelihood, **values)

    def loss(logs: dict[str, PyTree], curvature: BlockDiagonal, params: PyTree) -> Array:
        return -evidence(logs, curvature, params).value

    @jax.jit
    def optimise(curvature: BlockDiagonal, params: PyTree) -> tuple[Any, Array, Array, Evidence]:
        def step(state: Any, _: None) -> tuple[Any, Array]:
            logs, inner = state
            value, gradient = jax.value_and_grad(loss)(logs, curvature, params)
            updates, inner = optimizer.update(gradient, inner)
            return (optax.apply_updates(logs, updates), inner), -value

        (logs, _), trace = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
        gradient = jax.grad(loss)(logs, curvature, params)
        sizes = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]
        steepest = jnp.max(jnp.stack(sizes))
        return (
            logs,
            trace,
            steepest < tolerance * curvature.num_free(),
            evidence(logs, curvature, params),
        )

    logs, trace, converged, best = optimise(curvature, params)
    values = jax.tree.map(jnp.exp, logs)
    return Tuned(values["prior_prec"], values.get("noise_variance"), best, trace, converged)


def _logarithms(values: PyTree) -> PyTree:
    return jax.tree.map(lambda v: jnp.log(jnp.asarray(v, jnp.result_type(float))), values)
