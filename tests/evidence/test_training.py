"""Training by the evidence: closed forms of linear regression, and real data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.linear_regression import TALL, density_of_targets, linear, most_probable, regression

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

# For a quadratic objective, L-BFGS on all data arrives after a few steps.
FULL_BATCH: dict[str, Any] = {"loss_fn": "mse", "optimizer": optax.lbfgs()}


def start():
    return jax.tree.map(jnp.zeros_like, most_probable(TALL, 1.0, 1.0))


@functools.cache
def best_of_the_closed_form():
    """Hyperparameters that maximise the density of the targets, and that density, by Newton."""

    def density(logs):
        return density_of_targets(TALL, *jnp.exp(logs))

    logs = jnp.zeros(2)
    step = jax.jit(lambda z: z - jnp.linalg.solve(jax.hessian(density)(z), jax.grad(density)(z)))
    for _ in range(20):
        logs = step(logs)
    assert jnp.abs(jax.grad(density)(logs)).max() < 1e-6
    return jnp.exp(logs), density(logs)


def test_linear_regression_ends_at_the_optimum_of_the_closed_form():
    x, _, y = regression(TALL)
    found = laplax_kfac.marglik_training(
        linear, start(), (x, y), **FULL_BATCH, epochs=60, noise_variance=1.0, hyper_steps=40
    )
    expected, density = best_of_the_closed_form()
    hyperparameters: Any = [found.prior_prec, found.noise_variance]
    np.testing.assert_allclose(hyperparameters, expected, rtol=2e-2)
    np.testing.assert_allclose(found.evidence.value, density, rtol=1e-4)
    expected = most_probable(TALL, found.prior_prec, found.noise_variance)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.params, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-2)
    np.testing.assert_array_equal(found.trace.max(), found.evidence.value)
    assert len(found.losses) == len(found.trace) == 60
    assert found.trace[0] < found.trace[-1]


def test_complex_weights_are_trained_as_their_parts_are():
    x, _, y = regression(TALL)
    theirs = {"re": jnp.zeros(x.shape[1]), "im": jnp.zeros(x.shape[1])}
    ours = {"w": jnp.zeros(x.shape[1], complex)}

    def with_numbers(input, params):
        return ((input + 1j * jnp.sin(input)) @ params["w"]).real[None]

    def with_parts(input, params):
        return with_numbers(input, {"w": jax.lax.complex(params["re"], params["im"])})

    y = y.reshape(len(x), -1)[:, :1]
    found, expected = (
        laplax_kfac.marglik_training(
            model_fn, params, (x, y), **FULL_BATCH, epochs=8, noise_variance=1.0, hyper_steps=4
        )
        for model_fn, params in ((with_numbers, ours), (with_parts, theirs))
    )
    np.testing.assert_allclose(found.params["w"].real, expected.params["re"], rtol=1e-6)
    np.testing.assert_allclose(found.params["w"].imag, expected.params["im"], rtol=1e-6)
    assert jnp.abs(found.params["w"].imag).max() > 1e-3


def test_batches_of_any_sizes_have_one_objective():
    # With hyperparameters that stay, training ends at the mode, whatever the batches: each is
    # weighted as all of the data.
    x, _, y = regression(TALL)
    parts = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    schedule = optax.exponential_decay(0.1, 3, 0.985)
    options: dict[str, Any] = {"prior_prec": 5.0, "noise_variance": 0.5, "hyper_steps": 0}
    found = laplax_kfac.marglik_training(
        linear, start(), parts, loss_fn="mse", optimizer=optax.adam(schedule), epochs=400,
        every=400, **options,
    )  # fmt: skip
    expected = most_probable(TALL, 5.0, 0.5)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.params, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.1)
    assert float(found.prior_prec) == pytest.approx(5.0)
    assert found.epoch == 400
    assert len(found.trace) == 1


def test_the_best_epoch_is_returned():
    x, _, y = regression(TALL)

    def schedule(step):
        return jnp.where(step < 40, 0.1, -3.0)  # away from the optimum from then on

    found = laplax_kfac.marglik_training(
        linear, start(), (x, y), loss_fn="mse", optimizer=optax.sgd(schedule), epochs=60,
        burn_in=4, every=2, hyper_steps=0, patience=3, noise_variance=0.5,
    )  # fmt: skip
    best = int(np.argmax(found.trace))
    assert found.epoch == 4 + 2 * (best + 1) == 40
    assert len(found.trace) == best + 1 + 3
    assert len(found.losses) == 46
    fit = laplax_kfac.data_fit(linear, found.params, (x, y), loss_fn="mse")
    evidence = laplax_kfac.log_marginal_likelihood(
        found.curvature, found.params, log_likelihood=fit, prior_prec=found.prior_prec,
        noise_variance=found.noise_variance,
    )  # fmt: skip
    np.testing.assert_allclose(evidence.value, found.evidence.value, rtol=1e-9)


def test_options_of_the_curvature_and_the_prior():
    # A loader, EKFAC, separate biases, a function of hyperparameters, a mean, and integer leaves.
    x, _, y = regression(TALL)

    def model_fn(input, params):
        return linear(input, params) + 0.0 * params["step"]

    params = start() | {"step": jnp.asarray(7)}
    mean = jax.tree.map(jnp.ones_like, params)
    found = laplax_kfac.marglik_training(
        model_fn,
        params,
        [{"x": x, "y": y}],
        transform=lambda batch: (batch["x"], batch["y"]),
        loss_fn="mse",
        optimizer=optax.adam(0.1),
        epochs=3,
        batch_size=5,
        prior_prec=lambda h: {"b": h[0], "w": h[1], "step": 1.0},
        hyperparameters=jnp.ones(2),
        prior_mean=mean,
        eigenvalue_correction=True,
        separate_weight_and_bias=True,
        vmap_over_data=False,
    )
    assert [layer.name for layer in found.curvature.layers] == ["b", "step", "w"]
    assert found.hyperparameters.shape == (2,)
    np.testing.assert_array_equal(found.prior_prec["w"], found.hyperparameters[1])
    assert found.noise_variance is None
    assert int(found.params["step"]) == 7
    assert float(jnp.abs(found.params["w"] - params["w"]).max()) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a positive integer, found 0"),
        ({"epochs": 3, "burn_in": 2, "every": 2}, "must not exceed `epochs`"),
        ({"prior_prec": -1.0}, "`prior_prec` must be positive"),
        ({"loss_fn": "cross_entropy", "noise_variance": 1.0}, "belongs to the Gaussian"),
    ],
    ids=str,
)
def test_bad_options_are_clear_errors(options, message):
    x, _, y = regression(TALL)
    y = np.argmax(y, axis=1) if "loss_fn" in options else y
    with pytest.raises(ValueError, match=message):
        laplax_kfac.marglik_training(linear, start(), (x, y), **{"loss_fn": "mse", **options})


def test_data_that_end_after_one_pass_are_refused():
    x, _, y = regression(TALL)
    with pytest.raises(TypeError, match="goes through `data` more than once"):
        laplax_kfac.marglik_training(linear, start(), iter([(x, y)]), loss_fn="mse")


def test_an_evidence_that_is_never_finite_is_an_error():
    x, _, y = regression(TALL)
    with pytest.raises(ValueError, match="never finite in 2 epochs"):
        laplax_kfac.marglik_training(
            linear, start(), (x, y), loss_fn="mse", epochs=2, optimizer=optax.sgd(1e200)
        )


@pytest.mark.slow
def test_real_data_get_a_better_model_than_a_fixed_prior_gives():
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(axis=0), ((y - y.mean()) / y.std())[:, None]
    train, test = (x[:221], y[:221]), (x[221:], y[221:])

    def model_fn(input, params):
        return jnp.tanh(input @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    random = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(random.normal(size=(10, 50)) / 10**0.5),
        "b1": jnp.zeros(50),
        "w2": jnp.asarray(random.normal(size=(50, 1)) / 50**0.5),
        "b2": jnp.zeros(1),
    }
    options: dict[str, Any] = {
        "loss_fn": "mse", "optimizer": optax.adam(1e-2), "epochs": 150, "every": 5,
        "noise_variance": 0.5, "batch_size": 64,
    }  # fmt: skip
    fixed, tuned = (
        laplax_kfac.marglik_training(model_fn, params, train, **options, **prior)
        for prior in (
            {"prior_prec": lambda _: 1.0, "hyperparameters": ()},
            {"prior_prec": np.ones(2)},
        )
    )
    scores = [
        laplax_kfac.data_fit(model_fn, found.params, test, loss_fn="mse").log_likelihood(
            found.noise_variance
        )
        / len(test[0])
        for found in (fixed, tuned)
    ]
    assert tuned.evidence.value > fixed.evidence.value + 10
    assert scores[1] > scores[0] + 0.02
