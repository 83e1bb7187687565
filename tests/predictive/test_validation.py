"""Priors chosen by held-out data: against grids of predictions that are made one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.machines import tune_machine
from support.matrices import normal
from support.training import descended

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")


def model_fn(input, params):
    hidden = jnp.tanh(input @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def trained(x, y, loss_fn, width, steps=400):
    """A network of one hidden layer, trained well beyond what its data say."""
    outputs = int(y.max()) + 1 if loss_fn == "cross_entropy" else y.shape[1]
    params = {
        "hidden": {"w": normal(x.shape[1], width, seed=1) / x.shape[1] ** 0.5, "b": 0.0},
        "out": {"w": normal(width, outputs, seed=2) / width**0.5, "b": np.zeros(outputs)},
    }
    params["hidden"]["b"] = np.zeros(width)
    params = jax.tree.map(jnp.asarray, params)

    def loss(params):
        fit = laplax_kfac.data_fit(model_fn, params, (x, y), loss_fn=loss_fn)
        return fit.loss + 0.01 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    params = descended(loss, params, steps=steps, learning_rate=0.03)
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn=loss_fn)
    return params, curvature, laplax_kfac.data_fit(model_fn, params, (x, y), loss_fn=loss_fn)


@functools.cache
def case(loss_fn):
    """Training, and data that were held out."""
    if loss_fn == "cross_entropy":
        x = normal(80, 4, seed=1)
        y = (x @ normal(4, 3, seed=2) + 1.5 * normal(80, 3, seed=3)).argmax(axis=1)
    else:
        x = normal(80, 4, seed=1)
        if loss_fn == "mse":  # farther away than what is trained on, where a model is not sure
            x = x * np.where(np.arange(80) < 30, 0.7, 1.5)[:, None]
        y = np.sin(x @ normal(4, 2, seed=2)) + 0.3 * normal(80, 2, seed=3)
        y = (y > 0).astype(float) if loss_fn == "binary_cross_entropy" else y
    return *trained(x[:30], y[:30], loss_fn, 8), (x[30:], y[30:])


def nll(loss_fn, values):
    """Mean negative log-likelihood of the held-out targets, from the definitions."""
    params, curvature, _, (x, y) = case(loss_fn)
    noise = values.get("noise_variance", 0.5)
    predictive = laplax_kfac.predictive_covariance(
        curvature, model_fn, params, x, prior_prec=values["prior_prec"],
        sigma_squared=1 / (2 * noise) if loss_fn == "mse" else 1.0,
    )  # fmt: skip
    if loss_fn == "mse":
        predictive = predictive.with_noise(noise)
        spread = jnp.sqrt(predictive.variance)
        terms = jax.scipy.stats.norm.logpdf(y, predictive.mean, spread)
        return -jnp.mean(jnp.sum(terms, axis=1))
    if loss_fn == "cross_entropy":
        p = laplax_kfac.class_probabilities(predictive, "probit")
        return -jnp.mean(jnp.log(p[jnp.arange(len(y)), y]))
    p = laplax_kfac.class_probabilities(predictive, "probit", num_classes=1)[..., 0]
    return -jnp.mean(jnp.sum(jnp.log(jnp.where(y > 0, p, 1 - p)), axis=1))


def tuned_by(loss_fn, objective="nll", targets=lambda y: y, **options: Any):
    params, curvature, fit, (x, y) = case(loss_fn)
    validation = laplax_kfac.Validation(model_fn, (x, targets(y)), loss_fn, objective)
    return laplax_kfac.tune(curvature, params, log_likelihood=fit, validation=validation, **options)


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("start", [1e-3, 1e5])
def test_one_precision_is_the_best_of_a_grid(loss_fn, start):
    tuned = tuned_by(loss_fn, prior_prec=start)
    grid = np.geomspace(1e-4, 1e4, 81)
    compiled = jax.jit(lambda p: nll(loss_fn, {"prior_prec": p}))
    values = np.asarray([compiled(p) for p in grid])
    assert 0 < values.argmin() < len(grid) - 1
    assert tuned.converged
    assert tuned.validated is not None
    np.testing.assert_allclose(tuned.validated.loss, compiled(tuned.prior_prec), rtol=1e-8)
    assert values.min() - 1e-3 <= tuned.validated.loss <= values.min() + 1e-9
    assert tuned.validated.confidence < tuned.validated.confidence_of_map < 1
    np.testing.assert_allclose(tuned.trace[-1], -50 * tuned.validated.loss)
    # The evidence is told as well, at the values that were found.
    params, curvature, fit, _ = case(loss_fn)
    evidence = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit, prior_prec=tuned.prior_prec
    )
    np.testing.assert_allclose(tuned.evidence.value, evidence.value)


@pytest.mark.filterwarnings("ignore::laplax_kfac.BoundaryWarning")  # predictions are best there
@pytest.mark.parametrize("form", ["array", "prefix", "function"])
def test_precisions_of_layers_and_groups_are_better_than_one(form):
    options: dict[str, dict[str, Any]] = {
        "array": {"prior_prec": jnp.ones(2)},
        "prefix": {"prior_prec": {"hidden": 1.0, "out": 1.0}},
        "function": {
            "prior_prec": lambda h: {"hidden": h["a"], "out": h["b"] * h["a"]},
            "hyperparameters": {"a": 1.0, "b": 3.0},
        },
    }
    one = tuned_by("cross_entropy")
    tuned = tuned_by("cross_entropy", bounds=(1e-3, 1e3), **options[form])
    assert tuned.validated is not None
    assert one.validated is not None
    assert tuned.validated.loss < one.validated.loss
    value = nll("cross_entropy", {"prior_prec": tuned.prior_prec})
    np.testing.assert_allclose(tuned.validated.loss, value, rtol=1e-8)


def test_the_noise_of_a_regression_is_chosen_as_well():
    tuned = tuned_by("mse", noise_variance=1.0)
    assert tuned.validated is not None
    assert tuned.noise_variance is not None
    assert tuned.converged
    best = {"prior_prec": tuned.prior_prec, "noise_variance": tuned.noise_variance}
    compiled = jax.jit(lambda values: nll("mse", values))
    np.testing.assert_allclose(tuned.validated.loss, compiled(best), rtol=1e-8)
    for prior in (0.8, 1.0, 1.25):
        for noise in (0.8, 1.0, 1.25):
            near = {"prior_prec": prior * best["prior_prec"]}
            near["noise_variance"] = noise * best["noise_variance"]
            assert compiled(near) >= tuned.validated.loss - 1e-6
    assert np.isnan(tuned.validated.confidence)


def test_noise_of_a_start_that_is_too_large_does_not_hide_the_parameters():
    """With as much noise the best parameters are certain ones, from where nothing leads back."""
    tuned, far = tuned_by("mse", noise_variance=1.0), tuned_by("mse", noise_variance=100.0)
    assert far.converged
    assert not any(jax.tree.leaves(far.at_bound))
    np.testing.assert_allclose(far.validated.loss, tuned.validated.loss, atol=1e-5)


def test_an_objective_of_ones_own_and_one_hot_targets():
    def by_probit(predictive, y):
        p = laplax_kfac.class_probabilities(predictive, "probit")
        return -jnp.log(jnp.take_along_axis(p, y[:, None], axis=1))

    expected = tuned_by("cross_entropy")
    for found in (
        tuned_by("cross_entropy", by_probit),
        tuned_by("cross_entropy", targets=lambda y: np.eye(3)[y]),
    ):
        assert found.validated is not None
        assert expected.validated is not None
        np.testing.assert_allclose(found.validated.loss, expected.validated.loss, rtol=1e-6)
        np.testing.assert_allclose(found.prior_prec, expected.prior_prec, rtol=0.02)


def test_jacobians_that_do_not_fit_are_made_anew(monkeypatch):
    expected = tuned_by("cross_entropy")
    tune_machine(monkeypatch, table_bytes=1)
    found = tuned_by("cross_entropy")
    np.testing.assert_allclose(found.prior_prec, expected.prior_prec, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    params, curvature, fit, data = case("cross_entropy")

    def tuned(loss_fn="cross_entropy", objective: Any = "nll", batch: Any = data, prior: Any = 1.0):
        validation = laplax_kfac.Validation(model_fn, batch, loss_fn, objective)
        return laplax_kfac.tune(
            curvature, params, log_likelihood=fit, prior_prec=prior, validation=validation
        )

    with pytest.raises(ValueError, match="`loss_fn='mse'`, but `log_likelihood` is of another"):
        tuned("mse")
    with pytest.raises(ValueError, match="`loss_fn` must be one of 'cross_entropy'"):
        tuned("poisson")
    with pytest.raises(TypeError, match='`objective` must be "nll" or a function, found'):
        tuned(objective=3)
    with pytest.raises(ValueError, match="one value a layer or fewer; found a matrix"):
        tuned(prior=jax.tree.map(lambda p: jnp.ones(p.shape), params))
    with pytest.raises(ValueError, match="need the same leading axis"):
        tuned(batch=(data[0], data[1][:-1]))
    with pytest.raises(TypeError, match="`validation` must be a `Validation`"):
        laplax_kfac.tune(curvature, params, log_likelihood=fit, validation=data)


@pytest.mark.filterwarnings("ignore::laplax_kfac.BoundaryWarning")  # best with a sure layer
def test_held_out_digits_are_predicted_better_than_by_the_evidence():
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.target))
    x, y = digits.images.reshape(-1, 64)[chosen] / 16.0, digits.target[chosen]
    params, curvature, fit = trained(x[:300], y[:300], "cross_entropy", 32, steps=300)
    validation = laplax_kfac.Validation(model_fn, (x[300:500], y[300:500]), "cross_entropy")
    options: Any = {"log_likelihood": fit}

    def of_test(prior_prec):
        predictive = laplax_kfac.predictive_variance(
            curvature, model_fn, params, x[500:1000], prior_prec=prior_prec
        )
        p = laplax_kfac.class_probabilities(predictive)
        return -float(jnp.mean(jnp.log(p[jnp.arange(500), y[500:1000]])))

    by_evidence = laplax_kfac.tune(curvature, params, **options)
    by_data = laplax_kfac.tune(curvature, params, validation=validation, **options)
    by_layer = laplax_kfac.tune(
        curvature, params, prior_prec=jnp.ones(2), validation=validation, **options
    )
    loss = of_test(by_data.prior_prec)
    assert loss < of_test(by_evidence.prior_prec) - 0.02
    assert of_test(by_layer.prior_prec) < loss + 0.02
    assert by_data.validated is not None
    assert by_data.evidence.value < by_evidence.evidence.value
