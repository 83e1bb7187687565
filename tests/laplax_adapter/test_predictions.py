"""laplax's evaluation works all predictions out together, to the same numbers."""

import functools
from typing import Any

import jax
import laplax
import laplax.api
import laplax.eval.pushforward
import pytest
from laplax.eval.pushforward import (
    lin_mc_pred_act,
    lin_pred_cov,
    lin_pred_mean,
    lin_pred_std,
    lin_pred_var,
    lin_samples,
    lin_setup,
    lin_special_pred_act,
    nonlin_mc_pred_act,
    nonlin_pred_mean,
    nonlin_pred_std,
    nonlin_setup,
)
from laplax.eval.utils import transfer_entry
from support.pushforwards import PRIOR, assert_same, count_linearisations, fitted, generic_setup

from laplax_kfac.laplax_adapter import predictions as evaluated
from laplax_kfac.laplax_adapter import setup_linearised


@pytest.fixture
def linearised(monkeypatch):
    return count_linearisations(monkeypatch)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("predictive_type", ["none", "mean_field_2"])
def test_evaluation_looks_predictions_up(predictive_type, linearised):
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    entries = ["map", "pred_mean", "pred_std"] + ["pred_act"] * (predictive_type != "none")
    metrics = transfer_entry(entries)
    fns = [lin_pred_mean, lin_pred_std]
    if predictive_type != "none":
        special = functools.partial(lin_special_pred_act, special_pred_type=predictive_type)
        fns += [special, laplax.api.get_pred_act]
    arguments = posterior_fn, model_fn, params, PRIOR, {"input": inputs, "target": inputs}
    found, predict = laplax.evaluation(*arguments, metrics=metrics, predictive_type=predictive_type)
    expected, _ = laplax.evaluation(
        *arguments, metrics=metrics, pushforward_fns=[generic_setup, *fns]
    )
    assert_same(found, expected)
    assert len(linearised) > 0
    # What comes back takes an input as it is, not by its number.
    again = predict(jax.tree.map(lambda x: x[0], inputs))
    assert_same({k: again[k] for k in entries}, {k: v[0] for k, v in expected.items()})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("pushforward_type", "predictive_type"),
    [("linear", "mc_bridge"), ("nonlinear", "none"), ("nonlinear", "mc_bridge")],
)
def test_predictions_that_need_samples_are_laplax_own(pushforward_type, predictive_type):
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    entry = {"none": "pred_std", "mc_bridge": "mc_pred_act"}[predictive_type]
    fns = {
        ("linear", "mc_bridge"): [generic_setup, lin_pred_mean, lin_pred_std, lin_mc_pred_act],
        ("nonlinear", "none"): [nonlin_setup, nonlin_pred_mean, nonlin_pred_std],
        ("nonlinear", "mc_bridge"): [nonlin_setup, nonlin_pred_mean, nonlin_mc_pred_act],
    }[pushforward_type, predictive_type]
    arguments = posterior_fn, model_fn, params, PRIOR, {"input": inputs, "target": inputs}
    options: Any = {
        "metrics": transfer_entry([entry]), "pushforward_type": pushforward_type, "num_samples": 3,
    }  # fmt: skip
    found, _ = laplax.evaluation(*arguments, predictive_type=predictive_type, **options)
    expected, _ = laplax.evaluation(*arguments, pushforward_fns=fns, **options)
    assert_same(found, expected)


@pytest.mark.usefixtures("x64")
def test_wrong_calls_raise_what_laplax_raises():
    model_fn, params, inputs, posterior_fn, curvature = fitted("mlp", "float64")
    with pytest.raises(TypeError, match=r"^calibration\(\) missing 1 required positional"):
        laplax.calibration(
            posterior_fn, model_fn, params, loss_fn="mse", curv_estimate=curvature, curv_type="kfac"
        )
    with pytest.raises(TypeError, match=r"^evaluation\(\) missing 2 required positional"):
        laplax.evaluation(posterior_fn, model_fn, params)
    with pytest.raises(ValueError, match="received len != 2"):
        laplax.evaluation(posterior_fn, model_fn, params, PRIOR, (inputs,))
    with pytest.raises(ValueError, match="'none at all' is not a valid Predictive"):
        laplax.evaluation(
            posterior_fn, model_fn, params, PRIOR, (inputs, inputs), predictive_type="none at all"
        )


class WithoutHash:
    """A pushforward function, as a module of equinox may be."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, results, aux, **_):
        return results, aux


@pytest.mark.parametrize(
    ("functions", "covariance"),
    [
        ([lin_setup, lin_pred_mean, lin_pred_std], False),
        ([setup_linearised, lin_pred_var], False),
        ([lin_setup, lin_pred_cov], True),
        ([functools.partial(lin_special_pred_act, special_pred_type="mean_field_1")], False),
        ([functools.partial(lin_special_pred_act, special_pred_type="MEAN_FIELD_2")], True),
        ([functools.partial(lin_special_pred_act, special_pred_type="laplace_bridge")], None),
        ([functools.partial(print)], None),
        ([lin_setup, lin_samples], None),
        ([lin_setup, lin_mc_pred_act], None),
        ([generic_setup, lin_pred_std], None),
        ([nonlin_setup, nonlin_pred_mean], None),
        ([WithoutHash()], None),
    ],
)
def test_what_pushforward_functions_need(functions, covariance):
    assert evaluated.needs_covariance(functions) is covariance


@pytest.mark.usefixtures("x64")
def test_a_list_of_laplax_own_functions_is_looked_up_too(linearised):
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    arguments = posterior_fn, model_fn, params, PRIOR, {"input": inputs, "target": inputs}
    metrics = transfer_entry(["pred_mean", "pred_cov", "pred_std"])
    entries = [lin_pred_mean, lin_pred_cov, lin_pred_std]
    found, expected = (
        laplax.evaluation(*arguments, metrics=metrics, pushforward_fns=[setup, *entries])[0]
        for setup in (setup_linearised, generic_setup)
    )
    assert len(linearised) > 0
    assert_same(found, expected)
