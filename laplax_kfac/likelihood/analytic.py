"""Likelihoods whose Hessian has a root that is known as a product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key, PyTree

from laplax_kfac.likelihood.pieces import LossFunction, real
from laplax_kfac.likelihood.record import Likelihood


def analytic(
    name: str,
    losses: LossFunction,
    product: Callable[[PyTree, PyTree], PyTree],
    sample_gradient: Callable[[Key[Array, ""], PyTree], PyTree],
    *,
    space: Callable[[PyTree], PyTree] = real,
) -> Likelihood:
    """A likelihood with a root that is known as a product (f, w) -> S w, for w as ``space(f)``.

    Its columns are the products with unit vectors, a sketch that with random signs.
    """

    def root(f: PyTree, _: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(space(f))
        units = jnp.eye(flat.size, dtype=flat.dtype)
        return jax.vmap(lambda w: product(f, unravel(w)))(units)

    def sketch(key: Key[Array, ""], f: PyTree, _: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(space(f))
        return product(f, unravel(jax.random.rademacher(key, flat.shape, flat.dtype)))

    return Likelihood(name, losses, root, sample_gradient, sketch)
