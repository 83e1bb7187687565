"""Layers are named by the paths that a user sees."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import laplax_kfac


def first_layer(params, leaf, module):
    """A parameter under the root, added to the input of a layer."""

    def model_fn(input, params):
        root, dense = params[leaf[0]], params[module[0]]
        for key in module[1:]:
            dense = dense[key]
        return jnp.tanh(input + root[leaf[1]]) @ dense["w"]

    layers = laplax_kfac.find_layers(model_fn, params, jnp.ones((4, 3)))
    return [layer.name for layer in layers]


@pytest.mark.parametrize("root", ["params", "~"])
def test_a_leaf_under_the_root_is_not_named_after_it(root):
    params = {root: {"pos": jnp.ones((4, 3)), "lin": {"w": jnp.ones((3, 2))}}}
    assert first_layer(params, (root, "pos"), (root, "lin")) == [f"{root}/lin", f"{root}/pos"]


def test_names_are_those_of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            pos = self.param("pos", nn.initializers.normal(), (4, 3))
            return nn.Dense(2, name="head")(jnp.tanh(x + pos))

    net = Net()
    params = net.init(jax.random.key(0), jnp.ones((4, 3)))
    layers = laplax_kfac.find_layers(
        lambda input, params: net.apply(params, input), params, jnp.ones((4, 3))
    )
    assert [layer.name for layer in layers] == ["params/head", "params/pos"]


def test_names_are_those_of_haiku():
    def net(x):
        pos = hk.get_parameter("pos", (4, 3), init=jnp.ones)
        return hk.Linear(2, name="head")(jnp.tanh(x + pos))

    transformed: Any = hk.without_apply_rng(hk.transform(net))
    params = transformed.init(jax.random.key(0), jnp.ones((4, 3)))
    layers = laplax_kfac.find_layers(
        lambda input, params: transformed.apply(params, input), params, jnp.ones((4, 3))
    )
    assert [layer.name for layer in layers] == ["head", "~/pos"]


def test_a_root_that_is_one_layer_is_named_by_its_weight():
    params = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}

    def model_fn(input, params):
        return input @ params["params"]["kernel"] + params["params"]["bias"]

    assert [k.name for k in laplax_kfac.find_layers(model_fn, params, jnp.ones(3))] == [
        "params/kernel"
    ]
