"""Prior precisions by layer and by leaf, against dense matrices and densities."""

import jax
import jax.numpy as jnp
import laplax
import models
import numpy as np
import pytest
from conftest import tolerance
from jax.flatten_util import ravel_pytree

import laplax_kfac
from laplax_kfac.prior import log_prior, per_block

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


CASES = {
    "scalar": (0.7, lambda *_: 0.7, {}),
    "one value a layer": (np.asarray([0.5, 3.0]), of_layers, {}),
    "prefix": (BY_LAYER, of_layers, {}),
    "leaves": ({**BY_LEAF, "lin2": 3.0}, lambda m, k: BY_LEAF[m][k], SEPARATE),
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
        (0.0, "`prior_prec` must be positive, or the posterior is improper; found 0.0"),
        ({"lin1": 1.0, "lin2": -1.0}, "must be positive, or the posterior is improper; found -1.0"),
        (BY_LEAF, "differs between the parameters of layer 'lin1', which share a block"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_precisions_are_clear_errors(prior_prec, message):
    *_, curvature = fitted()
    with pytest.raises(ValueError, match=message):
        curvature.logdet(prior_prec=prior_prec)
