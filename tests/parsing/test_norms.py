"""Scale and shift of a norm layer in one block a feature: exact, and closer than two diagonals."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from support import oracles
from support.models import normal

import laplax_kfac
from laplax_kfac.parsing.program import parse
from laplax_kfac.parsing.selection import select

pytestmark = pytest.mark.usefixtures("x64")

LENGTH, FEATURES = 4, 6


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def plain():
    """The scale first, and both in the layout of channels first."""

    def apply(params, x):
        return (params["g"][:, None] * normalised(x).T + params["b"][:, None]).T

    return apply, {"g": jnp.ones(FEATURES), "b": jnp.zeros(FEATURES)}


def moved_in_between():
    """Two features side by side, and a shift in another order, after data once more."""

    def apply(params, x):
        scaled = (params["g"] * normalised(x)).reshape(LENGTH, 2, FEATURES // 2) * jnp.cos(x[0, 0])
        return scaled.swapaxes(0, 1) + params["b"].T[:, None]

    return apply, {"g": jnp.ones(FEATURES), "b": jnp.zeros((FEATURES // 2, 2))}


def stacked_in_a_scan():
    def apply(params, x):
        layer = lambda x, p: (jnp.sin(normalised(x) * p["g"] + p["b"]) + x, None)  # noqa: E731
        return lax.scan(layer, x, params)[0]

    return apply, {"g": jnp.ones((3, FEATURES)), "b": jnp.zeros((3, FEATURES))}


def called_twice():
    """One block of both uses: the gradient is their sum."""
    layer, params = plain()
    return lambda params, x: layer(params, jnp.sin(layer(params, x))), params


def of_linen(module):
    def make():
        variables = module.init(jax.random.key(0), jnp.ones((LENGTH, FEATURES)))
        rest = {k: v for k, v in variables.items() if k != "params"}
        apply = lambda params, x: module.apply({"params": params, **rest}, x)  # noqa: E731
        return apply, variables["params"]

    return make


def of_nnx(make_module):
    def make():
        module = make_module(nnx.Rngs(0))
        module.eval()
        graphdef, params, rest = nnx.split(  # type: ignore[misc]
            module, nnx.Param, ...
        )
        return lambda params, x: nnx.merge(graphdef, params, rest)(x), params

    return make


def of_equinox():
    params, static = eqx.partition(eqx.nn.LayerNorm(FEATURES), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


def of_haiku():
    transformed: Any = hk.without_apply_rng(hk.transform(lambda x: hk.LayerNorm(-1, True, True)(x)))
    return transformed.apply, transformed.init(jax.random.key(0), jnp.ones((LENGTH, FEATURES)))


LAYERS = {
    "plain": (plain, FEATURES),
    "moved_in_between": (moved_in_between, FEATURES),
    "stacked_in_a_scan": (stacked_in_a_scan, 3 * FEATURES),
    "called_twice": (called_twice, FEATURES),
    "linen_layer_norm": (of_linen(nn.LayerNorm()), FEATURES),
    "linen_batch_norm": (of_linen(nn.BatchNorm(use_running_average=True)), FEATURES),
    "linen_group_norm": (of_linen(nn.GroupNorm(num_groups=2)), FEATURES),
    "nnx_batch_norm": (of_nnx(lambda rngs: nnx.BatchNorm(FEATURES, rngs=rngs)), FEATURES),
    "nnx_layer_norm": (of_nnx(lambda rngs: nnx.LayerNorm(FEATURES, rngs=rngs)), FEATURES),
    "equinox": (of_equinox, FEATURES),
    "haiku": (of_haiku, FEATURES),
}


def built(make):
    """A model with the norm layer in its middle, and data."""
    apply, params = make()
    params = normal({"norm": params, "w": (FEATURES, FEATURES)}, 1)

    def model_fn(input, params):
        y = jnp.tanh(apply(params["norm"], input @ params["w"]))
        return jnp.mean(y.reshape(LENGTH, -1), axis=0)

    return model_fn, params, (normal((5, LENGTH, FEATURES), 2), normal((5, FEATURES), 3))


def distance(found, exact):
    return float(jnp.linalg.norm(found.to_dense() - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("name", LAYERS)
def test_a_pair_has_its_exact_block(name):
    make, features = LAYERS[name]
    model_fn, params, data = built(make)
    options: dict[str, Any] = {"loss_fn": "mse", "dense_limit": 0}
    program = parse(model_fn, params, data[0][0], selection=select(dense_limit=0))
    (layer,) = [found for found in program.layers if found.pattern == "norm"]
    assert (layer.block, layer.stack, layer.rows, layer.out_features) == (
        "kronecker", features, 2, 1,
    )  # fmt: skip
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    pairs = np.stack([program.space.ids(s).ravel() for s in layer.segments], axis=1)
    curvature = laplax_kfac.kfac(model_fn, params, data, **options)
    places = pairs[:, :, None], pairs[:, None, :]
    np.testing.assert_allclose(curvature.to_dense()[places], exact[places], rtol=1e-9, atol=1e-10)
    apart = laplax_kfac.kfac(model_fn, params, data, **options, fallback="diagonal")
    assert distance(curvature, exact) < distance(apart, exact) - 1e-4


@pytest.mark.parametrize("fit", [laplax_kfac.ekfac, laplax_kfac.kfoc], ids=["ekfac", "kfoc"])
def test_every_method_has_the_same_block(fit, tmp_path):
    """And a file, and what parses the model again for a curvature."""
    model_fn, params, data = built(of_equinox)
    options: dict[str, Any] = {"loss_fn": "mse", "dense_limit": 0}
    curvature = fit(model_fn, params, data, **options)
    exact = laplax_kfac.kfac(model_fn, params, data, **options, kfac_approx="reduce")
    number = [layer.pattern for layer in curvature.layers].index("norm")
    for found in (curvature, exact):
        laplax_kfac.save(tmp_path / "curvature", found)
        loaded = laplax_kfac.load(tmp_path / "curvature", params)
        error = laplax_kfac.relative_error(loaded, model_fn, params, data, loss_fn="mse")
        assert error[curvature.layers[number].name] < 1e-9


def two_shifts(params, x):
    y = params["g"] * normalised(x)
    return jnp.sin(y + params["b"]) + jnp.sin(y[::-1] + params["c"])


def only_a_scale(params, x):
    return params["g"] * normalised(x)


def a_shift_a_position(params, x):
    return params["g"] * normalised(x) + params["p"]


def two_scales(params, x):
    first, second = params["g"] * normalised(x), params["c"] * normalised(x[::-1])
    return jnp.sin(first + params["b"]) + jnp.sin(second + params["b"])


@pytest.mark.parametrize("apply", [two_shifts, only_a_scale, a_shift_a_position, two_scales])
def test_what_is_no_pair_keeps_its_diagonals(apply):
    shapes = {"g": (FEATURES,), "b": (FEATURES,), "c": (FEATURES,), "p": (LENGTH, FEATURES)}
    model_fn, params, data = built(lambda: (apply, normal(shapes)))
    layers = laplax_kfac.find_layers(model_fn, params, data[0][0], dense_limit=0)
    assert layers["norm/g"].block == "diagonal"


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ({}, "dense"),
        ({"dense_limit": FEATURES}, "dense"),
        ({"dense_limit": 0, "fallback": "diagonal"}, "diagonal"),
        ({"dense_limit": 0, "curvature": "diagonal"}, "diagonal"),
        ({"dense_limit": 0, "curvature": "block"}, "dense"),
        ({"dense_limit": 0, "separate_weight_and_bias": True}, "diagonal"),
    ],
)
def test_other_blocks_are_as_they_are_asked_for(options, block):
    model_fn, params, data = built(plain)
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", **options)
    blocks = {layer.name: layer.block for layer in curvature.layers}
    assert (blocks["norm/g"], blocks["norm/b"]) == (block, block)


def test_wide_norms_need_no_option():
    def model_fn(input, params):
        return jnp.tanh(normalised(input) * params["g"] + params["b"])[:3]

    params = normal({"g": (257,), "b": (257,)})
    (layer,) = laplax_kfac.find_layers(model_fn, params, jnp.ones(257))
    assert (layer.name, layer.pattern, layer.stack) == ("g", "norm", 257)


def test_the_predictive_is_that_of_the_dense_matrix():
    model_fn, params, data = built(stacked_in_a_scan)
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", dense_limit=0)
    found = laplax_kfac.predictive_covariance(
        curvature, model_fn, params, data[0], prior_prec=2.0, sigma_squared=1.0
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    covariance = jnp.linalg.inv(curvature.to_dense() + 2.0 * jnp.eye(flat.size))
    for x, exact in zip(data[0], found.covariance, strict=True):
        jacobian = jax.jacrev(lambda v, x=x: model_fn(input=x, params=unravel(v)))(flat)
        np.testing.assert_allclose(exact, jacobian @ covariance @ jacobian.T, rtol=1e-8, atol=1e-11)
