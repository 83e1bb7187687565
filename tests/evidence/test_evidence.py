"""The evidence against closed forms: Bayesian linear regression, and dense Laplace elsewhere."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree
from jax.interpreters import mlir
from jax.scipy.stats import multivariate_normal
from laplax.eval.likelihood import marginal_log_likelihood
from support import models
from support.linear_regression import (
    OUTPUTS,
    TALL,
    WIDE,
    density_of_targets,
    fitted,
    linear,
    most_probable,
    regression,
)
from support.matrices import normal
from support.oracles import LOSSES, dense_ggn
from support.tolerances import tolerance

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)


# -- Bayesian linear regression ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["N > P", "N < P"])
@pytest.mark.parametrize("prior_prec", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("noise_variance", [0.05, 4.0])
def test_linear_regression_has_the_density_of_its_targets(shape, prior_prec, noise_variance):
    params = most_probable(shape, prior_prec, noise_variance)
    curvature, fit = fitted(shape)
    found = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit(params), prior_prec=prior_prec,
        noise_variance=noise_variance,
    ).value  # fmt: skip
    expected = density_of_targets(shape, prior_prec, noise_variance)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_a_tempered_likelihood_is_one_of_more_noise_and_other_constants(temperature):
    noise, prior_prec = 0.3, 0.7
    params = most_probable(TALL, prior_prec, noise * temperature)
    curvature, fit = fitted(TALL)
    found = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit(params).at_temperature(temperature),
        prior_prec=prior_prec, noise_variance=noise,
    )  # fmt: skip
    # N(y; f, s)^(1/T) is N(y; f, s T) times (2 pi s T)^(1/2) / (2 pi s)^(1 / (2 T)), a target.
    per_target = jnp.log(2 * np.pi * noise * temperature)
    per_target -= jnp.log(2 * np.pi * noise) / temperature
    expected = density_of_targets(TALL, prior_prec, noise * temperature)
    expected += 0.5 * TALL[0] * OUTPUTS * per_target
    np.testing.assert_allclose(found.value, expected, rtol=1e-8)
    logdet = curvature.logdet(prior_prec=prior_prec, noise_variance=noise * temperature)
    np.testing.assert_allclose(found.log_determinant, logdet, rtol=1e-9)


def test_one_prior_for_weights_and_one_for_biases_of_a_diagonal():
    # With orthogonal features the curvature is diagonal, and the Laplace approximation exact.
    x = np.linalg.qr(np.concatenate([np.ones((8, 1)), normal(8, 3, seed=1)], axis=1))[0][:, 1:]
    y, noise = normal(8, OUTPUTS, seed=4), 0.2
    prior = {"b": 0.4, "w": 5.0}
    features = np.concatenate([np.ones((8, 1)), x], axis=1)
    each = np.asarray([prior["b"], *[prior["w"]] * 3])
    precision = features.T @ features + noise * np.diag(each)
    weights = np.linalg.solve(precision, features.T @ y)
    params = {"b": jnp.asarray(weights[0]), "w": jnp.asarray(weights[1:])}
    curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse", curvature="diagonal")
    fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn="mse")

    def evidence(prior):
        return laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=prior, noise_variance=noise
        ).value

    covariance = noise * jnp.eye(8) + features @ np.diag(1 / each) @ features.T
    expected = jnp.sum(multivariate_normal.logpdf(y.T, jnp.zeros(8), covariance))
    np.testing.assert_allclose(evidence(prior), expected, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(evidence)(prior), expected, rtol=1e-8)


def test_the_squared_error_alone_is_noise_of_variance_one_half():
    params = most_probable(TALL, 0.3, 0.5)
    curvature, fit = fitted(TALL)
    found = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit(params), prior_prec=0.3
    ).value
    np.testing.assert_allclose(found, density_of_targets(TALL, 0.3, 0.5), rtol=1e-8)


def test_away_from_the_mode_the_evidence_is_smaller():
    params = most_probable(TALL, 0.3, 0.5)
    curvature, fit = fitted(TALL)
    moved = jax.tree.map(lambda p: p + 0.1, params)
    found = laplax_kfac.log_marginal_likelihood(
        curvature, moved, log_likelihood=fit(moved), prior_prec=0.3
    ).value
    # By half of the distance in the posterior's precision: the joint density is quadratic.
    step = jnp.full(curvature.space.size, 0.1)
    precision = curvature.to_dense() + 0.3 * jnp.eye(len(step))
    expected = density_of_targets(TALL, 0.3, 0.5) - 0.5 * step @ precision @ step
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["N > P", "N < P"])
def test_gradients_are_those_of_the_closed_form(shape):
    # At the mode the joint density does not change with the parameters, so that those of the
    # closed form, whose parameters move along, are the same.
    logs = jnp.log(jnp.asarray([0.7, 0.2]))
    params = most_probable(shape, 0.7, 0.2)
    curvature, fit = fitted(shape)
    log_likelihood = fit(params)

    def value(logs):
        prior_prec, noise_variance = jnp.exp(logs)
        return laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=log_likelihood, prior_prec=prior_prec,
            noise_variance=noise_variance,
        ).value  # fmt: skip

    found = jax.jit(jax.grad(value))(logs)
    expected = jax.jit(jax.grad(lambda logs: density_of_targets(shape, *jnp.exp(logs))))(logs)
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=["N > P", "N < P"])
def test_linear_regression_with_a_precision_for_each_feature_and_a_mean(shape):
    # log N(y; features m, noise I + features diag(1 / tau) features^T).
    _, features, y = regression(shape)
    logs = jnp.linspace(-1.0, 2.0, features.shape[1] + 1).at[-1].set(jnp.log(0.2))
    mean = {"b": jnp.asarray([0.1, 0.2]), "w": jnp.full((shape[1], OUTPUTS), 0.3)}
    rows = jnp.concatenate([mean["b"][None], mean["w"]])

    def most_probable_here(logs):
        tau, noise = jnp.exp(logs[:-1]), jnp.exp(logs[-1])
        precision = features.T @ features / noise + jnp.diag(tau)
        weights = jnp.linalg.solve(precision, features.T @ y / noise + tau[:, None] * rows)
        return {"b": weights[0], "w": weights[1:]}

    def expected(logs):
        tau, noise = jnp.exp(logs[:-1]), jnp.exp(logs[-1])
        covariance = noise * jnp.eye(len(y)) + features / tau @ features.T
        residuals = (y - features @ rows).T
        return jnp.sum(multivariate_normal.logpdf(residuals, jnp.zeros(len(y)), covariance))

    params = most_probable_here(logs)
    curvature, fit = fitted(shape)
    log_likelihood = fit(params)

    def value(logs):
        tau = jnp.exp(logs[:-1])
        return laplax_kfac.log_marginal_likelihood(
            curvature,
            params,
            log_likelihood=log_likelihood,
            prior_prec={"b": jnp.full(OUTPUTS, tau[0]), "w": tau[1:, None]},
            prior_mean=mean,
            noise_variance=jnp.exp(logs[-1]),
        ).value

    found = jax.jit(jax.value_and_grad(value))(logs)
    wanted = jax.jit(jax.value_and_grad(expected))(logs)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-8)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-8, atol=1e-9)


def test_the_evidence_of_two_tasks_in_turn_is_that_of_both():
    # p(D1, D2) = p(D1) p(D2 | D1), the prior of the second task being the posterior of the first.
    x, features, y = regression(TALL)
    prior_prec, noise = 0.7, 0.5
    parts = [slice(None, 5), slice(5, None)]
    params = [
        _ridge(features[:5], y[:5], prior_prec, noise),
        most_probable(TALL, prior_prec, noise),  # given both
    ]
    total: Any = 0.0
    prior: Any = prior_prec
    mean = None
    for part, at in zip(parts, params, strict=True):
        data = x[part], y[part]
        curvature = laplax_kfac.kfac(linear, at, data, loss_fn="mse")
        fit = laplax_kfac.data_fit(linear, at, data, loss_fn="mse")
        total += laplax_kfac.log_marginal_likelihood(
            curvature, at, log_likelihood=fit, prior_prec=prior, prior_mean=mean,
            noise_variance=noise,
        ).value  # fmt: skip
        prior = laplax_kfac.make_posterior(curvature, prior, sigma_squared=1 / (2 * noise))
        mean = at
    np.testing.assert_allclose(total, density_of_targets(TALL, prior_prec, noise), rtol=1e-8)


def _ridge(features, y, prior_prec, noise):
    precision = features.T @ features + noise * prior_prec * np.eye(features.shape[1])
    weights = np.linalg.solve(precision, features.T @ y)
    return {"b": jnp.asarray(weights[0]), "w": jnp.asarray(weights[1:])}


# -- other likelihoods -------------------------------------------------------------------------


def product_as_a_sum(input, params):
    """A linear layer that has no Kronecker form: its block is the exact dense one."""
    return jnp.sum(input[:, None] * params["w"], axis=0)


X = normal(6, 3, seed=1)
CLASSES = np.asarray([0, 1, 2, 2, 1, 0])
BINARY = np.asarray([[0], [1], [1], [0], [1], [1]])
LINEAR = {"b": normal(3, seed=2), "w": normal(3, 3, seed=3)}
# (model, parameters, data, loss): cases in which every block is exact, and the only one.
EXACT = {
    "logistic regression": (product_as_a_sum, {"w": normal(3, 1)}, (X, BINARY)),
    "softmax regression": (product_as_a_sum, {"w": normal(3, 3)}, (X, CLASSES)),
    "softmax, one-hot": (product_as_a_sum, {"w": normal(3, 3)}, (X, np.eye(3)[CLASSES])),
    "one datapoint": (linear, LINEAR, (X[:1], CLASSES[:1])),
    "weights of zero": (linear, LINEAR | {"w": np.zeros((3, 3))}, (X, CLASSES)),
}


@pytest.mark.parametrize(
    ("case", "correction"),
    [(case, False) for case in EXACT] + [("one datapoint", True), ("weights of zero", True)],
)
def test_the_evidence_is_that_of_the_dense_laplace_approximation(case, correction):
    model_fn, params, data = EXACT[case]
    loss = "binary_cross_entropy" if data[1] is BINARY else "cross_entropy"
    curvature = laplax_kfac.kfac(
        model_fn, params, data, loss_fn=loss, eigenvalue_correction=correction
    )
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn=loss)
    ggn, theta = dense_ggn(model_fn, params, data, loss), np.asarray(ravel_pytree(params)[0])
    likelihood = -sum(LOSSES[loss](model_fn(x, params), y) for x, y in zip(*data, strict=True))
    size = len(theta)
    for prior_prec in (0.1, 5.0):
        found = laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=prior_prec
        )
        determinant = np.linalg.slogdet(ggn + prior_prec * np.eye(size))[1]
        prior = 0.5 * size * np.log(prior_prec / (2 * np.pi)) - 0.5 * prior_prec * theta @ theta
        expected = likelihood + prior + 0.5 * size * np.log(2 * np.pi) - 0.5 * determinant
        np.testing.assert_allclose(found.value, expected, rtol=1e-9)
        np.testing.assert_allclose(found.log_likelihood, likelihood, rtol=1e-9)
        np.testing.assert_allclose(found.log_determinant, determinant, rtol=1e-9)
        np.testing.assert_allclose(found.value, found.log_likelihood - found.complexity, rtol=1e-12)


@pytest.mark.parametrize("noise_variance", [0.05, 4.0])
def test_a_gaussian_of_known_variance_needs_none_in_the_evidence(noise_variance):
    params = most_probable(TALL, 0.3, noise_variance)
    x, _, y = regression(TALL)
    options: Any = {"loss_fn": laplax_kfac.likelihood.gaussian(noise_variance)}
    curvature = laplax_kfac.kfac(linear, params, (x, y), **options)
    fit = laplax_kfac.data_fit(linear, params, (x, y), **options)
    found = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit, prior_prec=0.3
    ).value
    expected = density_of_targets(TALL, 0.3, noise_variance)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("case", ["far from zero", "scales"])
def test_single_precision_is_enough_for_raw_inputs(case):
    random, params = np.random.default_rng(0), most_probable((20, 60), 1.0, 0.5)
    params = jax.tree.map(lambda p: 0.01 * p, params)
    x = random.normal(size=(20, 60)) + 50.0 if case == "far from zero" else None
    if x is None:
        x = random.normal(size=(200, 60)) * np.geomspace(1e-2, 1e4, 60)
    y = random.normal(size=(len(x), OUTPUTS))
    found: dict[bool, Any] = {}
    for double in (False, True):
        with jax.enable_x64(double):
            at = jax.tree.map(lambda v: jnp.asarray(v, float), (params, (x, y)))
            matrix = laplax_kfac.kfac(linear, *at, loss_fn="mse")
            fit = laplax_kfac.data_fit(linear, *at, loss_fn="mse")
            found[double] = [
                (
                    laplax_kfac.log_marginal_likelihood(
                        matrix, at[0], log_likelihood=fit, prior_prec=prior
                    ).complexity,
                    laplax_kfac.predictive_variance(
                        matrix, linear, *(at[0], at[1][0][:5]), prior_prec=prior
                    ).variance.mean(),
                )
                for prior in (1e-2, 1.0)
            ]
    np.testing.assert_allclose(
        np.asarray(found[False], np.float64), np.asarray(found[True]), rtol=1e-2
    )


@pytest.mark.parametrize("noise_variance", [0.05, 0.1, 0.5, 4.0])
def test_an_empirical_fisher_matrix_scales_with_the_square_of_the_loss(noise_variance):
    x, features, y = regression(TALL)
    x, features, y = (z[:, :1] if z is y else z for z in (x, features, y))
    params = {"b": jnp.zeros(1), "w": jnp.ones((features.shape[1] - 1, 1))}
    options: Any = {"fisher_type": "empirical", "curvature": "block"}
    curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse", **options)
    fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn="mse")
    weights, _ = ravel_pytree(params)
    # Products of gradients of (f - y)^2 / (2 noise), by their definition.
    gradients = (features @ weights - y[:, 0])[:, None] * features / noise_variance
    precision = gradients.T @ gradients + 0.3 * np.eye(len(weights))
    joint = -0.5 * np.sum((features @ weights - y[:, 0]) ** 2) / noise_variance
    joint -= 0.5 * len(y) * np.log(2 * np.pi * noise_variance)
    joint += 0.5 * (len(weights) * np.log(0.3) - 0.3 * weights @ weights)
    expected = joint - 0.5 * np.linalg.slogdet(precision)[1]

    for prior in (0.3, jax.tree.map(lambda p: jnp.full(p.shape, 0.3), params)):
        found = laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=prior, noise_variance=noise_variance
        ).value
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    factor = 1 / (2 * noise_variance)
    posterior = laplax_kfac.make_posterior(curvature, 0.3, sigma_squared=factor)
    np.testing.assert_allclose(posterior.precision.to_dense(), precision, rtol=1e-8, atol=1e-9)
    variance = laplax_kfac.predictive_variance(
        curvature, linear, params, x[:3], prior_prec=0.3, sigma_squared=factor
    ).variance
    direct = np.sum(features[:3].T * np.linalg.solve(precision, features[:3].T), axis=0)
    np.testing.assert_allclose(variance[:, 0], direct, rtol=1e-8)
    # Where the noise is fixed, the likelihood with this noise says the same.
    known = laplax_kfac.likelihood.gaussian(noise_variance)
    same = laplax_kfac.kfac(linear, params, (x, y), loss_fn=known, **options)
    np.testing.assert_allclose(same.to_dense(), precision - 0.3 * np.eye(len(weights)), atol=1e-8)


def test_the_noise_is_tuned_with_an_empirical_fisher_matrix():
    x, _, y = regression(TALL)
    params = most_probable(TALL, 1.0, 0.5)
    options: Any = {"fisher_type": "empirical"}
    curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse", **options)
    fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn="mse")
    tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit, noise_variance=1.0)

    def with_noise(variance):
        known = laplax_kfac.likelihood.gaussian(variance)
        matrix = laplax_kfac.kfac(linear, params, (x, y), loss_fn=known, **options)
        fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn=known)
        return laplax_kfac.tune(matrix, params, log_likelihood=fit).evidence.value

    assert tuned.noise_variance is not None
    best = float(tuned.noise_variance)
    values = [with_noise(factor * best) for factor in (0.95, 1.0, 1.05)]
    np.testing.assert_allclose(values[1], tuned.evidence.value, rtol=1e-6)
    assert values[1] > max(values[0], values[2])


def test_masked_outputs_do_not_enter_the_evidence():
    # The second output of every example is missing; so may be the parameters that only it has.
    x, _, y = regression(TALL)
    params = most_probable(TALL, 0.3, 0.2)
    mask = np.tile([1.0, 0.0], (len(x), 1))
    kept = jax.tree.map(lambda p: p[..., :1], params)
    cases: Any = [
        (kept, (x, y[:, :1]), "mse"),
        (params, (x, (y, mask)), laplax_kfac.likelihood.weighted("mse")),
    ]
    values = []
    for p, data, loss_fn in cases:
        curvature = laplax_kfac.kfac(linear, p, data, loss_fn=loss_fn)
        fit = laplax_kfac.data_fit(linear, p, data, loss_fn=loss_fn)
        evidence = laplax_kfac.log_marginal_likelihood(
            curvature, p, log_likelihood=fit, prior_prec=0.3, noise_variance=0.2
        )
        values.append(evidence.value)
        assert fit.num_outputs == len(x)
    # Parameters that nothing is known of keep their prior: its density at them is what is more.
    theta = np.asarray(ravel_pytree(jax.tree.map(lambda p: p[..., 1:], params))[0])
    np.testing.assert_allclose(values[1], values[0] - 0.15 * theta @ theta, rtol=1e-8)


def test_integer_leaves_are_no_parameters():
    # The prior's density of a leaf without curvature cancels its part of the determinant.
    def counted(input, params):
        return linear(input, params) + 0.0 * params["step"]

    x, _, y = regression(TALL)
    params = most_probable(TALL, 0.3, 0.5)
    with_step = params | {"step": jnp.asarray(7)}
    options: Any = {"loss_fn": "mse"}
    values = []
    for model_fn, p in ((linear, params), (counted, with_step)):
        curvature = laplax_kfac.kfac(model_fn, p, (x, y), **options)
        fit = laplax_kfac.data_fit(model_fn, p, (x, y), **options)
        values.append(
            laplax_kfac.log_marginal_likelihood(
                curvature, p, log_likelihood=fit, prior_prec=0.3
            ).value
        )
    np.testing.assert_allclose(values[1], values[0], rtol=1e-12)


@pytest.mark.parametrize("params_filter", ["w", "b"])
def test_parameters_that_are_left_out_are_constants(params_filter):
    x, _, y = regression(TALL)
    params = most_probable(TALL, 0.3, 0.5)
    kept = {params_filter: params[params_filter]}
    options: Any = {"loss_fn": "mse"}
    filtered = laplax_kfac.kfac(linear, params, (x, y), params_filter=params_filter, **options)

    def with_constants(input, params):
        return linear(input, most_probable(TALL, 0.3, 0.5) | params)

    closed_over = laplax_kfac.kfac(with_constants, kept, (x, y), **options)
    fit = laplax_kfac.data_fit(linear, params, (x, y), **options)

    def value(curvature, params, prior_prec):
        return laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=prior_prec, noise_variance=0.4
        ).value

    found, expected = (
        jax.jit(jax.value_and_grad(value, argnums=2))(c, p, 0.3)
        for c, p in ((filtered, params), (closed_over, kept))
    )
    assert abs(expected[1]) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_laplax_has_the_same_up_to_a_constant():
    # Of its two conventions for the noise, both must be passed; the density's normaliser it drops.
    x, _, y = regression(TALL)
    prior_prec, noise = 0.7, 0.2
    params = most_probable(TALL, 1.0, 1.0)
    curvature, fit = fitted(TALL)
    full = laplax.laplace(linear, params, (x, y), loss_fn="mse", curv_type="full")[1]
    theirs = marginal_log_likelihood(
        full,
        {"prior_prec": prior_prec, "sigma_squared": 1 / (2 * noise), "sigma": noise},
        {"input": x, "target": y},
        linear,
        params,
        "mse",
        "full",
        vmap_over_data=True,
    )
    ours = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit(params), prior_prec=prior_prec, noise_variance=noise
    ).value
    constant = y.size / 2 * np.log(2 * np.pi * noise)
    assert abs(constant) > 1
    np.testing.assert_allclose(ours, theirs - constant, rtol=1e-9)


# -- the fit to the data -----------------------------------------------------------------------


class Loader:
    """Batches under other names, started anew with every iteration."""

    def __init__(self, x, y, size):
        self.batches = [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]

    def __iter__(self):
        return ({"image": x, "label": y} for x, y in self.batches)


def from_loader(batch):
    return batch["image"], batch["label"]


STREAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one batch": (lambda x, y: (x, y), {}),
    "a dictionary": (lambda x, y: {"input": x, "target": y}, {}),
    "split by us": (lambda x, y: (x, y), {"batch_size": 4}),
    "a ragged list": (lambda x, y: [(x[:3], y[:3]), (x[3:], y[3:])], {}),
    "a generator": (lambda x, y: ((x[k : k + 2], y[k : k + 2]) for k in (0, 2, 4)), {}),
    "a loader": (lambda x, y: Loader(x, y, 4), {"transform": from_loader}),
    "a model of batches": (lambda x, y: (x, y), {"vmap_over_data": False}),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_the_fit_is_a_sum_over_the_data(stream):
    data, options = STREAMS[stream]
    found = laplax_kfac.data_fit(
        linear, LINEAR, data(X, CLASSES), loss_fn="cross_entropy", **options
    )
    losses = [
        LOSSES["cross_entropy"](linear(x, LINEAR), y) for x, y in zip(X, CLASSES, strict=True)
    ]
    np.testing.assert_allclose(found.loss, sum(losses), **CLOSE)
    assert found.num_outputs == 6 * 3
    assert not found.gaussian
    np.testing.assert_array_equal(found.log_likelihood(), -found.loss)


def test_the_fit_of_a_callable_and_of_several_outputs():
    model_fn, params, inputs, _ = models.by_name("two_inputs_and_two_outputs").make()
    targets = {"mean": np.ones((3, 2)), "hidden": np.ones((3, 3))}

    def loss(f, y):
        return sum(jnp.sum((f[name] - y[name]) ** 2) for name in f)

    found = laplax_kfac.data_fit(model_fn, params, (inputs, targets), loss_fn=loss)
    named = laplax_kfac.data_fit(model_fn, params, (inputs, targets), loss_fn="mse")
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    expected = sum(np.sum((np.asarray(outputs[name]) - 1.0) ** 2) for name in targets)
    for fit in (found, named):
        np.testing.assert_allclose(fit.loss, expected, **CLOSE)
        assert fit.num_outputs == 3 * 5
    assert (found.gaussian, named.gaussian) == (False, True)
    density = -0.5 * (expected / 0.2 + 15 * np.log(2 * np.pi * 0.2))
    np.testing.assert_allclose(named.log_likelihood(0.2), density, **CLOSE)


def test_the_fit_of_a_model_without_a_rule_for_vmap():
    # `kfac` takes such models, too.
    primitive = Primitive("without_vmap")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, lambda _, x: [x])

    def model_fn(input, params):
        return primitive.bind(linear(input, params))

    found = laplax_kfac.data_fit(model_fn, LINEAR, (X, CLASSES), loss_fn="cross_entropy")
    expected = laplax_kfac.data_fit(linear, LINEAR, (X, CLASSES), loss_fn="cross_entropy")
    np.testing.assert_allclose(found.loss, expected.loss, **CLOSE)
    assert found.num_outputs == 6 * 3


# -- derivatives -------------------------------------------------------------------------------


def test_fitting_and_evidence_are_differentiable_in_the_parameters():
    # For the squared error the curvature does not depend on them: only the joint density does.
    x, _, y = regression(TALL)

    @jax.jit
    @jax.grad
    def gradient(params):
        curvature = laplax_kfac.kfac(linear, params, (x, y), loss_fn="mse")
        fit = laplax_kfac.data_fit(linear, params, (x, y), loss_fn="mse")
        return laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=0.3, noise_variance=0.2
        ).value

    for found in jax.tree.leaves(gradient(most_probable(TALL, 0.3, 0.2))):
        np.testing.assert_allclose(found, 0.0, atol=1e-9)
    moved = jax.tree.map(lambda p: p + 0.1, most_probable(TALL, 0.3, 0.2))
    assert all(np.abs(g).min() > 0.1 for g in jax.tree.leaves(gradient(moved)))


# -- errors ------------------------------------------------------------------------------------


@functools.cache
def softmax_case():
    model_fn, params, data = EXACT["one datapoint"]
    options: Any = {"loss_fn": "cross_entropy"}
    curvature = laplax_kfac.kfac(model_fn, params, data, **options)
    return curvature, params, laplax_kfac.data_fit(model_fn, params, data, **options)


@pytest.mark.parametrize("function", [laplax_kfac.log_marginal_likelihood, laplax_kfac.tune])
def test_noise_belongs_to_the_squared_error(function):
    curvature, params, fit = softmax_case()
    with pytest.raises(ValueError, match="`noise_variance` belongs to the Gaussian likelihood of"):
        function(curvature, params, log_likelihood=fit, prior_prec=1.0, noise_variance=0.5)


@pytest.mark.parametrize("function", [laplax_kfac.log_marginal_likelihood, laplax_kfac.tune])
def test_the_fit_must_be_one(function):
    curvature, params, fit = softmax_case()
    with pytest.raises(TypeError, match="`log_likelihood` must come from `data_fit`, got float"):
        function(curvature, params, log_likelihood=float(-fit.loss), prior_prec=1.0)


@pytest.mark.parametrize("prior_prec", [0.0, -1.0])
@pytest.mark.parametrize("function", [laplax_kfac.log_marginal_likelihood, laplax_kfac.tune])
def test_a_prior_that_is_not_positive_is_refused(function, prior_prec):
    curvature, params, fit = softmax_case()
    with pytest.raises(ValueError, match="`prior_prec` must be positive"):
        function(curvature, params, log_likelihood=fit, prior_prec=prior_prec)


@pytest.mark.parametrize("noise_variance", [0.0, -1.0])
@pytest.mark.parametrize("function", [laplax_kfac.log_marginal_likelihood, laplax_kfac.tune])
def test_a_noise_that_is_not_positive_is_refused(function, noise_variance):
    params = most_probable(TALL, 1.0, 1.0)
    curvature, fit = fitted(TALL)
    arguments: Any = {"prior_prec": 1.0, "noise_variance": noise_variance}
    with pytest.raises(ValueError, match="`noise_variance` must be positive"):
        function(curvature, params, log_likelihood=fit(params), **arguments)


def test_a_stream_without_batches_is_refused():
    with pytest.raises(ValueError, match="`data` has no batches"):
        laplax_kfac.data_fit(linear, LINEAR, [], loss_fn="cross_entropy")
