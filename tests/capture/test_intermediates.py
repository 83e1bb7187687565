"""Public records of layers: their sums are the gradients in the weight and in a joint bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

WIDTH = 3


def plain(input, params):
    return input @ params["w"] + params["b"]


def scaled_before_the_bias(input, params):
    return 0.5 * (input @ params["w"]) / 2**0.5 + params["b"]


def scaled_after_it(input, params):
    return 0.5 * (input @ params["w"] + params["b"])


def subtracted(input, params):
    return params["b"] - input @ params["w"]


def shared_over_positions(input, params):
    rows = jnp.stack([input, 2 * input, input**2])
    return jnp.tanh(3 * (rows @ params["w"]) + params["b"]).sum(axis=0)


def used_twice(input, params):
    hidden = jnp.tanh(0.5 * (input @ params["w"]) + params["b"])
    return 3 * (hidden @ params["w"]) + params["b"]


def in_one_branch(input, params):
    return lax.cond(input[0] > 0, lambda x: 0.5 * (x @ params["w"]) + params["b"], jnp.sin, input)


@pytest.mark.parametrize(
    "model_fn",
    [
        plain,
        scaled_before_the_bias,
        scaled_after_it,
        subtracted,
        shared_over_positions,
        used_twice,
        in_one_branch,
    ],
)
def test_sums_of_records_are_gradients_in_weight_and_joint_bias(model_fn):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(WIDTH, WIDTH)), "b": rng.normal(size=WIDTH)}
    x, y = rng.normal(size=(5, WIDTH)), rng.normal(size=(5, WIDTH))

    def loss(params, x, y):
        return jnp.sum((model_fn(x, params) - y) ** 2)

    exact = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)
    records = laplax_kfac.intermediates_and_gradients(model_fn, params, (x, y), loss_fn="mse")
    (layer,) = laplax_kfac.find_layers(model_fn, params, x[0])
    assert layer.bias
    (record,) = records.values()
    products = jnp.einsum("nsi,nso->nio", record.inputs, record.gradients)
    np.testing.assert_allclose(products, exact["w"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(record.gradients.sum(axis=1), exact["b"], rtol=1e-10, atol=1e-12)
