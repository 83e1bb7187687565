"""Forward functions of the workloads in plain JAX, for one example or a batch of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from workloads import CONV8_STRIDES, HEADS, Workload

Params = dict[str, Array]


def forward(workload: Workload) -> Callable[[Params, Array], Array]:
    """``forward(params, x)``, with or without a batch axis."""
    function = {"mlp": mlp, "lenet": lenet, "conv8": conv8, "transformer": transformer}
    return function[workload.name]


def dense(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}_w"] + params[f"{name}_b"]


def conv(params: Params, name: str, x: Array, stride: int = 1, padding: int = 0) -> Array:
    images = x if x.ndim == 4 else x[None]
    y = lax.conv_general_dilated(
        images,
        params[f"{name}_w"],
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y + params[f"{name}_b"]
    return y if x.ndim == 4 else y[0]


def max_pool(x: Array) -> Array:
    window = (*[1] * (x.ndim - 3), 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def mlp(params: Params, x: Array) -> Array:
    depth = len(params) // 2
    for i in range(depth - 1):
        x = jax.nn.relu(dense(params, f"dense{i}", x))
    return dense(params, f"dense{depth - 1}", x)


def lenet(params: Params, x: Array) -> Array:
    x = max_pool(jax.nn.relu(conv(params, "conv0", x, padding=2)))
    x = max_pool(jax.nn.relu(conv(params, "conv1", x)))
    x = x.reshape(*x.shape[:-3], -1)
    x = jax.nn.relu(dense(params, "dense0", x))
    x = jax.nn.relu(dense(params, "dense1", x))
    return dense(params, "dense2", x)


def conv8(params: Params, x: Array) -> Array:
    for i, stride in enumerate(CONV8_STRIDES):
        x = jax.nn.relu(conv(params, f"conv{i}", x, stride, padding=1))
    return dense(params, "dense0", jnp.mean(x, axis=(-3, -2)))


def normalise(x: Array) -> Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def attention(params: Params, name: str, x: Array) -> Array:
    def heads(part: str) -> Array:
        y = dense(params, f"{name}_{part}", x)
        return y.reshape(*y.shape[:-1], HEADS, -1)

    query, key, value = heads("query"), heads("key"), heads("value")
    logits = jnp.einsum("...thd,...shd->...hts", query, key) / query.shape[-1] ** 0.5
    y = jnp.einsum("...hts,...shd->...thd", jax.nn.softmax(logits), value)
    return dense(params, f"{name}_out", y.reshape(x.shape))


def transformer(params: Params, x: Array) -> Array:
    depth = (len(params) - 2) // 12
    for name in (f"block{i}" for i in range(depth)):
        x = x + attention(params, name, normalise(x))
        hidden = jax.nn.relu(dense(params, f"{name}_up", normalise(x)))
        x = x + dense(params, f"{name}_down", hidden)
    return dense(params, "dense0", jnp.mean(normalise(x), axis=-2))
