"""Hessians of losses of which nothing else is known, by automatic differentiation."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac.likelihood.pieces import LossFunction, real, total_of

Root = Callable[[PyTree, PyTree], PyTree]
Sketch = Callable[[Key[Array, ""], PyTree, PyTree], PyTree]


def differentiated(losses: LossFunction) -> tuple[Root, Sketch]:
    """A root of the Hessian of a loss, and sketches of it, by automatic differentiation.

    The Hessian has one block a term; its root is found by eigenvalues.
    """

    def blocks(f: PyTree, y: PyTree) -> Float[Array, "terms n n"]:
        """Columns, as rows, of a root of every term's Hessian in its n outputs."""
        flat, unravel = ravel_pytree(f)
        terms = math.prod(jax.eval_shape(losses, f, y).shape)
        size = flat.size // max(terms, 1)

        def product(v: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
            return jax.jvp(jax.grad(lambda x: total_of(losses(unravel(x), y))), (flat,), (v,))[1]

        # The Hessian is block-diagonal: one unit vector serves all terms at once.
        units = jnp.tile(jnp.eye(size, dtype=flat.dtype), (1, terms))
        hessians = jax.vmap(product)(units).reshape(size, terms, size).transpose(1, 0, 2)
        values, vectors = jnp.linalg.eigh(hessians)
        # Negative curvature is dropped: the result must stay a covariance.
        return jnp.sqrt(jnp.clip(values, 0.0))[..., None] * vectors.mT

    def root(f: PyTree, y: PyTree) -> PyTree:
        f = real(f)
        found = blocks(f, y)
        terms, size, _ = found.shape
        spread = jnp.eye(terms, dtype=found.dtype)[:, None, :, None] * found[:, :, None, :]
        _, unravel = ravel_pytree(f)
        return jax.vmap(unravel)(spread.reshape(terms * size, terms * size))

    def sketch(key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
        f = real(f)
        found = blocks(f, y)
        signs = jax.random.rademacher(key, found.shape[:2], found.dtype)
        combined = jnp.einsum("tr,trn->tn", signs, found, precision=jax.lax.Precision.HIGHEST)
        return ravel_pytree(f)[1](combined.reshape(-1))

    return root, sketch
