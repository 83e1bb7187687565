"""``laplax.calibration(calibration_method="tune")`` against `tune` and laplax's own grid."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from support import models

import laplax_kfac
from laplax_kfac import laplax_adapter

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def fitted(curv_type, times=1):
    """Curvature and posterior of a small network, on data that are there ``times`` times."""
    model_fn, params, inputs, n_out = models.by_name("mlp").make()
    inputs = jnp.tile(inputs, (times, 1))
    data = {"input": inputs, "target": jnp.ones((len(inputs), n_out))}
    posterior_fn, curvature = laplax.laplace(
        model_fn, params, data, loss_fn="mse", curv_type=curv_type
    )
    return posterior_fn, model_fn, params, data, curvature


def calibrated(curv_type, objective="marginal_log_likelihood", times=1, **options: Any):
    posterior_fn, model_fn, params, data, curvature = fitted(curv_type, times)
    arguments, _ = laplax.calibration(
        posterior_fn, model_fn, params, data, loss_fn="mse", curv_estimate=curvature,
        curv_type=curv_type, calibration_objective=objective, **options,
    )  # fmt: skip
    return arguments


@pytest.mark.parametrize("start", [1e-4, 1e4])
def test_it_finds_what_tune_finds(start):
    found = calibrated(
        "kfac", calibration_method="tune", prior_arguments={"prior_prec": start}, tolerance=1e-5
    )
    _, model_fn, params, data, curvature = fitted("kfac")
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    expected = laplax_kfac.tune(curvature, params, log_likelihood=fit, tolerance=1e-5)
    np.testing.assert_allclose(found["prior_prec"], expected.prior_prec, rtol=1e-2)


def test_precisions_of_layers_and_other_arguments():
    start = {"prior_prec": {"lin1": 1.0, "lin2": 1.0}, "sigma_squared": 2.0}
    found = calibrated("kfac", calibration_method="tune", prior_arguments=start, tolerance=1e-5)
    _, model_fn, params, data, curvature = fitted("kfac")
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    doubled = curvature.map(lambda values: 2.0 * values)
    expected = laplax_kfac.tune(
        doubled, params, log_likelihood=fit, prior_prec=start["prior_prec"], tolerance=1e-5
    )
    for name, value in expected.prior_prec.items():
        np.testing.assert_allclose(found["prior_prec"][name], value, rtol=1e-2)
    assert found["sigma_squared"] == 2.0


@pytest.mark.parametrize("times", [1, 4000])
def test_it_loses_nothing_with_many_data(times):
    start = {"lin1": 1.0, "lin2": 1.0}
    found = calibrated(
        "kfac", times=times, calibration_method="tune", prior_arguments={"prior_prec": start}
    )
    _, model_fn, params, data, curvature = fitted("kfac", times)
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    expected = laplax_kfac.tune(
        curvature, params, log_likelihood=fit, prior_prec=start, method="grid"
    )
    value = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit, prior_prec=found["prior_prec"]
    ).value
    assert value > expected.evidence.value - 1e-3


def test_it_finds_the_best_of_the_grid_of_other_curvature_types():
    found = calibrated("full", calibration_method="tune")
    on_grid = calibrated("full", log_prior_prec_min=-4.0, log_prior_prec_max=4.0, grid_size=81)
    ratio = float(found["prior_prec"] / on_grid["prior_prec"])
    assert abs(np.log10(ratio)) <= 0.1  # the spacing of the grid


def test_any_differentiable_objective_has_its_minimum_found():
    def objective(arguments, data):
        logs = jnp.log(jnp.asarray(arguments["prior_prec"])) - data
        return jnp.log(jnp.cosh(logs[0])) + jnp.log(jnp.cosh(logs[1] - 0.5 * logs[0])) + 1.0

    start = {"prior_prec": [1e-3, 1e4]}
    found = laplax_adapter.calibrate(objective, 2.0, start, tolerance=1e-6)
    np.testing.assert_allclose(found["prior_prec"], np.exp([2.0, 2.0]), rtol=1e-3)


def test_objectives_without_derivatives_are_refused():
    with pytest.raises(ValueError, match="is not differentiable there"):
        laplax_adapter.calibrate(
            lambda arguments, data: jnp.round(arguments["prior_prec"]) + data, 1.0
        )


def test_registering_again_changes_nothing():
    before = dict(laplax.api.calibration_options)
    laplax_adapter.register()
    assert laplax.api.calibration_options == before
    assert jax.tree.leaves(before)
