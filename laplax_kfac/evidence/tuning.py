"""Tuning hyperparameters by the evidence, after the fit: no model, no data, no factorisation.

In the logarithms of the prior precisions and of the noise variance the negative evidence is convex:
its terms are exponentials of linear functions, linear functions, and ``log(exp + exp)`` of these
(``log(lambda f + tau)`` with ``f = 1 / (2 variance)``). So there is one optimum, at infinity only
where the data speak for none, and any start leads to it. The same holds for hyperparameters of
which the logarithms of all precisions are linear functions, such as one shared by several layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import no_type_check, require_flags, require_positive, shown
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.blocks.merging import require_curvature
from laplax_kfac.evidence.evidence import Evidence
from laplax_kfac.evidence.fit import DataFit, require_fit
from laplax_kfac.evidence.held_out import MakesHeldOut, Validated
from laplax_kfac.evidence.hill import DEFAULT_TOLERANCE, Hill, pushed
from laplax_kfac.evidence.notices import warn_at_bounds, warn_of_frozen
from laplax_kfac.evidence.problem import (
    DEFAULT_BOUNDS,
    PriorFunction,
    Problem,
    check_start,
    identity,
    start_of,
)
from laplax_kfac.evidence.search import (
    DEFAULT_STEPS,
    Method,
    checked_steps,
    climb,
    coarse,
    coarse_with_noise,
    search_grid,
)
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.posterior.posterior import as_prior
from laplax_kfac.posterior.prior import (
    Hyperparameters,
    PriorPrecision,
    Scalar,
    log_prior_determinant,
    precision_matrix,
)


@pytrees.register
@dataclass(frozen=True)
class Tuned(Hyperparameters):
    """Hyperparameters that maximise the evidence, or what `tune` was given in its place.

    Attributes:
        prior_prec: Prior precision, in the form it was given, or as the function returned it.
        noise_variance: Noise variance; None where the likelihood has none.
        evidence: The evidence there.
        trace: What is maximised at every step, the evidence or the log-likelihood of all targets
            that were held out, shape (steps,); it stays as it is after the last one that was
            needed. For the grid, the best so far after every round of every hyperparameter.
        converged: Whether the optimum was found: a Newton step in the logarithms of the
            hyperparameters, within the bounds, would raise it by no more than the
            tolerance in nats, or than rounding leaves of it. Never where anything is NaN.
        at_bound: Which hyperparameters ended at a bound: a dictionary with the entries
            ``"hyperparameters"`` (in the form of the start) and ``"noise_variance"``.
        hyperparameters: The hyperparameters, where ``prior_prec`` is a function of them.
        validated: Predictions for the data that were held out, with ``validation``: what was
            minimised there, and how confident they are beside the parameters themselves.
        temperature: That of the likelihood.
    """

    prior_prec: PyTree
    noise_variance: Float[Array, ""] | None
    evidence: Evidence
    trace: Float[Array, " steps"]
    converged: Bool[Array, ""]
    at_bound: PyTree = None
    hyperparameters: PyTree = None
    validated: Validated | None = None
    temperature: Scalar | None = None


@no_type_check
@on_automatic_axes
def tune(
    curvature: BlockDiagonal,
    params: PyTree,
    *,
    log_likelihood: DataFit,
    prior_prec: PriorPrecision | PriorFunction = 1.0,
    hyperparameters: PyTree = None,
    prior_mean: PyTree | None = None,
    noise_variance: Scalar | None = None,
    tune_noise: bool = True,
    temperature: Scalar | None = None,
    validation: MakesHeldOut | None = None,
    method: Method = "lbfgs",
    steps: int | None = None,
    learning_rate: float = 0.1,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Tuned:
    """Maximise the evidence in the prior precision, and in the noise variance if one is given.

    On the logarithms of the hyperparameters, in one compiled loop, which stops when it has
    converged. Works under ``jit``; compiled once for each ``prior_prec`` that is a function.

    Of a classifier whose curvature covers all layers the evidence chooses a prior that tells
    strange inputs apart well, and makes predictions far less sure than they should be; for these
    pass ``validation``.

    Args:
        curvature: Curvature of the loss over the data.
        params: The trained parameters.
        log_likelihood: The fit to the same data, from `data_fit`.
        prior_prec: Where to start: a scalar, an array with one value a layer, or a pytree prefix
            of the parameters; every value is tuned (one for every feature costs decompositions at
            every step, though). Or a function of ``hyperparameters`` that
            returns one of these, or a `Posterior`. Or what `tune` returned before: from there on.
        hyperparameters: Where to start if ``prior_prec`` is a function: a pytree of positive
            numbers, all of which are tuned. An empty one leaves the noise variance alone.
        prior_mean: Mean of the prior, a pytree like the parameters; zero by default.
        noise_variance: Where to start; None leaves it out.
        tune_noise: Whether the noise variance is tuned; if not, it stays what it is.
        temperature: Temperature T of the likelihood, whose power 1/T takes its place. It stays what
            it is, and goes with the result wherever that is passed as ``prior_prec``.
        validation: A `Validation`, data that were held out: what is maximised is then their
            likelihood under the predictive, not the evidence, from the best of a few multiples
            of the start, and of the noise that explains their errors alone. For priors with one
            value a layer, or fewer.
        method: ``"lbfgs"``; ``"adam"``; or ``"grid"``, which needs no derivative: each
            hyperparameter in turn takes the best of ``steps`` values between the bounds, and again
            on ever finer grids.
        steps: Most steps, 100 for ``"lbfgs"`` and 1000 for ``"adam"``; points of the grid, 33.
        learning_rate: Step size of Adam, in natural logarithms; it decays to zero by a cosine.
        bounds: Smallest and largest value of every hyperparameter.
        tolerance: Nats that may still be expected at the end; see `Tuned.converged`.

    Warns:
        BoundaryWarning: If a value ends at a bound, as for a layer that was pruned: its best
            precision is infinite. (Not under ``jit``; see `Tuned.at_bound`.)
        UserWarning: If a noise variance is tuned though the curvature leaves parameters out, which
            were fitted to the data as well.

    Raises:
        ValueError: If there is nothing to tune, an option has no sense, or a start is not positive
            or out of bounds.
        TypeError: If ``log_likelihood`` is no `DataFit`.
    """
    require_curvature("curvature", curvature)
    curvature.space.require_like(params, "params")
    require_flags(tune_noise=tune_noise)
    temperature = Hyperparameters.temperature_of(prior_prec, temperature)
    function, start = start_of(prior_prec, hyperparameters, noise_variance, tune_noise=tune_noise)
    noise_variance = Hyperparameters.split(prior_prec, noise_variance)[1]
    require_fit(log_likelihood, noise_variance)
    steps = checked_steps(method, steps, bounds)
    require_positive("learning_rate", learning_rate, shape=())
    require_positive("tolerance", tolerance, shape=())
    check_start(start, bounds, "hyperparameters" if callable(prior_prec) else "prior_prec")
    held_out = None
    if validation is not None:
        if not isinstance(validation, MakesHeldOut):
            msg = f"`validation` must be a `Validation`, found {shown(validation)}."
            raise TypeError(msg)
        held_out = validation.of(curvature, params, gaussian=log_likelihood.gaussian)
    fixed = None if tune_noise else noise_variance
    fit = log_likelihood.at_temperature(temperature)
    problem = Problem(curvature, params, fit, prior_mean, held_out, fixed)
    # Inside the loop the values are not known, and not refused.
    prior = as_prior(function(start["hyperparameters"]))
    log_prior_determinant(prior, curvature)
    if held_out is not None and precision_matrix(prior, curvature) is not None:
        msg = "`validation` chooses priors with one value a layer or fewer; found a matrix."
        raise ValueError(msg)
    logs = jax.tree.map(lambda v: jnp.log(jnp.asarray(v, jnp.result_type(float))), start)
    limits = jnp.log(jnp.asarray(bounds, jnp.result_type(float)))
    tuned = _tuned(
        problem, logs, Controls(limits, learning_rate, tolerance), function, (method, steps)
    )
    if held_out is None:
        warn_at_bounds(tuned.at_bound, bounds)
        warn_of_frozen(curvature, start.get("noise_variance"))
    else:
        warn_at_bounds(tuned.at_bound, bounds, "likelihood of held-out data")
    return tuned


class Controls(NamedTuple):
    """Numbers that control a search; see `tune`."""

    limits: Float[Array, "2"]
    learning_rate: Scalar
    tolerance: Scalar


@functools.partial(jax.jit, static_argnames=("function", "search"))
def _tuned(
    problem: Problem,
    start: PyTree,
    controls: Controls,
    function: PriorFunction,
    search: tuple[Method, int],
) -> Tuned:
    (limits, learning_rate, tolerance), (method, steps) = controls, search
    logs, unravel = ravel_pytree(start)

    def of_logs(quantity: Callable[..., Any]) -> Callable[[Array], Any]:
        return lambda logs: quantity(function, jax.tree.map(jnp.exp, unravel(logs)))

    value = of_logs(problem.value)
    shares = jnp.maximum(jnp.abs(jax.grad(of_logs(problem.shares))(logs)), 1.0)
    hill = Hill(value, limits, tolerance, shares)
    if problem.held_out is not None:
        is_noise = jax.tree.map(jnp.zeros_like, start)
        is_noise |= {k: jnp.ones_like(v) for k, v in is_noise.items() if k == "noise_variance"}
        flags = ravel_pytree(is_noise)[0]
        points = DEFAULT_STEPS["grid"]
        if "noise_variance" in start:
            logs = coarse_with_noise(hill, logs, 1.0 - flags, flags, points)
        else:
            logs = coarse(hill, logs, jnp.ones_like(logs), points)
    if method == "grid":
        logs, trace = search_grid(hill, logs, steps)
        taken = jnp.asarray(len(trace))
    else:
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        # The usual b2 = 0.999 would remember the steep gradients far from the optimum all the way.
        optimizer = optax.adam(schedule, b2=0.9) if method == "adam" else optax.lbfgs()
        logs, trace, taken = climb(hill, logs, optimizer, steps)
    logs = pushed(hill, logs)
    best, gradient = jax.value_and_grad(value)(logs)
    # Comparisons with NaN are false, and the grid's derivative plays no part in its search.
    converged = hill.is_top(logs, gradient) & jnp.isfinite(best)
    at_bound = hill.at_bound(logs) & jnp.isfinite(gradient) & (gradient != 0)
    values = jax.tree.map(jnp.exp, unravel(logs))
    noise = problem.noise(values)
    return Tuned(
        function(values["hyperparameters"]),
        noise if noise is None else jnp.asarray(noise),
        problem.evidence(function, values),
        jnp.where(jnp.arange(len(trace)) < taken, trace, best),
        converged,
        jax.tree.map(lambda flag: flag > 0, unravel(at_bound.astype(logs.dtype))),
        None if function is identity else values["hyperparameters"],
        problem.validated(function, values),
        problem.log_likelihood.temperature,
    )
