"""Models of the catalogue with primitives from other parts of JAX.

``shard_map``, choices by the platform, sparse arrays, kernels of Pallas.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental import sparse
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from support.models import Built, dense, fallback, inputs, model, normal, own_bias

# -- other parts of JAX ------------------------------------------------------------------------

TWO = {"one": {"w": (4, 6), "b": (6,)}, "two": {"w": (6, 3)}}


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("t",), (AxisType.Auto,), devices=jax.devices()[:1])


def _split(h: Array, params: Any) -> Array:
    """A perceptron whose hidden units are split over devices."""

    def part(h: Array, w1: Array, b1: Array, w2: Array) -> Array:
        return lax.psum(jnp.tanh(h @ w1 + b1) @ w2, "t")

    into = P(), P(None, "t"), P("t"), P("t", None)
    body = jax.shard_map(part, mesh=_mesh(), in_specs=into, out_specs=P())
    return body(h, params["one"]["w"], params["one"]["b"], params["two"]["w"])


@model(dense("one", 4, 6, bias=True), dense("two", 6, 3))
def units_split_over_devices() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _split(input, params)

    return model_fn, normal(TWO), inputs(4)


@model(dense("one", 4, 6, stack=2, bias=True), dense("two", 6, 4, stack=2))
def scan_over_blocks_split_over_devices() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        @jax.checkpoint
        def block(h: Array, layer: Any) -> tuple[Array, None]:
            return h + _split(h, layer), None

        return lax.scan(block, input, params)[0]

    shapes = {"one": {"w": (2, 4, 6), "b": (2, 6)}, "two": {"w": (2, 6, 4)}}
    return model_fn, normal(shapes), inputs(4)


@model(dense("one", 4, 6, bias=True), dense("two", 6, 3))
def product_chosen_by_the_platform() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def fast(x: Array, w: Array) -> Array:
            return (w.T @ x[:, None])[:, 0]

        h = lax.platform_dependent(input, params["one"]["w"], cpu=jnp.dot, default=fast)
        return jnp.tanh(h + params["one"]["b"]) @ params["two"]["w"]

    return model_fn, normal(TWO), inputs(4)


@model(dense("one", 4, 6, 5, bias=True), dense("two", 6, 3, 5))
def graph_with_a_sparse_matrix() -> Built:
    edges = np.random.default_rng(0).uniform(size=(5, 5)) < 0.4
    graph = sparse.BCOO.fromdense(jnp.asarray(edges, float))

    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(graph @ (input @ params["one"]["w"] + params["one"]["b"]))
        return graph @ (h @ params["two"]["w"])

    return model_fn, normal(TWO), inputs(5, 4)


@model(dense("one", 4, 6, 3, bias=True), dense("two", 6, 3, 3))
def sparse_data() -> Built:
    places = np.asarray([[0, 0], [0, 2], [1, 1], [2, 0], [2, 3]])

    def model_fn(input: Array, params: Any) -> Array:
        x = sparse.BCOO((input, jnp.asarray(places)), shape=(3, 4))
        return jnp.tanh(x @ params["one"]["w"] + params["one"]["b"]) @ params["two"]["w"]

    return model_fn, normal(TWO), inputs(5)


@model(dense("one", 5, 6), dense("two", 6, 3))
def constant_sparse_matrix_of_a_weight() -> Built:
    entries = jnp.asarray([[1.0, 0, 0, 2.0, 0], [0, 3.0, 1.0, 0, 0]], float)
    kept = sparse.BCOO.fromdense(entries)

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (kept @ params["one"])) @ params["two"]

    return model_fn, normal({"one": (5, 6), "two": (6, 3)}), inputs(2)


def _doubled(x_ref: Any, o_ref: Any) -> None:
    o_ref[...] = 2.0 * x_ref[...]


@jax.custom_vjp
def _kernel(params: Any, x: Array) -> Array:
    """A kernel, which has no derivative but the rule that comes with it."""
    call = functools.partial(pl.pallas_call, _doubled, interpret=True)
    return call(out_shape=jax.ShapeDtypeStruct((6,), x.dtype))(x @ params["one"]["w"])


_kernel.defvjp(
    lambda params, x: (_kernel(params, x), (params, x)),
    lambda kept, g: jax.vjp(lambda p, x: 2.0 * (x @ p["one"]["w"]), *kept)[1](g),
)


@model(
    dense("two", 6, 3),
    fallback("one/w", "other", 24, "derivative of its own"),
    own_bias("one/b", 6),
)
def kernel_with_a_rule() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = _kernel(params, input)
        return jnp.tanh(h + params["one"]["b"]) @ params["two"]["w"]

    return model_fn, normal(TWO), inputs(4)
