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


def product_of(*paths):
    """A model that multiplies the weights at these paths, one after the other."""

    def model_fn(input, params):
        for path in paths:
            weight = params
            for key in path:
                weight = weight[key]
            input = jnp.tanh(input @ weight)
        return input

    return model_fn


@pytest.mark.parametrize(
    ("params", "paths", "names"),
    [
        ({"net": {"w": 0}}, [("net", "w")], ["net"]),
        ({"w": 0}, [("w",)], ["w"]),
        ({"net": {"v": 0, "w": 0}}, [("net", "v"), ("net", "w")], ["net/v", "net/w"]),
        ({"a": {"w": 0, "b": {"w": 0}}}, [("a", "w"), ("a", "b", "w")], ["a/b", "a"]),
        ([[0, 0], [0]], [(0, 0), (0, 1), (1, 0)], ["0/0", "0/1", "1"]),
    ],
)  # fmt: skip
def test_a_layer_is_named_by_its_module_or_else_by_its_leaf(params, paths, names):
    params = jax.tree.map(lambda _: jnp.zeros((3, 3)), params)
    layers = laplax_kfac.find_layers(product_of(*paths), params, jnp.zeros(3))
    assert [layer.name for layer in layers] == names


@pytest.mark.parametrize(
    "params", [{"net": {"policy": 0, "value": 0}}, {"a": {"w": 0}, "a/w": 0}], ids=str
)
def test_names_are_unique(params):
    params = jax.tree.map(lambda _: jnp.zeros((3, 3)), params)
    paths = [[key.key for key in path] for path, _ in jax.tree.leaves_with_path(params)]
    layers = laplax_kfac.find_layers(product_of(*paths), params, jnp.zeros(3))
    assert len({layer.name for layer in layers}) == 2


def test_a_leaf_named_value_keeps_its_name():
    """Only flax.nnx's attribute `value` is no part of a name."""
    params = {"attn": {key: jnp.zeros((3, 3)) for key in ("key", "query", "value")}}
    paths = [("attn", key) for key in params["attn"]]
    layers = laplax_kfac.find_layers(product_of(*paths), params, jnp.zeros(3))
    assert [layer.name for layer in layers] == ["attn/key", "attn/query", "attn/value"]
