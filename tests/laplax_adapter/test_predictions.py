"""laplax's calibration and evaluation work all predictions out together, to the same numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import laplax.eval.pushforward
import numpy as np
import pytest
from laplax.curv.cov import set_posterior_fn
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
from support.matrices import normal
from support.pushforwards import PRIOR, assert_same, fitted, generic_setup

from laplax_kfac.laplax_adapter import closed_form, dataset, grid_search, setup_linearised
from laplax_kfac.laplax_adapter import predictions as evaluated
from laplax_kfac.laplax_adapter.rebinding import Rebound
from laplax_kfac.posterior.posterior import Posterior
from laplax_kfac.predictive import jacobians


def calibrate(monkeypatch: Any, during: Any = lambda: None, **options: Any) -> tuple[Any, Any]:
    """What the objective was on laplax's own grid, and what came back."""
    model_fn, params, inputs, posterior_fn, curvature = fitted("mlp", "float64")
    seen: list[float] = []

    def search(objective, **_):
        during()
        precisions = np.asarray([0.1, 1.0, 20.0])
        seen.extend(float(objective({"prior_prec": p})) for p in precisions)
        during()
        return precisions[int(np.argmin(seen))]

    ours = Rebound(grid_search.search_grid, search)
    monkeypatch.setitem(laplax.api.calibration_options, "grid_search", ours)
    targets = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs) + normal(3, 1)
    returned = laplax.calibration(
        posterior_fn, model_fn, params, (inputs, targets), loss_fn="mse", curv_type="kfac",
        curv_estimate=curvature, **options,
    )  # fmt: skip
    return seen, returned


GENERIC = {"pushforward_fns": [generic_setup, lin_pred_mean, lin_pred_std]}


@pytest.fixture
def linearised(monkeypatch):
    """Counts how often the model is linearised: for one input while tracing, or for many."""
    count = []

    def counting(function):
        def counted(*args, **kwargs):
            count.append(1)
            return function(*args, **kwargs)

        return counted

    compiled = jacobians.compiled_linearise
    monkeypatch.setattr(dataset, "compiled_linearise", lambda *args: counting(compiled(*args)))
    monkeypatch.setattr(closed_form, "linearise", counting(jacobians.linearise))
    return count


@pytest.mark.usefixtures("x64")
def test_a_grid_of_priors_linearises_once(monkeypatch, linearised):
    counts = []
    seen, (prior, set_predictive) = calibrate(monkeypatch, lambda: counts.append(len(linearised)))
    assert counts[0] == counts[1] > 0  # before the grid, and not again on it
    expected, (expected_prior, _) = calibrate(monkeypatch, **GENERIC)
    assert prior == expected_prior
    np.testing.assert_allclose(seen, expected, rtol=1e-10)
    assert np.ptp(seen) > 0.1
    # What comes back is the user's own model and posterior, with the samples that were asked for.
    model_fn, _, _, posterior_fn, _ = fitted("mlp", "float64")
    assert set_predictive.keywords["model_fn"] is model_fn
    assert set_predictive.keywords["posterior_fn"] is posterior_fn
    assert set_predictive.keywords["num_samples"] == 30


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("limit", "on_the_grid"), [(200, "the batch"), (1, "every example")], ids=["inputs", "none"]
)
def test_memory_is_bounded_and_the_numbers_stay(limit, on_the_grid, monkeypatch, linearised):
    monkeypatch.setattr(dataset, "TABLE_BYTES", limit)
    counts = []
    seen, _ = calibrate(monkeypatch, lambda: counts.append(len(linearised)))
    assert counts[0] < counts[1], on_the_grid
    assert (counts[0] > 0) == (on_the_grid == "the batch")
    np.testing.assert_allclose(seen, calibrate(monkeypatch, **GENERIC)[0], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_bases_that_are_not_those_of_the_curvature_are_not_kept():
    *_, curvature = fitted("mlp", "float64")
    copied = jax.tree.map(jnp.array, curvature)
    assert grid_search.same_bases(curvature, curvature)
    assert not grid_search.same_bases(copied, curvature)
    assert not grid_search.same_bases(curvature, None)


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


@pytest.mark.usefixtures("x64")
def test_a_posterior_function_is_ours_by_what_it_returns():
    *_, posterior_fn, _ = fitted("mlp", "float64")
    assert grid_search.is_ours(posterior_fn, PRIOR)
    assert not grid_search.is_ours(set_posterior_fn("full", jnp.eye(2), layout=2), PRIOR)
    assert not grid_search.is_ours(posterior_fn, {})  # a KeyError, which laplax is to raise
    assert not grid_search.is_ours(lambda arguments: arguments, PRIOR)
    assert isinstance(posterior_fn(PRIOR).state, Posterior)


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
    ids=repr,
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


@pytest.mark.usefixtures("x64")
def test_a_model_that_changes_is_evaluated_as_it_is():
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    offset = [jnp.zeros(3)]

    def shifted(input, params):
        return model_fn(input=input, params=params) + offset[0]

    def mean():
        results, _ = laplax.evaluation(
            posterior_fn, shifted, params, PRIOR, {"input": inputs, "target": inputs},
            metrics=transfer_entry(["pred_mean"]),
        )  # fmt: skip
        return results["pred_mean"]

    before = mean()
    offset[0] = jnp.ones(3)
    np.testing.assert_allclose(mean(), before + 1.0, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("objective_jit", [False, True])
def test_a_grid_search_without_compilation_is_the_same(objective_jit, monkeypatch):
    seen, _ = calibrate(monkeypatch, objective_jit=objective_jit)
    np.testing.assert_allclose(seen, calibrate(monkeypatch, **GENERIC)[0], rtol=1e-10)


def test_other_objectives_go_to_the_search_as_they_are():
    def objective(prior):
        return prior["prior_prec"]

    given: Any
    for given in (objective, jax.jit(objective), functools.partial(objective), print):
        passed = grid_search.search_grid(lambda objective, **_: objective, given)
        assert passed is given
