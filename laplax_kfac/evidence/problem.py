"""What the evidence depends on besides the hyperparameters, and where these start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import require_positive
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.evidence.evidence import Evidence, log_marginal_likelihood
from laplax_kfac.evidence.fit import DataFit
from laplax_kfac.evidence.held_out import HeldOut, Validated
from laplax_kfac.posterior.posterior import Posterior, as_prior, make_posterior
from laplax_kfac.posterior.prior import Hyperparameters, Scalar, log_prior_determinant

PriorFunction = Callable[[PyTree], Any]
DEFAULT_BOUNDS = (1e-8, 1e8)


def identity(hyperparameters: PyTree) -> PyTree:
    """The prior precision is its own hyperparameter."""
    return hyperparameters


def start_of(
    prior_prec: Any, hyperparameters: PyTree, noise_variance: Any, *, tune_noise: bool = True
) -> tuple[Any, PyTree]:
    """The prior precision as a function of hyperparameters, and where all of them start."""
    prior_prec, noise_variance = Hyperparameters.split(prior_prec, noise_variance)
    if callable(prior_prec) != (hyperparameters is not None):
        msg = (
            "`hyperparameters` says where the arguments of a function `prior_prec` start: pass "
            f"both, or a start `prior_prec` alone; found `prior_prec` of type "
            f"{type(prior_prec).__name__} and `hyperparameters` {hyperparameters!r}."
        )
        raise ValueError(msg)
    if isinstance(as_prior(prior_prec), BlockDiagonal):
        msg = (
            "`prior_prec` is a matrix, which leaves nothing to tune in it: pass a function, such "
            "as `lambda h: make_posterior(curvature, h)` with `hyperparameters=1.0`, or "
            "`lambda _: posterior` with `hyperparameters=()` to tune the noise variance alone."
        )
        raise ValueError(msg)  # noqa: TRY004 (the type is right, for other functions)
    function = prior_prec if callable(prior_prec) else identity
    start = {"hyperparameters": hyperparameters if callable(prior_prec) else prior_prec}
    if noise_variance is not None and tune_noise:
        start["noise_variance"] = noise_variance
    if not jax.tree.leaves(start):
        msg = (
            "There is nothing to tune: `hyperparameters` is empty, and `noise_variance` is None or "
            "stays fixed."
        )
        raise ValueError(msg)
    return function, start


def check_start(start: PyTree, bounds: tuple[float, float], argument: str = "prior_prec") -> None:
    """Refuse starts that are known and not positive, or out of bounds.

    Args:
        start: Where hyperparameters and the noise variance start.
        bounds: Smallest and largest value.
        argument: What the hyperparameters were passed as.

    Raises:
        ValueError: If one is not positive, or out of bounds.
        TypeError: If one is no number.
    """
    names = {"hyperparameters": argument, "noise_variance": "noise_variance"}
    for name, values in start.items():
        for value in jax.tree.leaves(values):
            require_positive(names[name], value)
            if isinstance(value, jax.core.Tracer):
                continue
            if np.any(np.asarray(value) < bounds[0]) or np.any(np.asarray(value) > bounds[1]):
                msg = f"`{names[name]}` starts at {value}, outside `bounds` = {bounds}."
                raise ValueError(msg)


@pytrees.register
@dataclass(frozen=True)
class Problem:
    """What the evidence depends on besides the hyperparameters, and what is maximised instead.

    Attributes:
        curvature: The curvature.
        params: The trained parameters.
        log_likelihood: The fit, at its temperature.
        prior_mean: Mean of the prior.
        held_out: Predictions of what is maximised instead.
        noise_variance: A noise variance that stays as it is.
    """

    curvature: BlockDiagonal
    params: PyTree
    log_likelihood: DataFit
    prior_mean: PyTree | None
    held_out: HeldOut | None = None
    noise_variance: Scalar | None = None

    def noise(self, values: PyTree) -> Scalar | None:
        """The noise variance: one of the hyperparameters, or fixed."""
        noise_variance: Scalar | None = values.get("noise_variance", self.noise_variance)
        return noise_variance

    def value(self, function: PriorFunction, values: PyTree) -> Array:
        """What is maximised: the evidence, or how likely targets are that were held out."""
        if self.held_out is None:
            return self.evidence(function, values).value
        return self.held_out.score(self.posterior(function, values), self.noise(values))

    def posterior(self, function: PriorFunction, values: PyTree) -> Posterior:
        """The posterior with these hyperparameters."""
        factor = self.log_likelihood.loss_factor(self.noise(values))
        prior = function(values["hyperparameters"])
        return make_posterior(self.curvature, prior, sigma_squared=factor)

    def validated(self, function: PriorFunction, values: PyTree) -> Validated | None:
        """Predictions for data that were held out, if there are any."""
        if self.held_out is None:
            return None
        return self.held_out.validated(self.posterior(function, values), self.noise(values))

    def evidence(self, function: PriorFunction, values: PyTree) -> Evidence:
        """The evidence, with ``function`` the prior precision of ``values["hyperparameters"]``."""
        return log_marginal_likelihood(
            self.curvature,
            self.params,
            log_likelihood=self.log_likelihood,
            prior_prec=function(values["hyperparameters"]),
            prior_mean=self.prior_mean,
            noise_variance=self.noise(values),
        )

    def shares(self, function: PriorFunction, values: PyTree) -> Array:
        """Half the number of parameters, or of targets, that is governed by the values.

        Of held-out data, the number of examples, whichever hyperparameter it is.
        """
        if self.held_out is not None:
            logs = [jnp.sum(jnp.log(value)) for value in jax.tree.leaves(values)]
            return self.held_out.num_examples() * sum(logs, jnp.zeros(()))
        prior = as_prior(function(values["hyperparameters"]))
        targets = self.log_likelihood.num_outputs * jnp.log(values.get("noise_variance", 1.0))
        return 0.5 * (log_prior_determinant(prior, self.curvature) + targets)
