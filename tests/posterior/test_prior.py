"""Prior precisions by layer and by leaf, against dense matrices and densities."""

from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import models
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.posterior.prior import log_prior, per_block

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
SEPARATE = {"separate_weight_and_bias": True}


def fitted(**options):
    """A model of two layers with biases: blocks of lin1 and lin2."""
    model_fn, params, inputs, n_out = models.by_name("mlp").make()
    data = inputs, jnp.zeros((len(inputs), n_out))
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", **options)
    return model_fn, params, data, curvature


def spread(params, values):
    """One number for every parameter, by the name of its module and leaf."""
    return ravel_pytree(
        {m: {k: jnp.full(x.shape, values(m, k)) for k, x in leaves.items()}
         for m, leaves in params.items()}
    )[0]  # fmt: skip


BY_LAYER = {"lin1": 0.5, "lin2": 3.0}
BY_LEAF = {"lin1": {"b": 2.0, "w": 0.1}, "lin2": {"b": 3.0, "w": 3.0}}


def of_layers(module, _):
    return BY_LAYER[module]


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "scalar": (0.7, lambda *_: 0.7, {}),
    "one value a layer": (np.asarray([0.5, 3.0]), of_layers, {}),
    "prefix": (BY_LAYER, of_layers, {}),
    "leaves": ({**BY_LEAF, "lin2": 3.0}, lambda m, k: BY_LEAF[m][k], SEPARATE),
    "leaves of a diagonal": (BY_LEAF, lambda m, k: BY_LEAF[m][k], {"curvature": "diagonal"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_the_precision_of_its_group(case):
    prior_prec, values, options = CASES[case]
    _, params, _, curvature = fitted(**options)
    each = spread(params, values)
    dense = curvature.to_dense() + jnp.diag(each)
    v = jax.tree.map(lambda x: x + 1.0, params)
    found = ravel_pytree(curvature.inverse_mv(v, prior_prec=prior_prec))[0]
    np.testing.assert_allclose(found, jnp.linalg.solve(dense, ravel_pytree(v)[0]), **CLOSE)
    logdet = curvature.logdet(prior_prec=prior_prec)
    np.testing.assert_allclose(logdet, jnp.linalg.slogdet(dense)[1], **CLOSE)
    density = jax.scipy.stats.norm.logpdf(ravel_pytree(params)[0], scale=each**-0.5).sum()
    np.testing.assert_allclose(log_prior(prior_prec, curvature, params), density, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_the_prior_has_a_mean(case):
    prior_prec, values, options = CASES[case]
    _, params, _, curvature = fitted(**options)
    mean = jax.tree.map(lambda x: 0.3 * x + 0.1, params)
    each = spread(params, values)
    offset = ravel_pytree(params)[0] - ravel_pytree(mean)[0]
    density = jax.scipy.stats.norm.logpdf(offset, scale=each**-0.5).sum()
    found = log_prior(prior_prec, curvature, params, mean)
    np.testing.assert_allclose(found, density, **CLOSE)


def test_one_value_for_every_parameter():
    _, params, _, curvature = fitted()
    random = np.random.default_rng(0)
    prior_prec = {
        "lin1": jax.tree.map(lambda x: jnp.asarray(random.uniform(1, 2, x.shape)), params["lin1"]),
        "lin2": {"b": 3.0, "w": jnp.asarray(random.uniform(1, 2, (len(params["lin2"]["w"]), 1)))},
    }
    spread_out = jax.tree.map(lambda x, p: jnp.broadcast_to(p, x.shape), params, prior_prec)
    each = ravel_pytree(spread_out)[0]
    mean = jax.tree.map(lambda x: 0.3 * x + 0.1, params)
    offset = ravel_pytree(params)[0] - ravel_pytree(mean)[0]
    density = jax.scipy.stats.norm.logpdf(offset, scale=each**-0.5).sum()
    found = jax.jit(log_prior)(prior_prec, curvature, params, mean)
    np.testing.assert_allclose(found, density, **CLOSE)
    # With the curvature it is added as any other matrix: the diagonal of the sum is exact.
    precision = laplax_kfac.make_posterior(curvature, prior_prec).precision
    np.testing.assert_allclose(precision.trace(), curvature.trace() + each.sum(), **CLOSE)


def test_the_posterior_of_a_task_is_the_prior_of_the_next():
    _, params, _, curvature = fitted()
    posterior = laplax_kfac.make_posterior(curvature, BY_LAYER)
    mean = jax.tree.map(lambda x: 0.3 * x + 0.1, params)
    offset = ravel_pytree(params)[0] - ravel_pytree(mean)[0]
    precision = posterior.precision.to_dense()
    expected = jax.scipy.stats.multivariate_normal.logpdf(
        offset, jnp.zeros(len(offset)), jnp.linalg.inv(precision)
    )
    found = log_prior(posterior.precision, curvature, params, mean)
    np.testing.assert_allclose(found, expected, **CLOSE)
    np.testing.assert_allclose(
        posterior.penalty(params, mean), 0.5 * offset @ precision @ offset, **CLOSE
    )
    gradient = ravel_pytree(jax.jit(jax.grad(posterior.penalty))(params, mean))[0]
    np.testing.assert_allclose(gradient, precision @ offset, **CLOSE)
    # The next posterior has both: here exactly, for the curvature is the same once more.
    v = jax.tree.map(lambda x: x + 1.0, params)
    found = ravel_pytree(curvature.inverse_mv(v, prior_prec=posterior))[0]
    expected = jnp.linalg.solve(curvature.to_dense() + precision, ravel_pytree(v)[0])
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_penalties_of_several_tasks_are_exact():
    # A sum of Kronecker blocks has no eigendecomposition of its own, and needs none here.
    model_fn, params, data, first = fitted()
    moved = jax.tree.map(lambda x: x + 0.3, params)
    second = laplax_kfac.kfac(model_fn, moved, data, loss_fn="mse")
    v = ravel_pytree(params)[0]
    total = first.to_dense() + second.to_dense()
    found = first.quadratic_form(params) + second.quadratic_form(params)
    np.testing.assert_allclose(found, v @ total @ v, **CLOSE)


def test_frozen_parameters_have_no_part_in_the_penalty():
    _, params, _, curvature = fitted(params_filter="lin2")
    mean = jax.tree.map(jnp.zeros_like, params)
    found, gradient = jax.value_and_grad(laplax_kfac.make_posterior(curvature, 0.5).penalty)(
        params, mean
    )
    assert np.isfinite(found)
    assert found > 0
    for leaf in jax.tree.leaves(gradient["lin1"]):
        np.testing.assert_array_equal(leaf, 0.0)


def test_frozen_parameters_have_no_prior():
    _, params, _, curvature = fitted(params_filter="lin2")
    density = jax.scipy.stats.norm.logpdf(ravel_pytree(params["lin2"])[0], scale=2.0).sum()
    np.testing.assert_allclose(log_prior(0.25, curvature, params), density, **CLOSE)
    assert [float(v) for v in per_block(np.asarray([4.0]), curvature)].count(4.0) == 1


def test_tuning_by_layer_beats_tuning_one_scalar():
    model_fn, params, data, curvature = fitted()
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    one, each = (
        laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=start)
        for start in (1.0, {"lin1": 1.0, "lin2": 1.0})
    )
    assert each.converged
    assert each.evidence.value > one.evidence.value
    assert set(each.prior_prec) == {"lin1", "lin2"}
    by_number = laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=jnp.ones(2))
    np.testing.assert_allclose(by_number.prior_prec, list(each.prior_prec.values()), rtol=1e-6)


def test_laplax_takes_a_precision_for_each_layer():
    model_fn, params, data, curvature = fitted()
    posterior_fn, _ = laplax.laplace(model_fn, params, data, loss_fn="mse", curv_type="kfac")
    posterior = posterior_fn({"prior_prec": jnp.asarray([0.5, 3.0])})
    found = posterior.cov_mv(posterior.state)(params)
    expected = curvature.inverse_mv(params, prior_prec={"lin1": 0.5, "lin2": 3.0})
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_gradients_in_the_precision_of_each_layer():
    *_, curvature = fitted()
    found = jax.jit(jax.grad(lambda p: curvature.logdet(prior_prec=p)))(jnp.asarray([0.5, 3.0]))
    traces = [
        jnp.sum(1.0 / (b.eigenvalues + p))
        for b, p in zip(curvature.blocks, (0.5, 3.0), strict=True)
    ]
    np.testing.assert_allclose(found, traces, **CLOSE)


@pytest.mark.parametrize(
    ("prior_prec", "message"),
    [
        (np.ones(3), r"shape \(3,\), but the curvature has 2 layers \(lin1, lin2\): pass a scalar"),
        ({"lin1": 1.0}, "an array with one value a layer, or a pytree prefix"),
        ({"lin1": np.ones(2), "lin2": 1.0}, "must have scalar leaves"),
        (0.0, "`prior_prec` must be positive and finite, or the posterior is improper; found 0.0"),
        ({"lin1": 1.0, "lin2": -1.0}, "must be positive and finite, or .* improper; found -1.0"),
        (BY_LEAF, "differs between the parameters of layer 'lin1', which share a block"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_precisions_are_clear_errors(prior_prec, message):
    *_, curvature = fitted()
    with pytest.raises(ValueError, match=message):
        curvature.logdet(prior_prec=prior_prec)


def test_precisions_that_are_functions_are_clear_errors():
    *_, curvature = fitted()
    with pytest.raises(TypeError, match="is a function; call it with its hyperparameters"):
        curvature.logdet(prior_prec=lambda h: h)


@pytest.mark.parametrize("leaf", [0.0, -1.0])
def test_matrices_that_are_not_definite_are_clear_errors(leaf):
    _, params, _, curvature = fitted()
    with pytest.raises(ValueError, match="positive definite, or the prior is improper; in layer"):
        curvature.logdet(prior_prec=curvature)
    bad = jax.tree.map(lambda x: jnp.full(x.shape, leaf), params)
    with pytest.raises(ValueError, match="must be positive and finite, as a matrix"):
        curvature.logdet(prior_prec=bad)


def test_means_of_another_structure_are_clear_errors():
    _, params, _, curvature = fitted()
    with pytest.raises(ValueError, match="`prior_mean` must be a pytree with the structure"):
        log_prior(1.0, curvature, params, params["lin1"])
