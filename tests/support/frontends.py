"""Models of the catalogue from frontends, in the ways that these stack, filter and join layers."""

import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, lax

from support.models import (
    Built,
    dense,
    embed,
    fallback,
    from_equinox,
    from_haiku,
    from_nnx,
    inputs,
    model,
    normal,
    tokens,
)

# -- stacks of layers in frontends -------------------------------------------------------------


class _Block(nnx.Module):
    """A layer that keeps the width."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lin = nnx.Linear(4, 4, rngs=rngs, param_dtype=float)

    def __call__(self, x: Array) -> Array:
        return x + jnp.tanh(self.lin(x))


class _Stack(nnx.Module):
    """Three blocks, made by `nnx.vmap` and called by a function of all of them."""

    def __init__(self, rngs: nnx.Rngs, call: Callable[[Array, _Block], Array]) -> None:
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(_Block))(rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs, param_dtype=float)
        self.call = call

    def __call__(self, x: Array) -> Array:
        return self.out(self.call(x, self.blocks))


@model(dense("blocks/lin", 4, 4, stack=3, bias=True), dense("out", 4, 2, bias=True))
def nnx_scan_over_a_stack() -> Built:
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def call(x: Array, block: _Block) -> Array:
        return block(x)

    return from_nnx(lambda rngs: _Stack(rngs, call), inputs(4))


@model(dense("blocks/lin", 4, 12, bias=True), dense("out", 4, 2, bias=True))
def nnx_vmap_over_an_ensemble() -> Built:
    @nnx.vmap(in_axes=(None, 0), out_axes=0)
    def each(x: Array, block: _Block) -> Array:
        return block(x)

    def call(x: Array, blocks: _Block) -> Array:
        return jnp.mean(jnp.tanh(each(x, blocks)), axis=0)

    return from_nnx(lambda rngs: _Stack(rngs, call), inputs(4))


@model(dense("__layer_stack_no_per_layer/linear", 4, 4, stack=3, bias=True),
       dense("linear", 4, 2, bias=True))  # fmt: skip
def haiku_layer_stack() -> Built:
    def forward(x: Array) -> Array:
        x = hk.experimental.layer_stack(3)(lambda h: h + jnp.tanh(hk.Linear(4)(h)))(x)
        out: Array = hk.Linear(2)(x)
        return out

    return from_haiku(forward, inputs(4))


@model(dense("layers", 4, 4, stack=3, bias=True), dense("out", 4, 2, bias=True))
def equinox_scan_over_filtered_layers() -> Built:
    class Net(eqx.Module):
        layers: eqx.nn.Linear
        out: eqx.nn.Linear
        slope: float = eqx.field(static=True)
        activation: Callable[[Array], Array]

        def __init__(self, key: Array) -> None:
            keys = jax.random.split(key, 4)
            self.layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))(keys[:3])
            self.out = eqx.nn.Linear(4, 2, key=keys[3])
            self.slope, self.activation = 0.5, jnp.tanh

        def __call__(self, x: Array) -> Array:
            arrays, static = eqx.partition(self.layers, eqx.is_array)

            def step(h: Array, layer: Any) -> tuple[Array, None]:
                return self.slope * h + self.activation(eqx.combine(layer, static)(h)), None

            return self.out(lax.scan(step, x, arrays)[0])

    return from_equinox(Net, inputs(4))


@model(dense("layers/0", 4, 5), dense("layers/1", 5, 2, bias=True))
def equinox_module_with_frozen_leaves() -> Built:
    net = eqx.nn.MLP(4, 2, 5, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    trained = eqx.tree_at(lambda m: m.layers[0].bias, jax.tree.map(eqx.is_array, net), False)
    params, static = eqx.partition(net, trained)
    params = normal(params)
    return lambda input, params: eqx.combine(params, static)(input), params, inputs(4)


# -- graphs ------------------------------------------------------------------------------------

SENDERS, RECEIVERS = np.asarray([0, 1, 2, 3, 0, 2]), np.asarray([1, 2, 3, 4, 2, 4])


@model(
    dense("edge", 7, 5, 6, bias=True),
    dense("node", 8, 4, 5, bias=True),
    dense("readout", 4, 2, bias=True),
)  # fmt: skip
def graph_net_with_sums_over_edges() -> Built:
    def model_fn(input: Any, params: Any) -> Array:
        def layer(name: str, *parts: Array) -> Array:
            h = jnp.concatenate(parts, axis=-1) @ params[name]["w"]
            return jnp.tanh(h + params[name]["b"])

        nodes, edges = input
        edges = layer("edge", edges, nodes[SENDERS], nodes[RECEIVERS])
        received = jax.ops.segment_sum(edges, RECEIVERS, num_segments=5)
        nodes = layer("node", nodes, received)
        return jnp.sum(nodes, 0) @ params["readout"]["w"] + params["readout"]["b"]

    sizes = {"edge": (7, 5), "node": (8, 4), "readout": (4, 2)}
    params = {name: {"w": shape, "b": shape[1:]} for name, shape in sizes.items()}
    return model_fn, normal(params), (inputs(5, 3), inputs(6, 1, seed=2))


@model(dense("w", 3, 4, 5), dense("attend", 4, 1, 5), dense("out", 4, 2))
def graph_attention_with_a_softmax_over_edges() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = input @ params["w"]
        scores = jnp.tanh((h @ params["attend"])[SENDERS, 0])
        weights = jnp.exp(scores)
        total = jax.ops.segment_sum(weights, RECEIVERS, num_segments=5)[RECEIVERS]
        sent = h[SENDERS] * (weights / total)[:, None]
        nodes = jax.ops.segment_sum(sent, RECEIVERS, num_segments=5)
        return jnp.sum(jnp.tanh(nodes), 0) @ params["out"]

    return model_fn, normal({"w": (3, 4), "attend": (4, 1), "out": (4, 2)}), inputs(5, 3)


@model(embed("kind", 6, 4, 5), dense("out", 4, 2), fallback("gate", "scale", 4, "elementwise"))
def graph_of_kinds_of_nodes() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = params["kind"][input]
        received = jax.ops.segment_sum(h[SENDERS] * params["gate"], RECEIVERS, num_segments=5)
        return jnp.sum(jnp.tanh(h + received), 0) @ params["out"]

    return model_fn, normal({"kind": (6, 4), "gate": (4,), "out": (4, 2)}), tokens(5, 6)


# -- keras -------------------------------------------------------------------------------------


def _keras() -> Any:
    """keras with the JAX backend; tests are skipped where it is not installed."""
    os.environ["KERAS_BACKEND"] = "jax"
    return pytest.importorskip("keras")


def _from_keras(net: Any, x: Any) -> Built:
    params = {v.path: v.value for v in net.trainable_variables}
    rest = [v.value for v in net.non_trainable_variables]

    def model_fn(input: Array, params: Any) -> Any:
        trained = [params[v.path] for v in net.trainable_variables]
        return net.stateless_call(trained, rest, input[None], training=False)[0][0]

    return model_fn, normal(params), x


@model(dense("mlp/first", 4, 5, bias=True), dense("mlp/second", 5, 2, bias=True))
def keras_mlp() -> Built:
    keras = _keras()
    layers = keras.layers
    first = layers.Dense(5, "tanh", name="first")
    second = layers.Dense(2, name="second")
    net = keras.Sequential([layers.Input((4,)), first, second], name="mlp")
    return _from_keras(net, inputs(4))
