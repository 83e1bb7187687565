"""laplax's grid search linearises the model once for the grid, and finds the same numbers."""

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
    lin_pred_mean,
    lin_pred_std,
)
from support.machines import tune_machine
from support.matrices import normal
from support.pushforwards import PRIOR, count_linearisations, fitted, generic_setup

from laplax_kfac.laplax_adapter import grid_search
from laplax_kfac.laplax_adapter.rebinding import Rebound
from laplax_kfac.posterior.posterior import Posterior


@pytest.fixture
def linearised(monkeypatch):
    return count_linearisations(monkeypatch)


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
    tune_machine(monkeypatch, table_bytes=limit)
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
def test_a_posterior_function_is_ours_by_what_it_returns():
    *_, posterior_fn, _ = fitted("mlp", "float64")
    assert grid_search.is_ours(posterior_fn, PRIOR)
    assert not grid_search.is_ours(set_posterior_fn("full", jnp.eye(2), layout=2), PRIOR)
    assert not grid_search.is_ours(posterior_fn, {})  # a KeyError, which laplax is to raise
    assert not grid_search.is_ours(lambda arguments: arguments, PRIOR)
    assert isinstance(posterior_fn(PRIOR).state, Posterior)


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
