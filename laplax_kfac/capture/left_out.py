"""Examples that are left out: those of weight 0, whatever is in them.

Zero times NaN is NaN, so that such an example is replaced by one that counts, before the model
sees it. Batches without such examples stay as they are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Num, PyTree, Shaped

from laplax_kfac import jaxprs


def without_left_out(batch: PyTree, *weights: ArrayLike | None) -> PyTree:
    """A batch with examples of weight 0 replaced by one that counts; a copy only if there are any.

    Args:
        batch: The examples.
        *weights: Factors of what every example counts; None stands for ones.
    """
    known = [w for w in weights if w is not None]
    if all(isinstance(w, np.ndarray) and w.all() for w in known):
        return batch
    counts = functools.reduce(jnp.multiply, map(jnp.asarray, known))
    return replaced(batch, counts, only_nonfinite=jaxprs.is_traced(known))


@functools.partial(jax.jit, static_argnames="only_nonfinite")
def replaced(batch: PyTree, weights: Num[Array, " N"], *, only_nonfinite: bool) -> PyTree:
    """The same, for arrays whose values are not known.

    Args:
        batch: The examples.
        weights: What every example counts.
        only_nonfinite: Whether examples of finite numbers stay, which they must where a derivative
            in the weights may be taken: it asks what the example would contribute.
    """
    counted = weights != 0
    if only_nonfinite:
        leaves = [x for x in jax.tree.leaves(batch) if jnp.issubdtype(x.dtype, jnp.inexact)]
        each = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in leaves]
        counted |= functools.reduce(jnp.logical_and, each, jnp.ones_like(counted))
    first = jnp.arange(len(weights)) == jnp.argmax(weights != 0)

    def one(x: Shaped[Array, "N *shape"]) -> Shaped[Array, "N *shape"]:
        axes = (-1, *[1] * (x.ndim - 1))
        # A sum, not an index: the examples may be spread over devices.
        safe = jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
        chosen = jnp.sum(jnp.where(first.reshape(axes), safe, 0), axis=0, dtype=x.dtype)
        return jnp.where(counted.reshape(axes), x, chosen)

    return jax.tree.map(one, batch)
