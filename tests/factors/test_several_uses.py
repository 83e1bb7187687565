"""Sums of layers with several uses: calls of one network, and copies of it that are vmapped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.matrices import normal
from support.oracles import block_mask, dense_ggn

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

MLP = {"a": normal(3, 4), "b": normal(4, seed=1), "c": normal(4, 2, seed=2)}
TABLE = {"table": normal(5, 3, seed=3), "out": normal(3, 2, seed=4)}
CNN = {"kernel": normal(2, 1, 2, 2, seed=5), "out": normal(2, 2, seed=6)}
X, TOKENS, IMAGES = normal(4, 3, seed=7), np.asarray([[0], [2], [4], [2]]), normal(4, 1, 3, 3)
Y = np.zeros((4, 2))
REDUCE: dict[str, Any] = {"loss_fn": "mse", "kfac_approx": "reduce"}


def mlp(p, x):
    return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]


def lookup(p, x):
    return jnp.tanh(p["table"][x].mean(0)) @ p["out"]


def one_hot(p, x):
    return jnp.tanh((jax.nn.one_hot(x, 5) @ p["table"]).mean(0)) @ p["out"]


def cnn(p, x):
    h = lax.conv_general_dilated(x[None], p["kernel"], (1, 1), "VALID")[0]
    return jnp.tanh(h).sum((1, 2)) @ p["out"]


CASES = {"network": (mlp, MLP, X), "table": (lookup, TABLE, TOKENS), "images": (cnn, CNN, IMAGES)}


def called(network, times, move):
    def model_fn(input, params):
        return sum((network(params, move(input, k)) for k in range(times)), jnp.zeros(2))

    return model_fn


def vmapped(network, times, move):
    def model_fn(input, params):
        copies = jnp.stack([move(input, k) for k in range(times)])
        return jax.vmap(lambda x: network(params, x))(copies).sum(0)

    return model_fn


def shifted(x, k):
    return (x + k) % 5 if jnp.issubdtype(x.dtype, jnp.integer) else x * (1 + 0.3 * k)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_calls_and_vmapped_copies_have_one_reduction(name, times):
    network, params, inputs = CASES[name]
    first, second = (
        laplax_kfac.kfac(make(network, times, shifted), params, (inputs, Y), **REDUCE)
        for make in (called, vmapped)
    )
    np.testing.assert_allclose(first.to_dense(), second.to_dense(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_equal_calls_are_exact_for_one_example(name):
    network, params, inputs = CASES[name]
    model_fn = called(network, 2, lambda x, _: x)
    data = inputs[:1], Y[:1]
    found = laplax_kfac.kfac(model_fn, params, data, **REDUCE)
    groups = [layer.params for layer in found.layers]
    exact = dense_ggn(model_fn, params, data, "mse") * block_mask(params, groups)
    positions = {"network": True, "table": True, "images": False}[name]  # several, in a call
    right = np.allclose(found.to_dense(), exact, rtol=1e-9, atol=1e-12)
    assert right == positions


def test_rows_and_one_hot_vectors_of_one_table():
    def mixed(input, params):
        return lookup(params, input) + one_hot(params, (input + 1) % 5)

    first = laplax_kfac.kfac(mixed, TABLE, (TOKENS, Y), **REDUCE)
    second = laplax_kfac.kfac(called(lookup, 2, shifted), TABLE, (TOKENS, Y), **REDUCE)
    np.testing.assert_allclose(first.to_dense(), second.to_dense(), rtol=1e-8, atol=1e-11)


def test_a_use_and_a_transposed_one_stay_apart():
    """One example, each use in one position: the nearest product to the sum of two."""
    w = normal(3, 3, seed=9)

    def model_fn(input, params):
        return jnp.tanh(input @ params["w"]) @ params["w"].T

    data = X[:1], np.zeros((1, 3))
    expand, reduce = (
        laplax_kfac.kfac(model_fn, {"w": w}, data, loss_fn="mse", kfac_approx=approx).to_dense()
        for approx in ("expand", "reduce")
    )
    np.testing.assert_allclose(reduce, expand, rtol=1e-9)


def test_a_call_that_is_not_made_does_not_count():
    def sometimes(input, params):
        other = lax.cond(input[0] > 0, lambda: mlp(params, 2 * input), lambda: jnp.zeros(2))
        return mlp(params, input) + other

    def always(input, params):
        return mlp(params, input) + mlp(params, 2 * input)

    positive = np.abs(X)
    found = laplax_kfac.kfac(sometimes, MLP, (positive, Y), **REDUCE)
    expected = laplax_kfac.kfac(always, MLP, (positive, Y), **REDUCE)
    np.testing.assert_allclose(found.to_dense(), expected.to_dense(), rtol=1e-8, atol=1e-11)
    found = laplax_kfac.kfac(sometimes, MLP, (-positive, Y), **REDUCE)
    once = laplax_kfac.kfac(called(mlp, 1, shifted), MLP, (-positive, Y), **REDUCE)
    np.testing.assert_allclose(found.to_dense(), once.to_dense(), rtol=1e-8, atol=1e-11)
