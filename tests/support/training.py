"""Training for tests: one compiled loop."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree


def descended(
    loss: Callable[[PyTree], Array], params: PyTree, *, steps: int, learning_rate: float
) -> Any:
    """The parameters after some steps of Adam."""
    optimizer = optax.adam(learning_rate)

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, inner = state
        updates, inner = optimizer.update(jax.grad(loss)(params), inner)
        return (optax.apply_updates(params, updates), inner), None

    @jax.jit
    def descend(params: PyTree) -> Any:
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return descend(params)
