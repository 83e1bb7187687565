"""Sums of elementwise products over the taps of a kernel are depthwise convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import oracles
from support.models import normal

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

LENGTH, CHANNELS, TAPS = 5, 3, 4


@pytest.fixture
def params():
    return normal({"w": (TAPS, 1, CHANNELS), "b": (CHANNELS,)}, 3)


@pytest.fixture
def data():
    return normal((6, LENGTH, CHANNELS), 4), normal((6, CHANNELS), 5)


def padded(x):
    return jnp.pad(x, ((TAPS - 1, 0), (0, 0)))


def convolved(x, w, b):
    y = lax.conv_general_dilated(
        x[None], w, (1,), [(TAPS - 1, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=CHANNELS,
    )  # fmt: skip
    return y[0] + b


def tap_by_tap(x, w, b):
    x = padded(x)
    return sum(w[j, 0] * x[j : j + LENGTH] for j in range(TAPS)) + b


def from_the_bias(x, w, b):
    x, y = padded(x), jnp.broadcast_to(b, x.shape)
    for j in reversed(range(TAPS)):
        y = x[j : j + LENGTH] * w[j, 0] + y
    return y


def channels_first(x, w, b):
    x, w = padded(x).T, w[:, 0].T
    y = sum(w[:, j, None] * x[:, j : j + LENGTH] for j in range(TAPS))
    return y.T + b


def with_signs(x, w, b):
    """Minus minus the sum; every pair has a factor of its own."""
    x = padded(x)
    z = [x[j : j + LENGTH] * w[j, 0] for j in range(TAPS)]
    return b - (-2.0 * (0.5 * z[0] + 0.5 * z[1]) - (z[2] - (-z[3])))


def bias_of_one_term(x, w, b):
    """The bias is added to the second term, which is a half of what it becomes in the sum."""
    x = padded(x)
    z = [0.5 * w[j, 0] * x[j : j + LENGTH] for j in range(TAPS)]
    return 2.0 * z[0] + 2.0 * (z[1] + 0.5 * b) + 2.0 * (z[2] + z[3])


FORMS = [tap_by_tap, from_the_bias, channels_first, with_signs, bias_of_one_term]


def model_of(conv):
    def model_fn(input, params):
        return jnp.mean(jnp.tanh(conv(input, params["w"], params["b"])), axis=0)

    return model_fn


@pytest.mark.parametrize("form", FORMS)
def test_taps_have_the_blocks_of_the_convolution(form, params, data):
    (layer,) = laplax_kfac.find_layers(model_of(form), params, data[0][0])
    (wanted,) = laplax_kfac.find_layers(model_of(convolved), params, data[0][0])
    assert (layer.pattern, layer.block, layer.bias) == ("taps", "kronecker", True)
    assert (layer.stack, layer.rows, layer.out_features) == (CHANNELS, TAPS + 1, 1)
    assert (layer.positions, layer.stack) == (wanted.positions, wanted.stack)
    found, exact = (
        laplax_kfac.ekfac(model_of(conv), params, data, loss_fn="mse") for conv in (form, convolved)
    )
    np.testing.assert_allclose(found.to_dense(), exact.to_dense(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", [channels_first, with_signs])
def test_the_trace_with_corrected_eigenvalues_is_exact(form, params, data):
    model_fn = model_of(form)
    found = laplax_kfac.ekfac(model_fn, params, data, loss_fn="mse").to_dense()
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    np.testing.assert_allclose(jnp.trace(found), jnp.trace(exact), rtol=1e-9)


def test_one_position_of_one_example_is_exact(params, data):
    """One input of every feature, and one gradient: the block of a channel is their product."""

    def model_fn(input, params):
        w = params["w"][:, 0]
        return jnp.tanh(sum(w[j] * input[j] for j in range(TAPS)) + params["b"])

    example = jax.tree.map(lambda x: x[:1], data)
    found = laplax_kfac.kfac(model_fn, params, example, loss_fn="mse").to_dense()
    exact = oracles.dense_ggn(model_fn, params, example, "mse")
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-11)


def other_reader(x, w):
    z = w[1] * x[1]
    return w[0] * x[0] + z + jnp.sin(z)


def scaled_by_data(x, w):
    return jnp.sin(x[2]) * (w[0] * x[0]) + w[1] * x[1]


def one_output(x, w):
    return w[0, 0] * x[0] + w[1, 0] * x[1]


def overlapping(x, w):
    return w[0] * x[0] + w[0] * x[1]


def of_two_layouts(x, w):
    return (w[0] * x + w[1, :1] * x).sum(0)


@pytest.mark.parametrize(
    "form", [other_reader, scaled_by_data, one_output, overlapping, of_two_layouts]
)
def test_other_sums_keep_their_exact_block(form, params, data):
    def model_fn(input, params):
        return jnp.tanh(form(input, params["w"][:, 0]))

    layers = laplax_kfac.find_layers(model_fn, params, data[0][0])
    assert {layer.block for layer in layers} == {"dense", "none"}
    assert any("elementwise" in layer.reason for layer in layers)
