"""Bayesian linear regression, where the evidence has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import multivariate_normal

import laplax_kfac
from support.matrices import normal

TALL, WIDE = (12, 3), (4, 6)  # examples and inputs
OUTPUTS = 2


def linear(input, params):
    return input @ params["w"] + params["b"]


@functools.cache
def regression(shape):
    """Targets of a noisy linear function; the inputs' features have a 1 for the bias."""
    x = normal(*shape, seed=1)
    features = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    y = features @ normal(features.shape[1], OUTPUTS, seed=2) + 0.5 * normal(len(x), 2, seed=3)
    return x, features, y


def most_probable(shape, prior_prec, noise_variance):
    """The parameters at the mode of the posterior."""
    _, features, y = regression(shape)
    precision = features.T @ features + noise_variance * prior_prec * np.eye(features.shape[1])
    weights = np.linalg.solve(precision, features.T @ y)
    return {"b": jnp.asarray(weights[0]), "w": jnp.asarray(weights[1:])}


def density_of_targets(shape, prior_prec, noise_variance):
    """log N(y; 0, noise I + features features^T / prior_prec), summed over the outputs."""
    _, features, y = regression(shape)
    covariance = noise_variance * jnp.eye(len(y)) + features @ features.T / prior_prec
    return jnp.sum(multivariate_normal.logpdf(y.T, jnp.zeros(len(y)), covariance))


@functools.cache
def fitted(shape):
    """Curvature (the same for all parameters), and a function of the parameters for the fit."""
    x, _, y = regression(shape)
    params = most_probable(shape, 1.0, 1.0)
    curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse")
    return curvature, jax.jit(lambda p: laplax_kfac.data_fit(linear, p, (x, y), loss_fn="mse"))
