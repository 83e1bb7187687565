"""Minimising any function of positive numbers, as `tune` does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from laplax_kfac.arguments import no_type_check, require_positive
from laplax_kfac.evidence.hill import DEFAULT_TOLERANCE, Hill, pushed
from laplax_kfac.evidence.problem import DEFAULT_BOUNDS, check_start
from laplax_kfac.evidence.search import DEFAULT_STEPS, checked_steps, climb


@no_type_check
def minimise(
    objective: Callable[[PyTree], Float[Array, ""]],
    start: PyTree,
    *,
    steps: int = DEFAULT_STEPS["lbfgs"],
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[PyTree, Bool[Array, ""]]:
    """Minimise any differentiable function of positive numbers, as `tune` does by ``"lbfgs"``.

    Args:
        objective: The function.
        start: Pytree of positive numbers.
        steps: Most steps.
        bounds: Smallest and largest value of every number.
        tolerance: By how much a Newton step may still be expected to lower the objective, in its
            own units, where the search ends; for one in nats the default loses nothing.

    Returns:
        The best values, and whether they were found: never where the objective is NaN.

    Raises:
        ValueError: If an option has no sense, if the start is not positive or out of bounds, or if
            the derivative there is zero or not finite.
    """
    checked_steps("lbfgs", steps, bounds)
    require_positive("tolerance", tolerance, shape=())
    check_start({"hyperparameters": start}, bounds, "start")
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

    # Only ratios matter, and the size of the numbers that the search works with.
    share = jnp.maximum(jnp.maximum(jnp.abs(size), jnp.max(jnp.abs(slope))), 1e-30) / len(logs)
    hill = Hill(value, limits, tolerance, jnp.full_like(logs, share))

    @jax.jit
    def search(logs: Array) -> tuple[Array, Array]:
        found, *_ = climb(hill, logs, optax.lbfgs(), steps)
        found = pushed(hill, found)
        return found, hill.is_top(found, jax.grad(value)(found))

    found, converged = search(logs)
    return jax.tree.map(jnp.exp, unravel(found)), converged
