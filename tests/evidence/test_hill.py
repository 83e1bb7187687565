"""When a search is over: the same number of nats below the optimum, whatever the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal

import laplax_kfac
from laplax_kfac.evidence.fit import DataFit
from laplax_kfac.evidence.hill import Hill, pushed
from laplax_kfac.evidence.minimisation import minimise

LIMITS = jnp.log(jnp.asarray([1e-8, 1e8]))
NATS = 1e-3


def hill(value, size, tolerance=1e-5):
    return Hill(value, LIMITS, tolerance, jnp.ones(size))


@pytest.mark.usefixtures("x64")
def test_the_expected_gain_of_a_parabola_is_how_far_below_its_top_it_is():
    root = normal(5, 5, seed=1)
    sharpness, top = root @ root.T + np.eye(5), normal(5, seed=2)

    def value(logs):
        return 3.0 - 0.5 * (logs - top) @ sharpness @ (logs - top)

    for distance in (1e-4, 1e-2, 1.0):
        logs = jnp.asarray(top + distance * normal(5, seed=3))
        below = float(3.0 - value(logs))
        # The gain is known from below to a tenth, or once it is above the tolerance.
        for tolerance, least in ((1e9, 0.7), (0.5 * below, 0.5)):
            gain = hill(value, 5, tolerance).expected_gain(logs, jax.grad(value)(logs))
            assert least * below <= gain <= below * (1 + 1e-3)
        assert not hill(value, 5, 0.5 * below).is_top(logs, jax.grad(value)(logs))
        assert hill(value, 5, 1.1 * below).is_top(logs, jax.grad(value)(logs))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("entry", range(2))
def test_what_is_not_a_number_is_never_a_top(entry):
    for logs in (jnp.zeros(2), jnp.full(2, LIMITS[0]), jnp.full(2, LIMITS[1])):
        assert not hill(lambda x: -jnp.sum(x * 0.0), 2).is_top(
            logs, jnp.zeros(2).at[entry].set(jnp.nan)
        )
        assert not hill(lambda x: jnp.nan * jnp.sum(x), 2).is_top(logs, jnp.zeros(2))
        assert hill(lambda x: -jnp.sum(x * 0.0), 2).is_top(logs, jnp.zeros(2))


@pytest.mark.usefixtures("x64")
def test_at_a_bound_only_what_points_inwards_counts():
    at = hill(lambda x: jnp.sum(x), 2)
    up = jnp.full(2, LIMITS[1])
    assert at.is_top(up, jnp.ones(2))
    assert not at.is_top(up, -jnp.ones(2))
    assert not at.is_top(up.at[0].set(0.0), jnp.ones(2))


@pytest.mark.usefixtures("x64")
def test_a_way_that_flattens_out_is_followed_to_the_bound():
    def value(x):  # the optimum of the first is at infinity, of the second at 1
        return -jnp.exp(-x[0]) - (x[1] - 1.0) ** 2

    found = pushed(hill(value, 2), jnp.asarray([15.0, 1.0 + 1e-6]))
    np.testing.assert_allclose(found, jnp.asarray([LIMITS[1], 1.0 + 1e-6]))


# -- linear regression, with data that are there many times --------------------------------------


def model(input, params):
    hidden = input @ params["first"]
    return hidden @ params["second"]


@functools.cache
def case(dtype, times):
    """Blocks of a curvature, parameters and fit: all data ``times`` times."""
    params = {"first": jnp.asarray(normal(3, 4, seed=1), dtype)}
    params["second"] = jnp.asarray(normal(4, 2, seed=2), dtype)
    x = jnp.asarray(normal(20, 3, seed=3), dtype)
    y = model(x, params) + jnp.asarray(0.3 * normal(20, 2, seed=4), dtype)
    curvature = laplax_kfac.kfac(model, params, (x, y), loss_fn="mse", curvature="diagonal")
    fit = laplax_kfac.data_fit(model, params, (x, y), loss_fn="mse")
    fit = DataFit(times * fit.loss, times * fit.num_outputs, gaussian=True)
    return curvature.map(lambda values: times * values), params, fit


def best_each(curvature, params):
    """Where every weight has a precision t of its own: t w^2 = q / (q + t), q its curvature."""
    w, q = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
        for tree in (params, curvature.diagonal())
    )
    # With less than 1 / w^2 = q the optimum is finite; it always is, the root of a quadratic.
    t = 0.5 * (-q + np.sqrt(q**2 + 4 * q / w**2))
    return t, -0.5 * np.sum(t * w**2 + np.log1p(q / t))


def best_shared(curvature, params, name):
    """The best precision of one layer by bisection, and its part of the evidence."""
    w = np.asarray(params[name], np.float64)
    q = np.asarray(curvature.diagonal()[name], np.float64)
    low, high = np.log(1e-8), np.log(1e8)
    for _ in range(200):
        middle = 0.5 * (low + high)
        t = np.exp(middle)
        low, high = (low, middle) if t * np.sum(w**2) > np.sum(q / (q + t)) else (middle, high)
    t = np.exp(0.5 * (low + high))
    return t, -0.5 * (t * np.sum(w**2) + np.sum(np.log1p(q / t)))


def assert_near(tuned, volume, dtype):
    # The fit is the same everywhere. In float32 it is large against what is left.
    gained = np.asarray(tuned.evidence.value - tuned.evidence.log_likelihood, np.float64)
    rounding = 8 * np.finfo(dtype).eps * np.abs(tuned.evidence.value)
    assert volume - gained <= NATS + rounding
    assert tuned.converged


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
def test_one_precision_a_layer(dtype, times, start):
    curvature, params, fit = case(dtype, times)
    tuned = laplax_kfac.tune(
        curvature, params, log_likelihood=fit, prior_prec=dict.fromkeys(params, start)
    )
    best = {name: best_shared(curvature, params, name) for name in params}
    assert_near(tuned, sum(value for _, value in best.values()), dtype)
    for name, (precision, _) in best.items():
        np.testing.assert_allclose(tuned.prior_prec[name], precision, rtol=2e-2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", ["tune", "minimise"])
def test_one_precision_a_weight(times, start, method):
    curvature, params, fit = case(np.float64, times)
    each = jax.tree.map(lambda w: jnp.full(w.shape, start), params)
    expected, volume = best_each(curvature, params)

    def evidence(prior):
        return laplax_kfac.log_marginal_likelihood(
            curvature, params, log_likelihood=fit, prior_prec=prior
        )

    if method == "tune":
        tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=each)
        assert_near(tuned, volume, np.float64)
        found = tuned.prior_prec
    else:
        found, converged = minimise(lambda prior: -evidence(prior).value, each)
        assert converged
        assert volume + evidence(found).complexity <= NATS
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])
    np.testing.assert_allclose(flat, expected, rtol=5e-2)


@pytest.mark.usefixtures("x64")
def test_an_objective_that_becomes_nan_is_not_converged():
    def objective(x):
        return jnp.where(x < 0.5, jnp.nan, x)

    _, converged = minimise(objective, 1.0, steps=20)
    assert not converged


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["lbfgs", "adam", "grid"])
def test_a_curvature_that_is_nan_is_never_tuned(method):
    curvature, params, fit = case(np.float64, 1)
    spoilt = curvature.map(lambda values: values.at[..., 0].set(jnp.nan))
    steps = {"lbfgs": 20, "adam": 20, "grid": 5}[method]
    tuned = laplax_kfac.tune(spoilt, params, log_likelihood=fit, method=method, steps=steps)
    assert not tuned.converged
