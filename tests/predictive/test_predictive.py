"""The closed-form predictive equals J Sigma J^T with dense J and Sigma."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import linear_regression, models
from support.machines import tune_machine
from support.matrices import basis_of, normal
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.blocks.blocks import Block
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.parsing.program import parse
from laplax_kfac.parsing.selection import select
from laplax_kfac.predictive import jacobians
from laplax_kfac.predictive.gaussians import Marginals, Predictive
from laplax_kfac.predictive.predictive import (
    joint_covariance,
    predictive_covariance,
    predictive_variance,
)
from laplax_kfac.predictive.samples import predictive_samples

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
PRIOR = 0.3
SEPARATE = {"separate_weight_and_bias": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", SEPARATE),
    ("mixer", {}),
    ("two_inputs_and_two_outputs", {}),  # a pytree of outputs
    ("nnx_cnn", SEPARATE),
    ("mixer", {"curvature": "block"}),
    ("embedding", {"curvature": "diagonal"}),
    ("depthwise_conv", {}),  # a stack
    ("nnx_attention", {}),
    ("scan_over_layers", SEPARATE),
    ("scan_over_time", {}),
    ("cond_branches", {}),
    ("embedding", {}),
    ("tied_autoencoder", {}),
    ("embedding_tied_to_the_output", {}),
    ("embedding_of_tokens_out_of_bounds", {}),
    ("nnx_layer_norm", {}),
    ("weight_norm", {"fallback": "diagonal"}),
    ("leaves_that_do_not_count", {}),
]


class Fitted(NamedTuple):
    """A model and its curvature."""

    curvature: Any
    model_fn: Any
    params: Any
    inputs: Any


def drawn(name, **options):
    """The model with random blocks of the right kinds: their eigenvalues are no products."""
    model_fn, params, inputs, _ = models.by_name(name).make()
    one = jax.tree.map(lambda x: x[0], inputs)
    program = parse(model_fn, params, one, selection=select(**options))
    rng = np.random.default_rng(0)

    def basis(layer):
        axes = len(layer.shape) - (layer.stack > 1)
        stack = layer.shape[:-axes]
        return tuple(
            kind.promote(basis_of(np.linalg.qr(rng.normal(size=(*stack, n, n)))[0]), n)
            for kind, n in zip(layer.kinds, layer.shape[-axes:], strict=True)
        )

    blocks = [Block(basis(ly), jnp.asarray(rng.uniform(size=ly.shape))) for ly in program.layers]
    curvature = Curvature(tuple(blocks), program.layers, program.space)
    return Fitted(curvature, model_fn, params, inputs)


@functools.cache
def mlp():
    return drawn("mlp")


def fitted(name, fit=laplax_kfac.kfac, **options):
    model_fn, params, inputs, _ = models.by_name(name).make()
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    data = inputs, jax.tree.map(jnp.zeros_like, outputs)
    return Fitted(fit(model_fn, params, data, loss_fn="mse", **options), model_fn, params, inputs)


def dense(model, prior_prec=PRIOR):
    """Outputs (N, C), Jacobian (N, C, P) and covariance (P, P) over the inexact leaves."""
    curvature, model_fn, params, inputs = model
    leaves, treedef = jax.tree.flatten(params)
    moved = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    flat, unravel = ravel_pytree([leaves[k] for k in moved])

    def output(vector, x):
        everything = list(leaves)
        for k, value in zip(moved, unravel(vector), strict=True):
            everything[k] = value
        return ravel_pytree(model_fn(input=x, params=jax.tree.unflatten(treedef, everything)))[0]

    both = jax.jit(jax.vmap(lambda x: (output(flat, x), jax.jacrev(output)(flat, x))))
    outputs, jacobian = both(inputs)
    sizes = np.asarray([leaf.size for leaf in leaves])
    kept = np.repeat([k in moved for k in range(len(leaves))], sizes)
    precision = np.asarray(jax.jit(lambda c: c.to_dense())(curvature))[np.ix_(kept, kept)]
    return outputs, jacobian, np.linalg.inv(precision + prior_prec * np.eye(len(precision)))


# -- closed form ---------------------------------------------------------------------------------


def assert_exact(model, *functions):
    outputs, jacobian, sigma = dense(model)
    expected = np.einsum("ncp,pq,mdq->ncmd", jacobian, sigma, jacobian, optimize=True)
    within = np.stack([expected[n, :, n] for n in range(len(outputs))])

    @jax.jit  # one program, for each is a compilation
    def everything(curvature, params, inputs):
        arguments = curvature, model.model_fn, params, inputs
        return [function(*arguments, prior_prec=PRIOR) for function in functions]

    for found in everything(model.curvature, model.params, model.inputs):
        if isinstance(found, jax.Array):
            np.testing.assert_allclose(found, expected, **CLOSE)
            continue
        variances = np.diagonal(within, axis1=1, axis2=2)
        assert found.variance.shape == found.mean.shape
        np.testing.assert_allclose(found.mean.reshape(outputs.shape), outputs, **CLOSE)
        np.testing.assert_allclose(found.variance.reshape(outputs.shape), variances, **CLOSE)
        if isinstance(found, Predictive):
            np.testing.assert_allclose(found.covariance, within, **CLOSE)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_covariances_are_those_of_the_dense_matrices(name, options):
    assert_exact(drawn(name, **options), joint_covariance, predictive_variance)


@pytest.mark.parametrize(
    ("fit", "kfac_approx"), [(laplax_kfac.kfac, "reduce"), (laplax_kfac.ekfac, "expand")]
)
def test_covariances_of_fitted_curvature_are_those_of_the_dense_matrices(fit, kfac_approx):
    assert_exact(fitted("nnx_cnn", fit, kfac_approx=kfac_approx), predictive_covariance)


@pytest.mark.parametrize("name", ["mixer", "embedding", "nnx_layer_norm"])
def test_covariances_of_single_inputs_need_no_pairs(name):
    assert_exact(drawn(name), predictive_covariance)


@pytest.mark.parametrize("room", [2**30, 6000, 1])
def test_memory_is_bounded_by_working_on_inputs_in_parts(room, monkeypatch):
    curvature, model_fn, params, _ = mlp()
    tune_machine(monkeypatch, record_bytes=room)
    x = models.normal((7, 4))
    program = parse(model_fn, params, x[0])
    sizes = [
        jacobians.most_inputs(program, 100, traced=True, pairs=pairs) for pairs in (False, True)
    ]
    assert sizes == {2**30: [100, 100], 6000: [5, 2], 1: [1, 1]}[room]
    outputs, jacobian, sigma = dense((curvature, model_fn, params, x))
    expected = np.einsum("ncp,pq,mdq->ncmd", jacobian, sigma, jacobian, optimize=True)
    found = predictive_covariance(curvature, model_fn, params, x, prior_prec=PRIOR)
    np.testing.assert_allclose(found.mean, outputs, **CLOSE)
    np.testing.assert_allclose(found.covariance, [expected[n, :, n] for n in range(7)], **CLOSE)
    joint = joint_covariance(curvature, model_fn, params, x, x[:2], prior_prec=PRIOR)
    np.testing.assert_allclose(joint, expected[:, :, :2], **CLOSE)


def test_jit_and_gradient_in_the_prior():
    curvature, model_fn, params, inputs = mlp()

    @functools.partial(jax.jit, static_argnums=1)
    def total(prior_prec, batch_size):
        found = predictive_variance(
            curvature, model_fn, params, inputs, prior_prec=prior_prec, batch_size=batch_size
        )
        return jnp.sum(found.variance)

    step = 1e-5
    numeric = (total(1.0 + step, 8) - total(1.0 - step, 8)) / (2 * step)
    for batch_size in (8, 2):  # in one part, and in several
        np.testing.assert_allclose(jax.grad(total)(1.0, batch_size), numeric, rtol=1e-7)


def test_a_grid_of_priors_does_not_redo_what_does_not_depend_on_them():
    curvature, model_fn, params, inputs = mlp()
    calls = []

    def counted(input, params):
        calls.append(input)
        return model_fn(input=input, params=params)

    def variances(prior_prec):
        return predictive_variance(
            curvature, counted, params, inputs, prior_prec=prior_prec
        ).variance

    priors = jnp.asarray([0.1, PRIOR, 2.0])
    jaxpr = jax.make_jaxpr(jax.vmap(variances))(priors)
    inner = [e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    tanh = [e for body in inner for e in body.eqns if e.primitive.name == "tanh"]
    assert [e.outvars[0].aval.shape for e in tanh] == [(models.NUM_EXAMPLES, 5)]
    found = jax.jit(jax.vmap(variances))(priors)
    _, jacobian, sigma = dense(mlp())
    expected = np.einsum("ncp,pq,ncq->nc", jacobian, sigma, jacobian)
    np.testing.assert_allclose(found[1], expected, **CLOSE)


def test_frozen_parameters_have_no_part_in_it():
    model = fitted("mlp", params_filter="last_layer")
    found = predictive_covariance(*model, prior_prec=0.7)
    assert "none" in [layer.block for layer in model.curvature.layers]
    _, jacobian, sigma = dense(model, 0.7)
    free = 5 * (4 + 1)  # lin1 comes first
    expected = np.einsum(
        "ncp,pq,ndq->ncd", jacobian[..., free:], sigma[free:, free:], jacobian[..., free:]
    )
    np.testing.assert_allclose(found.covariance, expected, **CLOSE)


def test_noise_adds_its_variance():
    mean, covariance = jnp.ones((2, 3)), jnp.ones((2, 3, 3))
    noise = np.asarray([1.0, 2.0, 3.0])
    found = Predictive(mean, covariance).with_noise(noise)
    np.testing.assert_array_equal(found.covariance, np.ones((2, 3, 3)) + np.diag(noise))
    np.testing.assert_array_equal(found.mean, mean)
    marginals = Marginals(mean, jnp.ones((2, 3))).with_noise(0.5)
    np.testing.assert_array_equal(marginals.variance, np.full((2, 3), 1.5))
    for gaussian in (found, marginals):
        with pytest.raises(ValueError, match="must be positive and finite; found -1"):
            gaussian.with_noise(-1.0)


# -- samples of functions ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "leaves_that_do_not_count", "straight_through_weight"])
@pytest.mark.parametrize("linearised", [True, False])
def test_sampled_functions_are_those_of_the_weights_of_the_same_key(name, linearised):
    model = drawn(name)
    curvature, model_fn, params, inputs = model
    key = jax.random.key(3)
    weights = curvature.sample(key, 4, params, prior_prec=PRIOR)
    found = predictive_samples(
        curvature, model_fn, params, inputs, key, 4, prior_prec=PRIOR, linearised=linearised
    )
    if linearised:
        outputs, jacobian, _ = dense(model)
        moved = [
            (a - b).reshape(4, -1)
            for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(params), strict=True)
            if jnp.issubdtype(b.dtype, jnp.inexact)
        ]
        expected = outputs + np.einsum("ncp,sp->snc", jacobian, np.concatenate(moved, axis=1))
    else:
        at = jax.vmap(lambda p, x: ravel_pytree(model_fn(input=x, params=p))[0], (None, 0))
        expected = jax.vmap(at, (0, None))(weights, inputs)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_sampled_functions_do_not_depend_on_the_parts_they_are_drawn_in(monkeypatch):
    curvature, model_fn, params, inputs = mlp()
    draw = functools.partial(
        predictive_samples, curvature, model_fn, params, inputs, jax.random.key(0), prior_prec=1.0
    )
    whole = draw(5)
    tune_machine(monkeypatch, record_bytes=3 * 2 * 8 * curvature.space.size)  # 2 at once
    np.testing.assert_allclose(draw(5, batch_size=2), whole, **CLOSE)
    np.testing.assert_allclose(draw(2), whole[:2], **CLOSE)


def test_sampled_functions_have_the_joint_covariance():
    curvature, model_fn, params, inputs = mlp()
    arguments, n = (curvature, model_fn, params, inputs), 40_000
    found = predictive_samples(*arguments, jax.random.key(0), n, prior_prec=PRIOR).reshape(n, -1)
    some = predictive_samples(*arguments, jax.random.key(0), 25, prior_prec=PRIOR, progress=True)
    np.testing.assert_allclose(some.reshape(25, -1), found[:25], **CLOSE)
    joint = joint_covariance(*arguments, prior_prec=PRIOR)
    covariance = np.asarray(joint).reshape(found.shape[1], -1)
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert (np.abs(np.cov(found.T) - covariance) < 6 * error).all()


# -- errors --------------------------------------------------------------------------------------


def test_a_curvature_of_another_model_is_refused():
    curvature, _, params, inputs = mlp()
    other, others, *_ = models.by_name("mlp_without_bias").make()

    def without_layers(input, params):
        return input[:1] * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    for function in (predictive_covariance, predictive_variance, joint_covariance):
        with pytest.raises(ValueError, match="`curvature` is of another model: it has the layers"):
            function(curvature, without_layers, params, inputs, prior_prec=1.0)
        with pytest.raises(ValueError, match="`params` must be a pytree with the structure"):
            function(curvature, other, others, inputs, prior_prec=1.0)
    with pytest.raises(ValueError, match="`params` must be a pytree with the structure"):
        predictive_samples(curvature, other, others, inputs, jax.random.key(0), 2, prior_prec=1.0)


def test_other_inputs_must_be_like_the_inputs():
    curvature, model_fn, params, inputs = mlp()
    with pytest.raises(ValueError, match="`others` must be like `inputs`, apart from their number"):
        joint_covariance(curvature, model_fn, params, inputs, inputs[:, :3], prior_prec=1.0)


@pytest.mark.parametrize("value", [0, 2.5, None])
def test_numbers_of_inputs_and_samples_must_be_positive(value):
    curvature, model_fn, params, inputs = mlp()
    key = jax.random.key(0)
    message = f"must be a positive integer, found {value}"
    with pytest.raises(ValueError, match=f"`batch_size` {message}"):
        predictive_covariance(*mlp(), prior_prec=1.0, batch_size=value)
    with pytest.raises(ValueError, match=f"`num_samples` {message}"):
        predictive_samples(curvature, model_fn, params, inputs, key, value, prior_prec=1.0)


# -- noise, what was tuned, and shapes -----------------------------------------------------------


@functools.cache
def regression():
    """A linear model, its curvature, and what the evidence chooses."""
    shape = linear_regression.TALL
    x, features, y = linear_regression.regression(shape)
    curvature, fit = linear_regression.fitted(shape)
    params = linear_regression.most_probable(shape, 1.0, 0.3)
    tuned = laplax_kfac.tune(curvature, params, log_likelihood=fit(params), noise_variance=1.0)
    return curvature, params, (x, features, y), fit(params), tuned


def test_variances_with_noise_are_those_of_linear_regression():
    curvature, params, (x, features, _), _, tuned = regression()
    tau, noise = float(tuned.prior_prec), float(tuned.noise_variance)
    precision = features.T @ features / noise + tau * np.eye(features.shape[1])
    expected = np.einsum("ni,ij,nj->n", features, np.linalg.inv(precision), features)
    for arguments in (
        {"prior_prec": tuned},
        {"prior_prec": tau, "noise_variance": noise},
        {"prior_prec": tau, "sigma_squared": 1 / (2 * noise)},
    ):
        call = (curvature, linear_regression.linear, params, x)
        marginals = predictive_variance(*call, **arguments)
        np.testing.assert_allclose(marginals.variance[:, 0], expected, **CLOSE)
        joint = np.asarray(joint_covariance(*call, **arguments))
        np.testing.assert_allclose(
            np.einsum("ncnc->nc", joint), marginals.variance, rtol=1e-9, atol=1e-12
        )
        covariance = predictive_covariance(*call, **arguments).covariance
        np.testing.assert_allclose(covariance[:, 1, 1], expected, **CLOSE)
        samples = predictive_samples(*call, jax.random.key(0), 3, **arguments)
        weights = curvature.sample(jax.random.key(0), 3, params, prior_prec=tuned)
        values = jax.vmap(lambda p: linear_regression.linear(x, p))(weights)
        np.testing.assert_allclose(samples, values, rtol=1e-9, atol=1e-12)


def test_what_was_tuned_goes_into_the_evidence_and_into_tuning_whole():
    curvature, params, _, fit, tuned = regression()
    evidence = laplax_kfac.log_marginal_likelihood(
        curvature, params, log_likelihood=fit, prior_prec=tuned
    )
    np.testing.assert_allclose(evidence.value, tuned.evidence.value, rtol=1e-10)
    again = laplax_kfac.tune(curvature, params, log_likelihood=fit, prior_prec=tuned)
    assert again.noise_variance is not None
    np.testing.assert_allclose(again.noise_variance, tuned.noise_variance, rtol=1e-2)


def test_a_posterior_with_a_mean_is_the_next_prior_with_that_mean():
    curvature, params, _, fit, _ = regression()
    call = functools.partial(
        laplax_kfac.log_marginal_likelihood, curvature, params, log_likelihood=fit
    )
    mean = jax.tree.map(lambda x: 0.5 * x, params)
    known = call(prior_prec=laplax_kfac.make_posterior(curvature, 2.0, params=mean))
    given = call(prior_prec=laplax_kfac.make_posterior(curvature, 2.0), prior_mean=mean)
    np.testing.assert_allclose(known.value, given.value, rtol=1e-12)
    assert abs(known.value - call(prior_prec=laplax_kfac.make_posterior(curvature, 2.0)).value) > 1


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (1, 2, 2)], ids=str)
def test_predictives_have_the_shape_of_the_output(shape):
    def model_fn(input, params):
        return (input @ params).reshape(shape)

    params, x = normal(3, math.prod(shape), seed=1), normal(5, 3, seed=2)
    y = jnp.zeros((5, *shape))
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse")
    full = predictive_covariance(curvature, model_fn, params, x, prior_prec=PRIOR)
    marginals = predictive_variance(curvature, model_fn, params, x, prior_prec=PRIOR)
    np.testing.assert_allclose(full.mean, jax.vmap(lambda x: model_fn(x, params))(x), **CLOSE)
    assert full.covariance.shape == (5, math.prod(shape), math.prod(shape))
    for predictive in (full, marginals):
        assert predictive.mean.shape == predictive.variance.shape == (5, *shape)
        noise = np.arange(1.0, 1 + math.prod(shape))
        for given in (noise, noise.reshape(shape)):
            added = predictive.with_noise(given).variance - predictive.variance
            np.testing.assert_allclose(added, np.broadcast_to(noise.reshape(shape), added.shape))
    np.testing.assert_allclose(full.variance, marginals.variance, **CLOSE)
