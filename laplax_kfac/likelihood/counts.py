"""Likelihoods of counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac.likelihood.analytic import analytic
from laplax_kfac.likelihood.pieces import (
    like_output,
    one_array,
    one_target_like,
    only,
    real,
    target_like,
)
from laplax_kfac.likelihood.record import Likelihood


def poisson() -> Likelihood:
    """Counts of mean exp(f): the output is the logarithm of the rate; one array.

    With its normaliser log(y!); its Hessian is diag(exp(f)). Loss terms are single outputs.
    """

    def log_rate(f: PyTree) -> Float[Array, "..."]:
        return one_array(real(f), "poisson")

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        s = log_rate(f)
        counts = one_target_like(s, y)
        return jnp.exp(s) - counts * s + jax.scipy.special.gammaln(counts + 1)

    def product(f: PyTree, w: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.exp(0.5 * log_rate(f)) * x, w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        rate = jnp.exp(log_rate(f))
        return like_output(f, rate - jax.random.poisson(key, rate).astype(rate.dtype))

    def faults(f: PyTree, y: PyTree) -> dict[str, PyTree]:
        counts = target_like(jax.tree.leaves(f)[0], only(y))
        text = "counts that are negative, NaN or infinite; those of `poisson` are 0, 1, 2, ..."
        return {text: ~((counts >= 0) & (counts < jnp.inf))}

    return replace(analytic("poisson", losses, product, sample_gradient), faults=faults)
