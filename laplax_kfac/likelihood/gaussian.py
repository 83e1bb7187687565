"""Gaussian likelihoods: the squared error, a known variance, a variance that the model gives."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, Num, PyTree

from laplax_kfac.arguments import no_type_check, require_positive
from laplax_kfac.faults import NOT_FINITE
from laplax_kfac.likelihood.analytic import analytic
from laplax_kfac.likelihood.pieces import (
    like_output,
    nonfinite_targets,
    one_array,
    one_target_like,
    only,
    real,
    target_like,
)
from laplax_kfac.likelihood.record import Likelihood


def squared_error() -> Likelihood:
    """The squared error ||f - y||^2 of laplax: no normaliser, and a free noise variance."""

    def losses(f: PyTree, y: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: (a - target_like(a, b)) ** 2, real(f), y)

    def product(f: PyTree, w: PyTree) -> PyTree:
        del f
        return jax.tree.map(lambda x: math.sqrt(2.0) * x, w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        return product(f, _normal_like(key, f))

    found = analytic("mse", losses, product, sample_gradient)
    return replace(found, faults=nonfinite_targets, squared_error=True)


def _normal_like(key: Key[Array, ""], f: PyTree) -> PyTree:
    flat, unravel = ravel_pytree(real(f))
    return unravel(jax.random.normal(key, flat.shape, flat.dtype))


@no_type_check
def gaussian(noise_variance: float | Num[Array | np.ndarray, "..."]) -> Likelihood:
    """A Gaussian around the output, of known variance; any pytree of outputs.

    With its normaliser, so that `data_fit` and `log_marginal_likelihood` need no
    ``noise_variance``; its Hessian is I / noise_variance. Loss terms are single outputs.

    Args:
        noise_variance: Positive; a scalar, or an array that broadcasts to the output.

    Raises:
        ValueError: If it is not positive and finite.
        TypeError: If it is no number.
    """
    require_positive("noise_variance", noise_variance)

    def like(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.broadcast_to(jnp.asarray(noise_variance, x.dtype), x.shape)

    def losses(f: PyTree, y: PyTree) -> PyTree:
        def one(a: Array, b: Any) -> Array:
            variance = like(a)
            squares = (a - target_like(a, b)) ** 2 / variance
            return 0.5 * (squares + jnp.log(2 * math.pi * variance))

        return jax.tree.map(one, real(f), y)

    def product(f: PyTree, w: PyTree) -> PyTree:
        del f
        return jax.tree.map(lambda x: x / jnp.sqrt(like(x)), w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        return product(f, _normal_like(key, f))

    return replace(analytic("gaussian", losses, product, sample_gradient), faults=nonfinite_targets)


def heteroscedastic_gaussian() -> Likelihood:
    """A Gaussian of which the model gives both mean and variance.

    The last axis of the output has size 2 k: k means, then the logarithms of k variances. Targets
    have k entries there, or no such axis if k = 1. Loss terms have the other axes.

    The Hessian of this loss depends on the residual and is indefinite. ``type2`` takes in its place
    its mean under the model's own likelihood, the Fisher information, ``diag(exp(-s), 1/2)`` for
    log-variances s: positive definite, free of the targets, and what ``mc`` converges to.
    """
    name = "heteroscedastic_gaussian"

    def split(f: PyTree) -> tuple[Array, Array]:
        output = one_array(real(f), name)
        if output.ndim == 0 or output.shape[-1] % 2 or not output.shape[-1]:
            msg = (
                f"`{name}` needs outputs whose last axis has means and as many log-variances, of "
                f"even size; found shape {output.shape} an example."
            )
            raise ValueError(msg)
        mean, log_variance = jnp.split(output, 2, axis=-1)
        return mean, log_variance

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        mean, log_variance = split(f)
        squares = (mean - one_target_like(mean, y)) ** 2 * jnp.exp(-log_variance)
        return 0.5 * jnp.sum(squares + log_variance + math.log(2 * math.pi), axis=-1)

    def product(f: PyTree, w: PyTree) -> PyTree:
        at_mean, at_log_variance = jnp.split(one_array(w, name), 2, axis=-1)
        parts = [jnp.exp(-0.5 * split(f)[1]) * at_mean, math.sqrt(0.5) * at_log_variance]
        return like_output(f, jnp.concatenate(parts, axis=-1))

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        mean, log_variance = split(f)
        z = jax.random.normal(key, mean.shape, mean.dtype)
        parts = [-jnp.exp(-0.5 * log_variance) * z, 0.5 * (1 - z**2)]
        return like_output(f, jnp.concatenate(parts, axis=-1))

    def faults(f: PyTree, y: PyTree) -> dict[str, PyTree]:
        shape = jax.tree.leaves(f)[0].shape
        mean = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 2), jnp.float32)
        (flags,) = nonfinite_targets(mean, only(y)).values()
        return {NOT_FINITE: jnp.any(flags, axis=-1)}

    return replace(analytic(name, losses, product, sample_gradient), faults=faults)
