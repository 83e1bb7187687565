"""A function of logarithms that is climbed, and when the climb is over: one rule for all searches.

A search is over when a Newton step from where it stands would raise the value by no more than a
tolerance, in the units of the value: nats, for an evidence. With g the derivative and H the second
derivative in the logarithms that are free to move, that is half the squared Newton decrement,

    1/2 g^T (-H)^-1 g <= tolerance.

It means the same for any number of data and of hyperparameters. Derivatives relative to the value
do not: both grow with the data, and what is lost at a given ratio of them grows as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

DEFAULT_TOLERANCE = 1e-5
"""Nats that a search may still expect to gain where it ends."""
_MOST_DIRECTIONS = 20
"""Directions that the second derivative is looked at along, at most."""


class _Directions(NamedTuple):
    """State of the conjugate gradients."""

    residual: Float[Array, " d"]
    direction: Float[Array, " d"]
    gain: Float[Array, ""]
    last: Float[Array, ""]
    taken: Array


@dataclass(frozen=True)
class Hill:
    """A function of logarithms that is climbed, within bounds.

    Attributes:
        value: (logs) -> the value.
        limits: Least and largest logarithm.
        tolerance: How much the value may still be expected to rise at the end of a search.
        shares: About how sharp the optimum is along each coordinate: a scale for them.
    """

    value: Callable[[Array], Array]
    limits: Float[Array, "2"]
    tolerance: Float[Array, ""] | float
    shares: Float[Array, " d"]

    def inside(self, logs: Float[Array, "*any d"]) -> Float[Array, "*any d"]:
        """The nearest logarithms within the bounds."""
        return jnp.clip(logs, self.limits[0], self.limits[1])

    def at_bound(self, logs: Float[Array, " d"]) -> Bool[Array, " d"]:
        """Which logarithms are at a bound."""
        return (logs <= self.limits[0]) | (logs >= self.limits[1])

    def resolution(self, value: Float[Array, ""]) -> Float[Array, ""]:
        """The tolerance, or what rounding leaves of the value where that is more."""
        return jnp.maximum(self.tolerance, 4 * jnp.finfo(value.dtype).eps * jnp.abs(value))

    def is_top(self, logs: Float[Array, " d"], gradient: Float[Array, " d"]) -> Bool[Array, ""]:
        """Whether no step is expected to gain more than the tolerance; never where it is NaN."""
        value = self.value(logs)
        return self.expected_gain(logs, gradient) <= self.resolution(value)

    def expected_gain(
        self, logs: Float[Array, " d"], gradient: Float[Array, " d"]
    ) -> Float[Array, ""]:
        """By how much a Newton step would raise the value, within the bounds; from below.

        By conjugate gradients, which gain more with every direction and end when the gain is above
        the tolerance, or known to a tenth. Products with the second derivative are differences
        of derivatives: a value need not have a second derivative that JAX can form.
        """
        outwards = jnp.where(gradient > 0, logs >= self.limits[1], logs <= self.limits[0])
        scale = jnp.where(outwards, 0.0, jax.lax.rsqrt(self.shares))
        at = jax.value_and_grad(self.value)
        reach = self.limits[1] - self.limits[0]
        most = min(len(logs), _MOST_DIRECTIONS)
        small = jnp.finfo(logs.dtype).tiny

        def add(state: _Directions) -> _Directions:
            move = scale * state.direction
            length = jnp.maximum(jnp.max(jnp.abs(move)), small)
            step = jnp.cbrt(jnp.finfo(logs.dtype).eps) / length
            there, slope = at(logs + step * move)
            slope = jnp.where(jnp.isfinite(there), slope, jnp.nan)  # of a constant NaN it is zero
            product = scale * (gradient - slope) / step
            squared = state.residual @ state.residual
            sharpness = state.direction @ product
            # No further than from bound to bound, whatever the model says.
            way = jnp.where(sharpness > 0, squared / jnp.maximum(sharpness, small), jnp.inf)
            way = jnp.minimum(way, reach / length)
            gained = way * squared - 0.5 * way**2 * jnp.maximum(sharpness, 0.0)
            residual = state.residual - way * product
            direction = residual + residual @ residual / jnp.maximum(squared, small) * (
                state.direction
            )
            return _Directions(residual, direction, state.gain + gained, gained, state.taken + 1)

        def goes_on(state: _Directions) -> Array:
            known = (state.taken > 0) & (state.last <= 0.1 * state.gain)
            more = (state.taken < most) & (state.gain <= self.tolerance) & ~known
            return more & (jnp.max(jnp.abs(state.residual)) > 0)

        # Derivatives that are not finite go on into the gain.
        first = jnp.where(jnp.all(jnp.isfinite(gradient)), scale * gradient, jnp.nan)
        zero = jnp.zeros((), logs.dtype) * first[0]
        start = _Directions(first, first, zero, zero, jnp.zeros((), int))
        return jax.lax.while_loop(goes_on, add, start).gain


def pushed(hill: Hill, logs: Float[Array, " d"]) -> Float[Array, " d"]:
    """Take coordinates to the bound that they are on the way to, if the way goes on behind it.

    A concave value whose derivative still points outwards at a bound is best there. It may flatten
    out towards an optimum at infinity so much that a search ends half-way.
    """
    slope = jax.grad(hill.value)
    gradient = slope(logs)
    # Along such a way the derivative changes, over an e-fold, by no more than about itself. Near
    # an optimum it changes by more, and nothing has to be tried.
    step = jnp.cbrt(jnp.finfo(logs.dtype).eps)
    change = (slope(logs + step * jnp.sign(gradient)) - gradient) / step
    on_the_way = (gradient != 0) & (10 * jnp.abs(gradient) >= jnp.abs(change))

    def push(logs: Array, i: Array) -> tuple[Array, None]:
        moved = logs.at[i].set(jnp.where(gradient[i] > 0, hill.limits[1], hill.limits[0]))

        def tried(moved: Array) -> Any:
            return jnp.where(slope(moved)[i] * jnp.sign(gradient[i]) >= 0, moved, logs)

        return jax.lax.cond(on_the_way[i], tried, lambda _: logs, moved), None

    found = jax.lax.scan(push, logs, jnp.arange(len(logs)))[0]
    here, there = hill.value(logs), hill.value(found)
    return jnp.where(there >= here - hill.resolution(here), found, logs)
