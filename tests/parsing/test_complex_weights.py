"""Complex weights are found as real ones, in models that stay what they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import models, oracles
from support.models import inputs, normal
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import jaxprs
from laplax_kfac.parsing.complex_weights import with_real_weights

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)


# -- the same function ---------------------------------------------------------------------------


def through_structure(z, w):
    w = jnp.concatenate([w[:1].T.conj(), -w[1:].T], axis=1)[:, ::-1].reshape(3, 2)
    w = jnp.pad(w, ((0, 1), (0, 0))).at[3].set(1j * w[0]).at[2].add(w[0] - 2.0)
    w = jnp.where(jnp.arange(4)[:, None] < 2, w, w[jnp.asarray([3, 2, 1, 0])] / 2.0)
    return z @ (w * np.asarray([1.0, 1 - 2j]) + w[:1] / jnp.sum(z.real))


def through_calls(z, w):
    @jax.checkpoint
    def layer(h, scaled):
        return jnp.tanh(h.real) + 1j * (h @ scaled).imag

    def step(h, each):
        h = lax.cond(jnp.sum(h.real) > 0, lambda h, v: layer(h, v), lambda h, v: h @ v, h, each)
        return h, h.real + each.imag.sum()

    square = jnp.stack([w[:, :2], 1j * w[:, 1:]])
    carry, outs = lax.scan(step, z[:2], square)
    return jax.jit(lambda a: a * 2.0)(w) * jnp.abs(carry).sum() + jnp.sum(outs)


def through_nonlinear_functions(z, w):
    return z[:3] @ jnp.exp(w.T) + jnp.fft.fft(w)[0, 0] + (w * w)[:, 0]


def of_two_weights(z, w):
    return (z[:3] * w[0]) @ (w.T @ w.conj())


FUNCTIONS = [through_structure, through_calls, through_nonlinear_functions, of_two_weights]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_and_derivatives_are_the_same(function):
    def model(params, x):
        w = params["re"] + 1j * params["im"]
        return jnp.abs(function(jnp.fft.fft(x), w))

    params, x = normal({"re": (2, 3), "im": (2, 3)}), inputs(4)[0]
    jaxpr, consts, _ = jaxprs.trace(model, params, x)
    rewritten, more = with_real_weights(jaxpr, consts, [True, True])
    assert rewritten is not jaxpr

    def evaluated(params, x):
        return jax.core.eval_jaxpr(rewritten, [], *more, *jax.tree.leaves((params, x)))[0]

    np.testing.assert_allclose(evaluated(params, x), model(params, x), **CLOSE)
    for found, exact in zip(
        jax.tree.leaves(jax.jacrev(evaluated, (0, 1))(params, x)),
        jax.tree.leaves(jax.jacrev(model, (0, 1))(params, x)),
        strict=True,
    ):
        np.testing.assert_allclose(found, exact, **CLOSE)


def test_models_without_complex_weights_are_left_alone():
    for name in ("mlp", "fourier_mixing_of_tokens"):
        model_fn, params, x, _ = models.by_name(name).make()
        jaxpr, consts, _ = jaxprs.trace(lambda p, x, f=model_fn: f(input=x, params=p), params, x[0])
        assert with_real_weights(jaxpr, consts, [True] * len(jax.tree.leaves(params)))[0] is jaxpr


def test_frozen_weights_are_data():
    model_fn, params, x, _ = models.by_name("fourier_layer_with_a_skip").make()
    layers = laplax_kfac.find_layers(model_fn, params, x[0], params_filter=["skip", "out"])
    found = {layer.name: (layer.block, layer.positions) for layer in layers}
    assert found["skip"] == ("kronecker", 8)
    assert found["out"] == ("kronecker", 1)
    assert {found[name] for name in found if name.startswith("spectral")} == {("none", 1)}


# -- the curvature of Fourier neural operators -----------------------------------------------------


def product(z, weight):
    return jnp.einsum("mi,mio->mo", z, weight["re"] + 1j * weight["im"])


def product_of_parts(z, weight):
    """The same in real numbers, with blocks of their own for the parts of the weight."""
    a, b, re, im = z.real, z.imag, weight["re"], weight["im"]
    of = functools.partial(jnp.einsum, "mi,mio->mo")
    return lax.complex(of(a, re) - of(b, im), of(a, im) + of(b, re))


def operator(product):
    """Two layers with skips, as Li et al. (2021) have them."""

    def model_fn(input, params):
        h = input @ params["lift"]
        for layer in params["layers"]:
            y = product(jnp.fft.rfft(h, axis=0)[:3], layer["spectral"])
            h = jax.nn.gelu(jnp.fft.irfft(y, n=len(h), axis=0) + h @ layer["skip"])
        return h @ params["out"]

    return model_fn


@functools.cache
def setting():
    spectral = {"re": (3, 3, 3), "im": (3, 3, 3)}
    layers = [{"spectral": spectral, "skip": (3, 3)} for _ in range(2)]
    params = normal({"lift": (1, 3), "layers": layers, "out": (3, 1)})
    grid, rng = np.arange(8) / 8, np.random.default_rng(0)
    amplitudes, phases = rng.normal(size=(4, 4, 1)), rng.uniform(size=(4, 4, 1))
    waves = amplitudes * np.cos(2 * np.pi * (np.arange(4)[:, None, None] * grid + phases))
    x = waves.sum(axis=0)[..., None]
    data = x, np.roll(x, 1, axis=1) ** 2
    exact = oracles.dense_ggn(operator(product), params, data, "mse")
    return params, data, np.asarray(exact)


def ids_of(params, layer):
    """Where the parameters of each mode are in the flat order, shape (modes, p)."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    parts = unravel(jnp.arange(len(flat)))["layers"][layer]["spectral"]
    return np.concatenate([np.asarray(p, int).reshape(3, -1) for p in jax.tree.leaves(parts)], 1)


def distances(curvature, params, exact):
    """Relative distance from the exact blocks of the modes of each layer."""
    found = np.asarray(curvature.to_dense())
    for layer in range(2):
        ours, theirs = (
            np.stack([matrix[np.ix_(i, i)] for i in ids_of(params, layer)])
            for matrix in (found, exact)
        )
        yield np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_blocks_of_complex_weights_are_nearer_than_those_of_their_parts():
    params, data, exact = setting()
    fits = [
        laplax_kfac.kfoc(operator(p), params, data, loss_fn="mse")
        for p in (product, product_of_parts)
    ]
    joint, apart = (list(distances(fit, params, exact)) for fit in fits)
    assert joint[0] <= apart[0] * 1.05
    assert joint[1] < 0.5 * apart[1]


def test_eigenvalue_correction_has_the_exact_trace():
    params, data, exact = setting()
    curvature = laplax_kfac.ekfac(operator(product), params, data, loss_fn="mse")
    np.testing.assert_allclose(curvature.trace(), np.trace(exact), **CLOSE)
    blocks = laplax_kfac.kfac(operator(product), params, data, loss_fn="mse", curvature="block")
    mask = np.zeros_like(exact, bool)
    for layer in range(2):
        for i in ids_of(params, layer):
            mask[np.ix_(i, i)] = True
    np.testing.assert_allclose(
        np.where(mask, blocks.to_dense(), 0.0), np.where(mask, exact, 0.0), **CLOSE
    )


def test_parts_of_complex_numbers_are_no_positions():
    """Without others, reduce is expand; else it is that of the sums of complex numbers."""
    model_fn, params, x, outputs = models.by_name("fourier_layer_with_a_skip").make()
    data = x, np.zeros((len(x), outputs))
    expand, reduce = (
        laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", kfac_approx=approx)
        for approx in ("expand", "reduce")
    )
    (number,) = (k for k, layer in enumerate(expand.layers) if layer.name == "spectral")
    np.testing.assert_allclose(
        expand.blocks[number].eigenvalues, reduce.blocks[number].eigenvalues, **CLOSE
    )

    def of_means(input, params):
        return jnp.fft.irfft(product(jnp.mean(input, 0) + 0j, params), n=8, axis=0)

    def of_all(input, params):
        z = jax.vmap(lambda x: product(x + 0j, params))(input)
        return jnp.fft.irfft(jnp.mean(z, 0), n=8, axis=0)

    def in_parts(function):
        def model_fn(input, params):
            return function(lax.complex(input[..., 0], input[..., 1]), params)

        return model_fn

    params = normal({"re": (3, 2, 3), "im": (3, 2, 3)})
    data = inputs(4, 3, 2, 2), np.zeros((3, 8, 3))
    mean, every = (
        laplax_kfac.kfac(in_parts(f), params, data, loss_fn="mse", kfac_approx="reduce")
        for f in (of_means, of_all)
    )
    np.testing.assert_allclose(mean.to_dense(), every.to_dense(), **CLOSE)


def test_predictive_is_that_of_the_dense_covariance():
    params, (x, y), _ = setting()
    model_fn = operator(product)
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse")
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacrev(lambda v: model_fn(x[0], unravel(v)).ravel())(flat)
    precision = curvature.to_dense() + 0.7 * jnp.eye(len(flat))
    found = laplax_kfac.predictive_covariance(
        curvature, model_fn, params, x[:1], prior_prec=0.7, sigma_squared=1.0
    )
    exact = jacobian @ jnp.linalg.solve(precision, jacobian.T)
    np.testing.assert_allclose(found.covariance.reshape(exact.shape), exact, **CLOSE)


def test_one_example_is_exact_where_the_rest_commutes_with_shifts():
    """Then cotangents of the modes are circular; at mode zero, inputs and cotangents are real."""

    def model_fn(input, params):
        y = product(jnp.fft.rfft(input, axis=0)[:3], params)
        return jnp.fft.irfft(y, n=len(input), axis=0)

    params = normal({"re": (3, 2, 3), "im": (3, 2, 3)})
    data = inputs(8, 2)[:1], np.zeros((1, 8, 3))
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    np.testing.assert_allclose(curvature.to_dense(), exact, **CLOSE)


def test_one_example_of_a_real_input_is_exact():
    def model_fn(input, params):
        y = input @ (params["re"] + 1j * params["im"])
        return jnp.abs(y) * jnp.sin(y.real)

    params = normal({"re": (3, 2), "im": (3, 2)})
    data = inputs(3)[:1], np.zeros((1, 2))
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    np.testing.assert_allclose(curvature.to_dense(), exact, **CLOSE)


# -- leaves of complex numbers ---------------------------------------------------------------------


def split(params):
    """The same parameters with real and imaginary part of complex leaves as leaves of their own."""
    return jax.tree.map(
        lambda x: {"re": x.real, "im": x.imag} if jnp.iscomplexobj(x) else x, params
    )


def joined(params):
    return jax.tree.map(
        lambda x: lax.complex(x["re"], x["im"]) if isinstance(x, dict) and "re" in x else x,
        params, is_leaf=lambda x: isinstance(x, dict) and "re" in x,
    )  # fmt: skip


@functools.cache
def fits(name, kind):
    """A curvature of a model with complex leaves, and one where their parts are leaves."""
    model_fn, params, x, outputs = models.by_name(name).make()
    data = x, np.zeros((len(x), outputs))

    def apart(input, params):
        return model_fn(input=input, params=joined(params))

    fit = getattr(laplax_kfac, kind)
    return data, *(
        (function, p, fit(function, p, data, loss_fn="mse"))
        for function, p in ((model_fn, params), (apart, split(params)))
    )


def assert_same(found, expected):
    pairs = zip(jax.tree.leaves(split(found)), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("complex_leaves", "ekfac"), ("complex_leaf_of_modes_in_two_dimensions", "kfac")],
)
def test_complex_leaves_are_pairs_of_real_ones(name, kind):
    data, (model_fn, params, ours), (apart, pair, theirs) = fits(name, kind)
    assert ours.num_free() == theirs.num_free() == models.num_parameters(params)
    np.testing.assert_allclose(ours.trace(), theirs.trace(), **CLOSE)
    assert_same(ours.diagonal(), theirs.diagonal())
    vector = jax.tree.map(jnp.sin, params)
    assert_same(ours.mv(vector), theirs.mv(split(vector)))
    np.testing.assert_allclose(
        ours.quadratic_form(vector), theirs.quadratic_form(split(vector)), **CLOSE
    )
    dense = np.asarray(ours.to_dense())
    assert dense.shape == (models.num_parameters(params),) * 2
    np.testing.assert_allclose(
        np.linalg.eigvalsh(dense), np.linalg.eigvalsh(theirs.to_dense()), atol=1e-9
    )
    first, second = (
        laplax_kfac.relative_error(*args, data, loss_fn="mse").total
        for args in ((ours, model_fn, params), (theirs, apart, pair))
    )
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_posteriors_of_complex_leaves_are_those_of_pairs(tmp_path):
    (x, _), (model_fn, params, ours), (apart, pair, theirs) = fits("complex_leaves", "ekfac")
    key = jax.random.key(1)
    laplax_kfac.save(tmp_path / "curvature", ours)
    loaded = laplax_kfac.load(tmp_path / "curvature")
    posteriors = [laplax_kfac.make_posterior(c, 0.7, sigma_squared=2.0) for c in (loaded, theirs)]
    samples = [p.sample(key, 3, at) for p, at in zip(posteriors, (params, pair), strict=True)]
    assert jax.tree.map(jnp.result_type, samples[0]) == jax.tree.map(jnp.result_type, params)
    assert_same(*samples)
    deviations = [p.standard_deviation() for p in posteriors]
    assert_same(*deviations)
    cases = (ours, model_fn, params), (theirs, apart, pair)
    spreads = [
        laplax_kfac.predictive_covariance(*case, x, prior_prec=0.7, sigma_squared=2.0).covariance
        for case in cases
    ]
    np.testing.assert_allclose(spreads[0], spreads[1], **CLOSE)
    drawn = [
        laplax_kfac.predictive_samples(*case, x, key, 2, prior_prec=0.7, sigma_squared=2.0)
        for case in cases
    ]
    np.testing.assert_allclose(drawn[0], drawn[1], **CLOSE)


@pytest.mark.parametrize("prior", ["scalar", "each"])
def test_the_evidence_of_complex_leaves_is_that_of_pairs(prior):
    data, ours, theirs = fits("complex_leaves", "ekfac")
    found = []
    for model_fn, params, curvature in (ours, theirs):
        each = jax.tree.map(
            lambda p: 0.5 + jnp.abs(jnp.cos(jnp.arange(p.size))).reshape(p.shape), params
        )
        fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
        found.append(
            laplax_kfac.log_marginal_likelihood(
                curvature, params, log_likelihood=fit, noise_variance=0.3,
                prior_prec=0.7 if prior == "scalar" else each,
            ).value
        )  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


def test_the_dense_block_of_a_complex_leaf_holds_both_parts():
    model_fn, params, x, outputs = models.by_name("complex_leaf_of_a_nonlinear_function").make()
    data = x, np.zeros((len(x), outputs))

    def apart(input, params):
        return model_fn(input=input, params=joined(params))

    exact = np.asarray(oracles.dense_ggn(apart, split(params), data, "mse"))
    found = np.asarray(laplax_kfac.kfac(model_fn, params, data, loss_fn="mse").to_dense())
    # In the pytree of parts all imaginary ones come first; in that of pairs they alternate.
    num, first = params["w"].size, params["v"].size
    order = first + np.stack([num + np.arange(num), np.arange(num)], axis=1).ravel()
    np.testing.assert_allclose(found[first:, first:], exact[np.ix_(order, order)], **CLOSE)
