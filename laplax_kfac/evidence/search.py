"""Searches for the best logarithms of hyperparameters: by derivatives, or on grids.

All work within bounds, in compiled loops. In the logarithms of prior precisions and noise variance
the negative evidence is convex (see `tuning`), so that any start leads to the optimum.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_bounds,
    require_choice,
)
from laplax_kfac.evidence.hill import Hill

Method = Literal["lbfgs", "adam", "grid"]
DEFAULT_STEPS = {"lbfgs": 100, "adam": 1000, "grid": 33}
_PARTS = 7
"""Parts of the noise that are compared, each half of the last."""
_ROUNDS = 6
"""Rounds of the grid: each is finer than the last, by a factor of 8 for 33 points."""


@no_type_check
def checked_steps(method: str, steps: int | None, bounds: tuple[float, float]) -> int:
    """Refuse options without sense, and fill in the number of steps."""
    require_choice("method", method, DEFAULT_STEPS)
    require_bounds(bounds)
    steps = DEFAULT_STEPS[method] if steps is None else steps
    return positive_integer("steps", steps, least=5 if method == "grid" else 1)


def climb(
    hill: Hill,
    start: Float[Array, " d"],
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[Float[Array, " d"], Float[Array, " steps"], Array]:
    """Climb from the start by optax; logs, the value before every step, and how many were taken.

    Coordinates are scaled by the roots of the numbers of parameters that they govern, which makes
    the optimum about as sharp in all of them. Out of bounds the value stays as it is at the bound,
    less a parabola: flat regions from which there is no way back would be left otherwise. Whether
    the top is reached is asked only where the last step gained little.
    """
    total = jnp.sum(hill.shares)
    weights = jnp.sqrt(hill.shares / total)

    def loss(scaled: Array) -> Array:
        logs = scaled / weights
        inside = hill.inside(logs)
        return -hill.value(inside) / total + 0.5 * jnp.sum((weights * (logs - inside)) ** 2)

    def step(state: Any) -> Any:
        scaled, inner, trace, taken, before, _ = state
        logs = scaled / weights
        inside = hill.inside(logs)
        outside = weights * (logs - inside)
        here, gradient = jax.value_and_grad(hill.value)(inside)
        close = ~(here - before > 10 * hill.resolution(here))
        unfinished = ~jax.lax.cond(
            close, hill.is_top, lambda *_: jnp.asarray(False), inside, gradient
        )
        slope = outside - jnp.where(logs == inside, gradient, 0.0) / (total * weights)
        updates, inner = with_extras.update(
            slope,
            inner,
            scaled,
            value=0.5 * jnp.sum(outside**2) - here / total,
            grad=slope,
            value_fn=loss,
        )
        moved = jnp.where(unfinished, optax.apply_updates(scaled, updates), scaled)
        unfinished = unfinished & jnp.any(moved != scaled)  # rounding may leave no step to take
        return moved, inner, trace.at[taken].set(here), taken + 1, here, unfinished

    def goes_on(state: Any) -> Array:
        *_, taken, _, unfinished = state
        return unfinished & (taken < steps)

    with_extras = optax.with_extra_args_support(optimizer)
    scaled, trace = start * weights, jnp.zeros(steps, start.dtype)
    nowhere = jnp.asarray(jnp.nan, start.dtype)
    first = scaled, with_extras.init(scaled), trace, jnp.zeros((), int), nowhere, jnp.asarray(True)
    scaled, _, trace, taken, *_ = jax.lax.while_loop(goes_on, step, first)
    return hill.inside(scaled / weights), trace, taken


def coarse(
    hill: Hill, start: Float[Array, " d"], moves: Float[Array, " d"], points: int
) -> Float[Array, " d"]:
    """The best of a line through the start: coordinates that move, by one distance, in all bounds.

    For what is not concave. A coordinate moves if its entry of ``moves`` is 1, and stays at 0.
    """
    center = jnp.sum(moves * start) / jnp.maximum(jnp.sum(moves), 1.0)
    offsets = jnp.linspace(hill.limits[0], hill.limits[1], points) - center
    candidates = hill.inside(start + offsets[:, None] * moves)
    candidates = jnp.concatenate([start[None], candidates])
    values = jax.lax.map(hill.value, candidates)
    return candidates[jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))]


def coarse_with_noise(
    hill: Hill,
    start: Float[Array, " d"],
    moves: Float[Array, " d"],
    is_noise: Float[Array, " d"],
    points: int,
) -> Float[Array, " d"]:
    """The same where a noise variance is among the coordinates, which does not move with others.

    Uncertainty of the parameters and noise explain the same errors. Noise that is too large leaves
    nothing to the parameters, so that the best line through it leads to certain ones, from where
    all derivatives vanish. So it is first found what noise explains the errors alone, which is the
    most there may be, and lines through it and through ever smaller parts of it are compared.
    """
    certain = jnp.where(moves > 0, hill.limits[1], start)
    most = coarse(hill, certain, is_noise, points)
    parts = hill.inside(most - jnp.log(2.0) * jnp.arange(_PARTS)[:, None] * is_noise)
    lines = jnp.where(moves > 0, start, jnp.concatenate([start[None], parts]))
    candidates = jax.lax.map(lambda line: coarse(hill, line, moves, points), lines)
    values = jax.lax.map(hill.value, candidates)
    return candidates[jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))]


def search_grid(
    hill: Hill, start: Float[Array, " d"], points: int
) -> tuple[Float[Array, " d"], Float[Array, " searches"]]:
    """The best of a grid in each coordinate in turn; each round spans two spacings of the last."""
    sweeps = 1 if len(start) == 1 else 3
    rounds = np.repeat(np.arange(_ROUNDS), sweeps * len(start))
    coordinates = np.tile(np.arange(len(start)), sweeps * _ROUNDS)
    everywhere = hill.limits[1] - hill.limits[0]

    def search(logs: Array, turn: tuple[Array, Array]) -> tuple[Array, Array]:
        number, i = turn
        reach = 0.5 * everywhere * (4.0 / (points - 1)) ** number
        center = jnp.where(number == 0, jnp.mean(hill.limits), logs[i])
        ends = hill.inside(jnp.stack([center - reach, center + reach]))
        candidates = jnp.linspace(ends[0], ends[1], points)
        values = jax.lax.map(lambda c: hill.value(logs.at[i].set(c)), candidates)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        best = jnp.argmax(values)
        return logs.at[i].set(candidates[best]), values[best]

    return jax.lax.scan(search, start, (jnp.asarray(rounds), jnp.asarray(coordinates)))
