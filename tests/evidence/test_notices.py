"""Warnings: of values at a bound in every form of a prior, and of a noise that is too small."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.linear_regression import TALL, fitted, linear, most_probable, regression
from support.matrices import normal

import laplax_kfac
from laplax_kfac import laplax_adapter

pytestmark = pytest.mark.usefixtures("x64")


def model(input, params):
    return jnp.tanh(input @ params["first"]) @ params["second"]


def pruned():
    """A model whose second layer is zero, but for one weight; its best precision is infinite."""
    params = {"first": jnp.asarray(normal(3, 4)), "second": jnp.zeros((4, 2)).at[1, 0].set(0.7)}
    x, y = normal(20, 3, seed=3), normal(20, 2, seed=4)
    options: Any = {"loss_fn": "mse"}
    curvature = laplax_kfac.kfac(model, params, (x, y), curvature="diagonal", **options)
    return curvature, params, laplax_kfac.data_fit(model, params, (x, y), **options)


def each(value):
    return {"first": jnp.full((3, 4), value), "second": jnp.full((4, 2), value)}


def test_every_entry_of_a_precision_for_every_weight_is_looked_at():
    curvature, params, fit = pruned()
    with pytest.warns(laplax_kfac.BoundaryWarning) as caught:
        tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=each(1.0))
    (text,) = (str(warning.message) for warning in caught)
    assert "hyperparameters/second at [0, 0], [0, 1], [1, 1], [2, 0], [2, 1], and 2 more" in text
    # Only one hidden unit has an influence; of weights to others the data say nothing, and
    # the wider their prior, the better.
    assert "hyperparameters/first at [0, 0], [0, 2], [0, 3], [1, 0], [1, 2], and 4 more" in text
    idle = np.broadcast_to(np.arange(4) != 1, (3, 4))
    np.testing.assert_array_equal(tuned.at_bound["hyperparameters"]["first"], idle)
    at_bound = np.asarray(tuned.at_bound["hyperparameters"]["second"])
    np.testing.assert_array_equal(at_bound, np.asarray(params["second"]) == 0)
    np.testing.assert_allclose(np.asarray(tuned.prior_prec["second"])[at_bound], 1e8)
    assert tuned.converged


@pytest.mark.parametrize("form", ["array", "prefix", "function", "function of an array"])
def test_every_form_of_a_precision_for_every_layer_is_looked_at(form):
    curvature, params, fit = pruned()
    params = params | {"second": jnp.zeros((4, 2))}
    forms: dict[str, dict[str, Any]] = {
        "array": {"prior_prec": jnp.ones(2)},
        "prefix": {"prior_prec": {"first": 1.0, "second": 1.0}},
        "function": {
            "prior_prec": lambda h: {"first": h["a"], "second": h["b"]},
            "hyperparameters": {"a": 1.0, "b": 1.0},
        },
        "function of an array": {"prior_prec": lambda h: h[::-1], "hyperparameters": jnp.ones(2)},
    }
    options = forms[form]
    where = {"array": "hyperparameters at .1.", "prefix": "hyperparameters/second"}.get(
        form, "hyperparameters/b" if form == "function" else "hyperparameters at .0."
    )
    with pytest.warns(laplax_kfac.BoundaryWarning, match=f" in {where}: the bound"):
        laplax_kfac.tune(curvature, params, log_likelihood=fit, **options)


def test_a_noise_at_a_bound_is_looked_at():
    curvature, make_fit = fitted(TALL)
    params = most_probable(TALL, 1.0, 0.5)
    options: Any = {"noise_variance": 1e3, "bounds": (10.0, 1e4), "prior_prec": 100.0}
    with pytest.warns(laplax_kfac.BoundaryWarning, match=r" in .*noise_variance: the bound"):
        tuned = laplax_kfac.tune(curvature, params, log_likelihood=make_fit(params), **options)
    assert tuned.noise_variance is not None
    np.testing.assert_allclose(tuned.noise_variance, 10.0)
    assert tuned.converged


def test_what_has_no_part_in_the_evidence_is_at_no_bound():
    x, _, y = regression(TALL)
    params = most_probable(TALL, 1.0, 0.5)
    curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse", params_filter="w")
    fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn="mse")
    tuned = laplax_kfac.tune(
        curvature, params, log_likelihood=fit, prior_prec={"b": 1e8, "w": 1.0}
    )  # the bias is frozen
    assert not any(jax.tree.leaves(tuned.at_bound))
    assert tuned.converged


def test_a_noise_beside_frozen_parameters_is_noticed():
    x, _, y = regression(TALL)
    params = most_probable(TALL, 1.0, 0.5)
    curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse", params_filter="b")
    fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn="mse")
    with pytest.warns(UserWarning, match="leaves out 6 of 8 parameters .`params_filter`"):
        laplax_kfac.tune(curvature, params, log_likelihood=fit, noise_variance=1.0)
    with pytest.warns(UserWarning, match="leaves out 6 of 8 parameters"):
        laplax_kfac.marglik_training(
            linear, params, (x, y), loss_fn="mse", params_filter="b", noise_variance=1.0, epochs=1
        )


def test_calibration_in_laplax_notices_bounds_and_searches_without_an_end():
    def falling(arguments, data):
        return data / arguments["prior_prec"]

    with pytest.warns(laplax_kfac.BoundaryWarning, match="The objective has no optimum .*prior_pr"):
        found = laplax_adapter.calibrate(falling, 1.0)
    np.testing.assert_allclose(found["prior_prec"], 1e8)

    def valley(arguments, data):
        return jnp.log(arguments["prior_prec"] / data) ** 2

    with pytest.warns(UserWarning, match="ended before the optimum was found"):
        laplax_adapter.calibrate(valley, 1e4, {"prior_prec": 1e-4}, steps=1)
