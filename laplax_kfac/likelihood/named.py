"""Names of losses, as laplax has them, and what else may stand for a likelihood."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.likelihood.classes import bernoulli, categorical
from laplax_kfac.likelihood.differentiation import differentiated
from laplax_kfac.likelihood.gaussian import squared_error
from laplax_kfac.likelihood.record import Likelihood

Loss = str | Likelihood | Callable[[PyTree, PyTree], Any]
"""What users pass as ``loss_fn``; laplax's ``LossFn`` is a string."""


@no_type_check
def resolve_likelihood(loss_fn: Loss) -> Likelihood:
    """The likelihood of a laplax ``LossFn``, its string, a callable ``loss(f, y)``, or itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a callable nor a `Likelihood`.
    """
    if isinstance(loss_fn, Likelihood):
        return loss_fn
    if isinstance(loss_fn, str):
        name = str(loss_fn).lower()
        if name not in NAMED:
            msg = (
                f"`loss_fn` is {loss_fn!r}; expected one of {sorted(NAMED)}, a callable, or a "
                "`Likelihood`."
            )
            raise ValueError(msg)
        return NAMED[name]
    if callable(loss_fn):
        return _from_callable(loss_fn)
    msg = (
        f"`loss_fn` must be a laplax LossFn, its string, or a callable `loss(output, target)` of "
        f"one example (or a `Likelihood`); got {type(loss_fn).__name__}."
    )
    raise TypeError(msg)


def _from_callable(loss_fn: Callable[[PyTree, PyTree], Any]) -> Likelihood:
    """A loss with no known sampler."""

    def loss(f: PyTree, y: PyTree) -> Float[Array, ""]:
        value = jnp.asarray(loss_fn(f, y))
        if value.size != 1:
            msg = f"`loss_fn` must return one number an example, found shape {value.shape}; sum it."
            raise ValueError(msg)
        return value.reshape(())

    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    root, sketch = differentiated(loss)
    return Likelihood(f"the callable {name}", loss, root, None, sketch)


NAMED = {
    "mse": squared_error(),
    "cross_entropy": categorical(),
    "binary_cross_entropy": bernoulli(),
}
