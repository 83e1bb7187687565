"""What is added to data or to the output of a layer, wherever data or scans are in between."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import oracles
from support.models import normal

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")


def facts(layers):
    return {k.name: (k.pattern, k.block, k.bias, k.in_features, k.out_features) for k in layers}


# -- data in a part of an array, or in a term of a sum ----------------------------------------


def normalised(x, params):
    """A norm layer's gain and shift, then a layer with its weight on the right."""
    h = jnp.tanh(x.sum(0)) * params["s"] + params["b"]
    return h @ params["w"] + params["wb"]


def weight_first(x, params):
    h = jnp.tanh(x) * params["s"] + params["b"]
    return ((params["w"].T @ h.T).T + params["wb"]).mean(0)


def token_before(input, params):
    return jnp.concatenate([params["cls"][None], input])


def token_written(input, params):
    return jnp.zeros((5, 6)).at[1:].set(input).at[0].set(params["cls"])


def token_padded(input, params):
    return jnp.pad(input, ((1, 0), (0, 0))) + jnp.pad(params["cls"][None], ((0, 4), (0, 0)))


def data_added_to_parameters(input, params):
    """The output of a product of two parameters has data in it as soon as these are added."""
    return input + jnp.ones((4, 1)) @ params["cls"][None]


def places_by_data(input, params):
    """Constants, added to a parameter at places that data decide."""
    places = jnp.argmax(input, axis=1)
    return params["cls"][None].repeat(4, 0).at[jnp.arange(4), places].add(1.0)


TOKENS = [token_before, token_written, token_padded, data_added_to_parameters, places_by_data]


@pytest.mark.parametrize("after", [normalised, weight_first])
@pytest.mark.parametrize("token", TOKENS)
def test_data_beside_a_parameter_are_data(token, after):
    params = normal({"cls": (6,), "s": (6,), "b": (6,), "w": (6, 3), "wb": (3,)})
    x = normal((4, 6), seed=1)
    expected = facts(laplax_kfac.find_layers(lambda input, params: after(input, params), params, x))
    found = facts(
        laplax_kfac.find_layers(
            lambda input, params: after(token(input, params), params), params, x
        )
    )
    assert found["b"] == ("shift", "dense", False, 6, 1)
    for name in ("b", "s", "w"):
        assert found[name] == expected[name]


@pytest.mark.parametrize("token", TOKENS)
def test_a_shift_after_a_class_token_has_its_exact_block(token):
    params = normal({"cls": (6,), "s": (6,), "b": (6,), "w": (6, 3), "wb": (3,)})
    x, y = normal((1, 4, 6), seed=1), jnp.asarray([1])

    def model_fn(input, params):
        return normalised(token(input, params), params)

    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="cross_entropy")
    exact = oracles.dense_ggn(model_fn, params, (x, y), "cross_entropy")
    np.testing.assert_allclose(curvature.to_dense()[:6, :6], exact[:6, :6], atol=1e-12)


def test_a_class_token_plus_constants_is_still_a_view_of_it():
    """As with positions that are not learned; the token's use is a layer's input here."""

    def model_fn(input, params):
        h = jnp.concatenate([params["w"], jnp.outer(input, jnp.ones(2))]) + jnp.ones((6, 2))
        return jnp.ones(6) @ h

    layers = laplax_kfac.find_layers(model_fn, {"w": jnp.ones((3, 2))}, jnp.ones(3))
    assert layers["w"].reason == "combined with constants or data before its use"


# -- what differs between the iterations of a scan -----------------------------------------------


def scanned(added):
    """Add to the state what ``added`` makes of a parameter for each of three iterations."""

    def model_fn(input, params):
        def step(h, b):
            return jnp.tanh(h + b), None

        return lax.scan(step, input, added(params["b"]))[0]

    return model_fn


LATER = {
    "nothing at first": lambda b: jnp.concatenate([jnp.zeros((1, 4)), b]),
    "a part at first": lambda b: jnp.concatenate([jnp.zeros((1, 4)).at[0, :2].set(b[0, :2]), b]),
    "nothing at last": lambda b: jnp.concatenate([b, jnp.zeros((1, 4))]),
    "repeated in another order": lambda b: jnp.stack([b[0, [0, 0, 1, 1]], b[1, [0, 1, 0, 1]]]),
}


@pytest.mark.parametrize("added", LATER.values(), ids=LATER.keys())
def test_what_the_first_iteration_does_not_show_is_found(added):
    params, x = normal({"b": (2, 4)}), normal((2, 4), seed=1)
    y, model_fn = jnp.zeros((2, 4)), scanned(added)
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse")
    exact = np.asarray(oracles.dense_ggn(model_fn, params, (x, y), "mse"))
    touched = np.flatnonzero(np.diagonal(exact))
    found = np.asarray(curvature.to_dense())
    np.testing.assert_allclose(np.diagonal(found)[touched], np.diagonal(exact)[touched])


def test_a_bias_that_some_iterations_add_elsewhere_is_no_bias_of_the_layer():
    """In the first iteration it meets the whole output, in the second one half of it."""

    def model_fn(input, params):
        padded = jnp.stack([params["b"][0], params["b"][1].at[:2].set(0.0)])

        def step(h, b):
            return jnp.tanh(params["w"] @ h + b), None

        return lax.scan(step, input, padded)[0]

    params = normal({"b": (2, 4), "w": (4, 4)})
    layers = laplax_kfac.find_layers(model_fn, params, jnp.ones(4))
    assert not layers["w"].bias
    assert sum(layer.size for layer in layers) == 24


def test_constants_of_a_scan_that_the_body_hands_on_have_other_readers():
    """The body reads the layer's output, too: what is added behind the scan is no bias of it."""

    def model_fn(input, params):
        h = input @ params["w"]

        def step(carry, x):
            kept, total = carry
            return (kept, total + jnp.sin(kept) * x), None

        (kept, total), _ = lax.scan(step, (h, jnp.zeros(3)), jnp.ones(2))
        return kept + params["b"] + total

    params = normal({"w": (4, 3), "b": (3,)})
    layers = laplax_kfac.find_layers(model_fn, params, jnp.ones(4))
    assert [(layer.name, layer.bias) for layer in layers] == [("b", False), ("w", False)]
