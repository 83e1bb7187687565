"""Calibration of classifiers by the likelihood of the targets, through ``laplax.calibration``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from support.matrices import normal
from support.pushforwards import count_linearisations

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")


def model_fn(input, params):
    return jnp.tanh(input @ params["in"]) @ params["out"]


@functools.cache
def trained(loss_fn):
    """A small classifier near its optimum, and data that it was not trained on."""
    outputs = 3 if loss_fn == "cross_entropy" else 1
    x = normal(60, 4, seed=1)
    scores = x @ normal(4, outputs, seed=2) + normal(60, outputs, seed=3)
    y = scores.argmax(axis=1) if outputs > 1 else (scores > 0).astype(float)
    params = {"in": jnp.asarray(normal(4, 6, seed=4)), "out": jnp.asarray(normal(6, outputs))}

    def loss(params):
        fit = laplax_kfac.data_fit(model_fn, params, (x[:40], y[:40]), loss_fn=loss_fn)
        return fit.loss + 0.05 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    @jax.jit
    def step(params):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))

    for _ in range(300):
        params = step(params)
    fitted = laplax.laplace(model_fn, params, (x[:40], y[:40]), loss_fn=loss_fn, curv_type="kfac")
    return params, (x[40:], y[40:]), fitted


def calibrated(loss_fn, targets=lambda y: y, objective="class_nll", **options: Any):
    params, (x, y), (posterior_fn, curvature) = trained(loss_fn)
    arguments, _ = laplax.calibration(
        posterior_fn, model_fn, params, (x, targets(y)), loss_fn=loss_fn, curv_estimate=curvature,
        curv_type="kfac", calibration_objective=objective, **options,
    )  # fmt: skip
    return float(arguments["prior_prec"])


@functools.cache
def values_of(loss_fn, link="mean_field_0"):
    """Negative log-likelihood of the held-out targets on a fine grid, by this package's links."""
    params, (x, y), (_, curvature) = trained(loss_fn)
    grid = np.geomspace(1e-3, 1e3, 61)

    @jax.jit
    def value(prior_prec):
        predictive = laplax_kfac.predictive_covariance(
            curvature, model_fn, params, x, prior_prec=prior_prec
        )
        p = laplax_kfac.class_probabilities(predictive, link)
        of_label = p[jnp.arange(len(y)), y] if p.shape[1] > 1 else jnp.where(y > 0, p, 1 - p)
        return -jnp.mean(jnp.log(of_label))

    return grid, np.asarray([value(prior_prec) for prior_prec in grid])


GRID: dict[str, Any] = {"log_prior_prec_min": -3.0, "log_prior_prec_max": 3.0, "grid_size": 61}


@pytest.mark.parametrize("predictive", ["none", "mean_field_0", "mean_field_2"])
@pytest.mark.parametrize("targets", ["labels", "one-hot"])
def test_the_most_likely_labels_win(predictive, targets):
    grid, values = values_of(
        "cross_entropy", "mean_field_0" if predictive == "none" else predictive
    )
    best = grid[values.argmin()]
    assert predictive == "mean_field_2" or grid[0] < best < grid[-1]
    found = calibrated(
        "cross_entropy", (lambda y: np.eye(3)[y]) if targets == "one-hot" else lambda y: y,
        predictive_type=predictive, **GRID,
    )  # fmt: skip
    np.testing.assert_allclose(found, best, rtol=1e-6)


def test_the_most_likely_binary_labels_win():
    grid, values = values_of("binary_cross_entropy")
    found = calibrated("binary_cross_entropy", **GRID)
    np.testing.assert_allclose(found, grid[values.argmin()], rtol=1e-6)


def test_descent_finds_the_best_of_the_grid():
    grid, values = values_of("cross_entropy")
    found = calibrated("cross_entropy", predictive_type="mean_field_0", calibration_method="tune")
    assert abs(np.log10(found / grid[values.argmin()])) <= 0.1  # the spacing of the grid


def test_a_grid_of_priors_linearises_once(monkeypatch):
    linearised = count_linearisations(monkeypatch)
    counts = []
    for size in (5, 10):
        calibrated("cross_entropy", grid_size=size, predictive_type="mean_field_0")
        counts.append(len(linearised))
    assert counts[0] > 0
    assert counts[1] == 2 * counts[0]


def test_a_regression_has_no_labels():
    params, data, (posterior_fn, curvature) = trained("cross_entropy")
    with pytest.raises(ValueError, match=r"is for `loss_fn` \"cross_entropy\" and.*found 'mse'"):
        laplax.calibration(
            posterior_fn, model_fn, params, data, loss_fn="mse", curv_estimate=curvature,
            curv_type="kfac", calibration_objective="class_nll",
        )  # fmt: skip
