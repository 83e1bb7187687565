"""Tuning hyperparameters by the evidence, after the fit: no model, no data, no factorisation.

In the logarithms of the prior precisions and of the noise variance the negative evidence is convex:
its terms are exponentials of linear functions, linear functions, and ``log(exp + exp)`` of these
(``log(lambda f + tau)`` with ``f = 1 / (2 variance)``). So there is one optimum, at infinity only
where the data speak for none, and any start leads to it. The same holds for hyperparameters of
which the logarithms of all precisions are linear functions, such as one shared by several layers.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from laplax_kfac import pytrees
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.evidence.evidence import DataFit, Evidence, log_marginal_likelihood, require_fit
from laplax_kfac.posterior.posterior import as_prior
from laplax_kfac.posterior.prior import (
    PriorPrecision,
    Scalar,
    log_prior_determinant,
    prior_distance,
    require_positive,
)

Method = Literal["lbfgs", "adam", "grid"]
PriorFunction = Callable[[PyTree], Any]
DEFAULT_STEPS = {"lbfgs": 100, "adam": 1000, "grid": 33}
DEFAULT_BOUNDS = (1e-8, 1e8)
_ROUNDS = 6
"""Rounds of the grid: each is finer than the last, by a factor of 8 for 33 points."""


class BoundaryWarning(UserWarning):
    """A hyperparameter ended at a bound: the evidence has no optimum inside."""


@pytrees.register
@dataclass(frozen=True)
class Tuned:
    """Hyperparameters that maximise the evidence.

    Attributes:
        prior_prec: Prior precision, in the form it was given, or as the function returned it.
        noise_variance: Noise variance; None where the likelihood has none.
        evidence: The evidence there.
        trace: Evidence at every step, shape (steps,); it stays as it is after the last one that was
            needed. For the grid, the best so far after every round of every hyperparameter.
        converged: Whether the optimum was found: the derivative of the evidence in the logarithm
            of every hyperparameter is below the tolerance, relative to the terms that make it up
            (fit, distance to the prior, volume), or points out of the bounds.
        at_bound: Which hyperparameters ended at a bound: a dictionary with the entries
            ``"hyperparameters"`` (in the form of the start) and ``"noise_variance"``.
        hyperparameters: The hyperparameters, where ``prior_prec`` is a function of them.
    """

    prior_prec: PyTree
    noise_variance: Float[Array, ""] | None
    evidence: Evidence
    trace: Float[Array, " steps"]
    converged: Bool[Array, ""]
    at_bound: PyTree = None
    hyperparameters: PyTree = None


def tune(
    curvature: BlockDiagonal,
    params: PyTree,
    *,
    log_likelihood: DataFit,
    prior_prec: PriorPrecision | PriorFunction = 1.0,
    hyperparameters: PyTree = None,
    prior_mean: PyTree | None = None,
    noise_variance: Scalar | None = None,
    method: Method = "lbfgs",
    steps: int | None = None,
    learning_rate: float = 0.1,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    tolerance: float = 1e-3,
) -> Tuned:
    """Maximise the evidence in the prior precision, and in the noise variance if one is given.

    On the logarithms of the hyperparameters, in one compiled loop, which stops when it has
    converged. Works under ``jit``; compiled once for each ``prior_prec`` that is a function.

    Args:
        curvature: Curvature of the loss over the data.
        params: The trained parameters.
        log_likelihood: The fit to the same data, from `data_fit`.
        prior_prec: Where to start: a scalar, an array with one value a layer, or a pytree prefix
            of the parameters; every value is tuned (one for every feature costs decompositions at
            every step, though). Or a function of ``hyperparameters`` that
            returns one of these, or a `Posterior`.
        hyperparameters: Where to start if ``prior_prec`` is a function: a pytree of positive
            numbers, all of which are tuned. An empty one leaves the noise variance alone.
        prior_mean: Mean of the prior, a pytree like the parameters; zero by default.
        noise_variance: Where to start; None leaves it out.
        method: ``"lbfgs"``; ``"adam"``; or ``"grid"``, which needs no derivative: each
            hyperparameter in turn takes the best of ``steps`` values between the bounds, and again
            on ever finer grids.
        steps: Most steps, 100 for ``"lbfgs"`` and 1000 for ``"adam"``; points of the grid, 33.
        learning_rate: Step size of Adam, in natural logarithms; it decays to zero by a cosine.
        bounds: Smallest and largest value of every hyperparameter.
        tolerance: See `Tuned.converged`.

    Warns:
        BoundaryWarning: If a value ends at a bound, as for a layer that was pruned: its best
            precision is infinite. (Not under ``jit``; see `Tuned.at_bound`.)

    Raises:
        ValueError: If there is nothing to tune, an option has no sense, or a start is not positive
            or out of bounds.
        TypeError: If ``log_likelihood`` is no `DataFit`.
    """
    function, start = start_of(prior_prec, hyperparameters, noise_variance)
    require_fit(log_likelihood, noise_variance)
    steps = _checked_steps(method, steps, bounds)
    problem = Problem(curvature, params, log_likelihood, prior_mean)
    check_start(start, bounds)
    # Inside the loop the values are not known, and not refused.
    log_prior_determinant(as_prior(function(start["hyperparameters"])), curvature)
    logs = jax.tree.map(lambda v: jnp.log(jnp.asarray(v, jnp.result_type(float))), start)
    limits = jnp.log(jnp.asarray(bounds, jnp.result_type(float)))
    tuned = _tuned(problem, logs, limits, learning_rate, tolerance, function, method, steps)
    _warn_at_bounds(tuned, bounds)
    return tuned


def _identity(hyperparameters: PyTree) -> PyTree:
    return hyperparameters


def start_of(prior_prec: Any, hyperparameters: PyTree, noise_variance: Any) -> tuple[Any, PyTree]:
    """The prior precision as a function of hyperparameters, and where all of them start."""
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
    function = prior_prec if callable(prior_prec) else _identity
    start = {"hyperparameters": hyperparameters if callable(prior_prec) else prior_prec}
    if noise_variance is not None:
        start["noise_variance"] = noise_variance
    if not jax.tree.leaves(start):
        msg = "There is nothing to tune: `hyperparameters` is empty and `noise_variance` is None."
        raise ValueError(msg)
    return function, start


def _checked_steps(method: str, steps: int | None, bounds: tuple[float, float]) -> int:
    """Refuse options without sense, and fill in the number of steps."""
    if method not in DEFAULT_STEPS:
        msg = f"`method` must be one of {', '.join(map(repr, DEFAULT_STEPS))}; found {method!r}."
        raise ValueError(msg)
    low, high = bounds
    if not 0 < low < high < float("inf"):
        msg = f"`bounds` must be two positive numbers, the smaller one first; found {bounds}."
        raise ValueError(msg)
    steps = DEFAULT_STEPS[method] if steps is None else steps
    if steps < (5 if method == "grid" else 1):
        msg = f"`steps` must be a positive integer; for the grid, 5 or more; found {steps}."
        raise ValueError(msg)
    return steps


def check_start(start: PyTree, bounds: tuple[float, float]) -> None:
    """Refuse starts that are known and not positive, or out of bounds."""
    names = {"hyperparameters": "prior_prec", "noise_variance": "noise_variance"}
    for name, values in start.items():
        for value in jax.tree.leaves(values):
            require_positive(names[name], value)
            if isinstance(value, jax.core.Tracer):
                continue
            if np.any(np.asarray(value) < bounds[0]) or np.any(np.asarray(value) > bounds[1]):
                msg = f"`{names[name]}` starts at {value}, outside `bounds` = {bounds}."
                raise ValueError(msg)


def _warn_at_bounds(tuned: Tuned, bounds: tuple[float, float]) -> None:
    found, _ = jax.tree_util.tree_flatten_with_path(tuned.at_bound)
    if any(isinstance(flag, jax.core.Tracer) for _, flag in found):
        return
    named = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, flag in found
        if np.any(flag)
    ]
    if named:
        msg = (
            f"The evidence has no optimum between {bounds[0]:g} and {bounds[1]:g} in "
            f"{', '.join(named)}: the bound is returned. A prior precision without an upper one "
            "means that the data speak for no weight there: the layer is pruned."
        )
        warnings.warn(msg, BoundaryWarning, stacklevel=3)


def minimise(
    objective: Callable[[PyTree], Float[Array, ""]],
    start: PyTree,
    *,
    steps: int = DEFAULT_STEPS["lbfgs"],
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    tolerance: float = 1e-3,
) -> tuple[PyTree, Bool[Array, ""]]:
    """Minimise any differentiable function of positive numbers, as `tune` does by ``"lbfgs"``.

    Args:
        objective: The function.
        start: Pytree of positive numbers.
        steps: Most steps.
        bounds: Smallest and largest value of every number.
        tolerance: Largest derivative in the logarithm of a number, relative to the value.

    Returns:
        The best values, and whether they were found.

    Raises:
        ValueError: If an option has no sense, if the start is not positive or out of bounds, or if
            the derivative there is zero or not finite.
    """
    _checked_steps("lbfgs", steps, bounds)
    check_start({"hyperparameters": start}, bounds)
    logs, unravel = ravel_pytree(
        jax.tree.map(lambda v: jnp.log(jnp.asarray(v, jnp.result_type(float))), start)
    )
    limits = jnp.log(jnp.asarray(bounds, logs.dtype))

    def value(logs: Array) -> Array:
        return -objective(jax.tree.map(jnp.exp, unravel(logs)))

    size, slope = jax.jit(jax.value_and_grad(value))(logs)
    if not (np.all(np.isfinite(slope)) and np.any(slope)):
        msg = (
            f"The objective has the derivative {-slope} in the logarithms at the start, {start}: "
            "it is not differentiable there (a calibration error is not, anywhere); use a grid."
        )
        raise ValueError(msg)

    def unconverged(logs: Array, gradient: Array) -> Bool[Array, " d"]:
        outwards = jnp.where(gradient > 0, logs >= limits[1], logs <= limits[0])
        return ~((jnp.abs(gradient) <= tolerance * jnp.abs(value(logs))) | outwards)

    @jax.jit
    def search(logs: Array) -> tuple[Array, Array]:
        shares = jnp.full_like(logs, jnp.maximum(jnp.abs(size), 1e-30) / len(logs))
        found, *_ = _climb(value, unconverged, logs, limits, shares, optax.lbfgs(), steps)
        found = _pushed(value, unconverged, found, limits)
        return found, ~jnp.any(unconverged(found, jax.grad(value)(found)))

    found, converged = search(logs)
    return jax.tree.map(jnp.exp, unravel(found)), converged


# -- the compiled loop -------------------------------------------------------------------------


@pytrees.register
@dataclass(frozen=True)
class Problem:
    """What the evidence depends on besides the hyperparameters."""

    curvature: BlockDiagonal
    params: PyTree
    log_likelihood: DataFit
    prior_mean: PyTree | None

    def evidence(self, function: PriorFunction, values: PyTree) -> Evidence:
        """The evidence, with ``function`` the prior precision of ``values["hyperparameters"]``."""
        return log_marginal_likelihood(
            self.curvature,
            self.params,
            log_likelihood=self.log_likelihood,
            prior_prec=function(values["hyperparameters"]),
            prior_mean=self.prior_mean,
            noise_variance=values.get("noise_variance"),
        )

    def terms(self, function: PriorFunction, values: PyTree) -> tuple[Array, Array]:
        """Fit and distance to the prior, the terms of the evidence that cost nothing."""
        prior = as_prior(function(values["hyperparameters"]))
        distance = prior_distance(prior, self.curvature, self.params, self.prior_mean)
        return self.log_likelihood.log_likelihood(values.get("noise_variance")), -0.5 * distance

    def shares(self, function: PriorFunction, values: PyTree) -> Array:
        """Half the number of parameters, or of targets, that is governed by the values."""
        prior = as_prior(function(values["hyperparameters"]))
        targets = self.log_likelihood.num_outputs * jnp.log(values.get("noise_variance", 1.0))
        return 0.5 * (log_prior_determinant(prior, self.curvature) + targets)


@functools.partial(jax.jit, static_argnames=("function", "method", "steps"))
def _tuned(
    problem: Problem,
    start: PyTree,
    limits: Float[Array, "2"],
    learning_rate: Scalar,
    tolerance: Scalar,
    function: PriorFunction,
    method: Method,
    steps: int,
) -> Tuned:
    logs, unravel = ravel_pytree(start)

    def of_logs(quantity: Callable[..., Any]) -> Callable[[Array], Any]:
        return lambda logs: quantity(function, jax.tree.map(jnp.exp, unravel(logs)))

    evidence = of_logs(problem.evidence)

    def value(logs: Array) -> Array:
        return evidence(logs).value

    def value_and_evidence(logs: Array) -> tuple[Array, Evidence]:
        found = evidence(logs)
        return found.value, found

    def unconverged(logs: Array, gradient: Array) -> Bool[Array, " d"]:
        """Where the terms of the derivative do not cancel, and it does not point outwards."""
        fit, distance = jax.jacrev(of_logs(problem.terms))(logs)
        size = jnp.abs(fit) + jnp.abs(distance) + jnp.abs(gradient - fit - distance)
        outwards = jnp.where(gradient > 0, logs >= limits[1], logs <= limits[0])
        return ~((jnp.abs(gradient) <= tolerance * size) | outwards)

    if method == "grid":
        logs, trace = _grid(value, logs, limits, steps)
        taken = jnp.asarray(len(trace))
    else:
        shares = jnp.maximum(jnp.abs(jax.grad(of_logs(problem.shares))(logs)), 1.0)
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        # The usual b2 = 0.999 would remember the steep gradients far from the optimum all the way.
        optimizer = optax.adam(schedule, b2=0.9) if method == "adam" else optax.lbfgs()
        logs, trace, taken = _climb(value, unconverged, logs, limits, shares, optimizer, steps)
    logs = _pushed(value, unconverged, logs, limits)
    gradient, best = jax.grad(value_and_evidence, has_aux=True)(logs)
    converged = ~jnp.any(unconverged(logs, gradient))
    at_bound = unravel(((logs <= limits[0]) | (logs >= limits[1])).astype(logs.dtype))
    values = jax.tree.map(jnp.exp, unravel(logs))
    return Tuned(
        function(values["hyperparameters"]),
        values.get("noise_variance"),
        best,
        jnp.where(jnp.arange(len(trace)) < taken, trace, best.value),
        converged,
        jax.tree.map(lambda flag: flag > 0, at_bound),
        None if function is _identity else values["hyperparameters"],
    )


def _climb(
    value: Callable[[Array], Array],
    unconverged: Callable[[Array, Array], Array],
    start: Float[Array, " d"],
    limits: Float[Array, "2"],
    shares: Float[Array, " d"],
    optimizer: Any,
    steps: int,
) -> tuple[Float[Array, " d"], Float[Array, " steps"], Array]:
    """Climb from the start by optax; logs, the value before every step, and how many were taken.

    Coordinates are scaled by the roots of the numbers of parameters that they govern, which makes
    the optimum about as sharp in all of them. Out of bounds the value stays as it is at the bound,
    less a parabola: flat regions from which there is no way back would be left otherwise.
    """
    total = jnp.sum(shares)
    weights = jnp.sqrt(shares / total)

    def loss(scaled: Array) -> Array:
        logs = scaled / weights
        inside = jnp.clip(logs, limits[0], limits[1])
        return -value(inside) / total + 0.5 * jnp.sum((weights * (logs - inside)) ** 2)

    def step(state: Any) -> Any:
        scaled, inner, trace, taken, _ = state
        logs = scaled / weights
        inside = jnp.clip(logs, limits[0], limits[1])
        outside = weights * (logs - inside)
        here, gradient = jax.value_and_grad(value)(inside)
        unfinished = jnp.any(unconverged(inside, gradient))
        slope = outside - jnp.where(logs == inside, gradient, 0.0) / (total * weights)
        updates, inner = optimizer.update(
            slope,
            inner,
            scaled,
            value=0.5 * jnp.sum(outside**2) - here / total,
            grad=slope,
            value_fn=loss,
        )
        moved = jnp.where(unfinished, optax.apply_updates(scaled, updates), scaled)
        return moved, inner, trace.at[taken].set(here), taken + 1, unfinished

    def goes_on(state: Any) -> Array:
        *_, taken, unfinished = state
        return unfinished & (taken < steps)

    optimizer = optax.with_extra_args_support(optimizer)
    scaled, trace = start * weights, jnp.zeros(steps, start.dtype)
    first = scaled, optimizer.init(scaled), trace, jnp.zeros((), int), jnp.asarray(True)
    scaled, _, trace, taken, _ = jax.lax.while_loop(goes_on, step, first)
    return jnp.clip(scaled / weights, limits[0], limits[1]), trace, taken


def _grid(
    value: Callable[[Array], Array],
    start: Float[Array, " d"],
    limits: Float[Array, "2"],
    points: int,
) -> tuple[Float[Array, " d"], Float[Array, " searches"]]:
    """The best of a grid in each coordinate in turn; each round spans two spacings of the last."""
    sweeps = 1 if len(start) == 1 else 3
    rounds = np.repeat(np.arange(_ROUNDS), sweeps * len(start))
    coordinates = np.tile(np.arange(len(start)), sweeps * _ROUNDS)
    everywhere = limits[1] - limits[0]

    def search(logs: Array, turn: tuple[Array, Array]) -> tuple[Array, Array]:
        number, i = turn
        reach = 0.5 * everywhere * (4.0 / (points - 1)) ** number
        center = jnp.where(number == 0, jnp.mean(limits), logs[i])
        ends = jnp.clip(jnp.stack([center - reach, center + reach]), limits[0], limits[1])
        candidates = jnp.linspace(ends[0], ends[1], points)
        values = jax.lax.map(lambda c: value(logs.at[i].set(c)), candidates)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        best = jnp.argmax(values)
        return logs.at[i].set(candidates[best]), values[best]

    return jax.lax.scan(search, start, (jnp.asarray(rounds), jnp.asarray(coordinates)))


def _pushed(
    value: Callable[[Array], Array],
    unconverged: Callable[[Array, Array], Array],
    logs: Float[Array, " d"],
    limits: Float[Array, "2"],
) -> Float[Array, " d"]:
    """Take coordinates to the bound that they are on the way to, if the way goes on behind it.

    The evidence is concave, and may flatten out towards an optimum at infinity so much that
    rounding stops the search half-way.
    """
    slope = jax.grad(value)

    def push(logs: Array, i: Array) -> tuple[Array, None]:
        gradient = slope(logs)
        moved = logs.at[i].set(jnp.where(gradient[i] > 0, limits[1], limits[0]))
        goes_on = slope(moved)[i] * jnp.sign(gradient[i]) >= 0
        return jnp.where(unconverged(logs, gradient)[i] & goes_on, moved, logs), None

    return jax.lax.scan(push, logs, jnp.arange(len(logs)))[0]
