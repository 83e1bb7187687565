"""The closed-form predictive equals J Sigma J^T with dense J and Sigma."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from conftest import tolerance
from jax.flatten_util import ravel_pytree

import laplax_kfac
from laplax_kfac.predictive import predictive_covariance

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
NAMES = [
    "mlp",  # one position: squares of the inputs are enough
    "mlp_weight_on_the_left",
    "nnx_cnn",
    "nnx_attention",
    "grouped_einsum",
    "scan_over_layers",
    "scan_over_time",
    "embedding",
    "embedding_tied_to_the_output",
    "tied_autoencoder",
    "nnx_layer_norm",
    "weight_norm",
    "leaves_that_do_not_count",
    "two_inputs_and_two_outputs",
]


def targets_of(model_fn, params, inputs):
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    return jax.tree.map(jnp.zeros_like, outputs)


def dense_covariance(curvature, model_fn, params, inputs, prior_prec):
    leaves, treedef = jax.tree.flatten(params)
    moved = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    flat, unravel = ravel_pytree([leaves[k] for k in moved])

    def output(vector, x):
        everything = list(leaves)
        for k, value in zip(moved, unravel(vector), strict=True):
            everything[k] = value
        out = model_fn(input=x, params=jax.tree.unflatten(treedef, everything))
        return jnp.concatenate([jnp.ravel(o) for o in jax.tree.leaves(out)])

    jacobian = jax.vmap(lambda x: jax.jacrev(output)(flat, x))(inputs)
    sizes = np.asarray([leaf.size for leaf in leaves])
    kept = np.repeat([k in moved for k in range(len(leaves))], sizes)
    precision = np.asarray(curvature.to_dense())[np.ix_(kept, kept)]
    covariance = np.linalg.inv(precision + prior_prec * np.eye(len(precision)))
    return jacobian @ covariance @ jacobian.swapaxes(1, 2)


@pytest.mark.parametrize(
    ("name", "separate"),
    [(name, False) for name in NAMES]
    + [(name, True) for name in ("mlp", "nnx_cnn", "scan_over_layers")],
)
def test_covariance_is_that_of_the_dense_matrices(name, separate):
    model_fn, params, inputs, _ = models.by_name(name).make()
    data = inputs, targets_of(model_fn, params, inputs)
    curvature = laplax_kfac.ekfac(
        model_fn, params, data, loss_fn="mse", separate_weight_and_bias=separate
    )
    found = predictive_covariance(curvature, model_fn, params, inputs, prior_prec=0.3)
    expected = dense_covariance(curvature, model_fn, params, inputs, 0.3)
    np.testing.assert_allclose(found.covariance, expected, **CLOSE)
    np.testing.assert_allclose(found.variance, jnp.diagonal(expected, axis1=1, axis2=2), **CLOSE)
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    raveled = [np.reshape(o, (len(o), -1)) for o in jax.tree.leaves(outputs)]
    np.testing.assert_allclose(found.mean, np.concatenate(raveled, axis=1), **CLOSE)


def fitted(**options):
    model_fn, params, inputs, _ = models.by_name("mlp").make()
    data = inputs, targets_of(model_fn, params, inputs)
    return (
        model_fn,
        params,
        inputs,
        laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", **options),
    )


def test_inputs_may_be_worked_on_in_parts():
    model_fn, params, inputs, curvature = fitted()
    whole = predictive_covariance(curvature, model_fn, params, inputs, prior_prec=1.0)
    parts = predictive_covariance(curvature, model_fn, params, inputs, prior_prec=1.0, batch_size=2)
    np.testing.assert_allclose(parts.covariance, whole.covariance, **CLOSE)


def test_jit_and_gradient_in_the_prior():
    model_fn, params, inputs, curvature = fitted()

    @jax.jit
    def total(prior_prec):
        found = predictive_covariance(curvature, model_fn, params, inputs, prior_prec=prior_prec)
        return jnp.sum(found.variance)

    step = 1e-5
    numeric = (total(1.0 + step) - total(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), numeric, rtol=1e-7)


def test_a_curvature_of_chosen_parameters_has_their_predictive():
    model_fn, params, inputs, curvature = fitted(params_filter="last_layer", fallback="diagonal")
    found = predictive_covariance(curvature, model_fn, params, inputs, prior_prec=0.7)
    # Parameters that are left out keep their prior.
    expected = dense_covariance(curvature, model_fn, params, inputs, 0.7)
    assert "none" in [layer.block for layer in curvature.layers]
    left_out = expected - found.covariance  # J J^T / prior_prec of the parameters left out
    assert (jnp.linalg.eigvalsh(left_out) > -1e-9).all()
    assert jnp.linalg.norm(left_out) > 1e-3


def test_a_curvature_of_another_model_is_refused():
    *_, inputs, curvature = fitted()
    other, params, *_ = models.by_name("mlp_without_bias").make()
    with pytest.raises(ValueError, match="`curvature` is of another model: it has the layers"):
        predictive_covariance(curvature, other, params, inputs, prior_prec=1.0)
