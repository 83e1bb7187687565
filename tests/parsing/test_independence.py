"""Models of batches: those whose examples depend on one another are refused, all others taken."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from support import models
from support.matrices import normal

import laplax_kfac
from laplax_kfac.parsing.independence import require_independent

W, V = normal(4, 4, seed=1), normal(4, 2, seed=2)
PARAMS = {"w": W, "v": V}
SIZE = 5


def hidden(x, p):
    return jnp.tanh(x @ p["w"])


def batch_norm(x, p):
    h = hidden(x, p)
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) @ p["v"]


def attention_over_the_batch(x, p):
    h = hidden(x, p)
    return jax.nn.softmax(h @ h.T) @ h @ p["v"]


def scan_along_the_batch(x, p):
    def step(carry, row):
        carry = jnp.tanh(carry + row @ p["w"])
        return carry, carry @ p["v"]

    return lax.scan(step, jnp.zeros(4), x)[1]


def in_a_loop(x, p):
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh((h - h.mean(0)) @ p["w"]), x) @ p["v"]


def under_a_condition(x, p):
    return lax.cond(p["w"][0, 0] > 5, lambda h: h, lambda h: h - h.mean(0), hidden(x, p)) @ p["v"]


def nnx_in_training(x, p):
    del p
    net = nnx.BatchNorm(4, use_running_average=False, rngs=nnx.Rngs(0))
    return net(x)


def linen_in_training(x, p):
    net = linen.BatchNorm(use_running_average=False)
    variables = net.init(jax.random.key(0), jnp.ones((2, 4)))
    return net.apply(variables, hidden(x, p), mutable=["batch_stats"])[0]


def haiku_in_training(x, p):
    def net(x):
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, True)

    transformed = hk.transform_with_state(net)
    params, state = transformed.init(jax.random.key(0), jnp.ones((2, 4)))
    return transformed.apply(params, state, None, hidden(x, p))[0]


def images_in_training(x, p):
    h = lax.conv_general_dilated(x[:, None, :, None] * p["w"][0, 0], jnp.ones((3, 1, 2, 1)),
                                 (1, 1), "SAME")  # fmt: skip
    mean = h.mean((0, 2, 3), keepdims=True)
    return ((h - mean) / (h.std((0, 2, 3), keepdims=True) + 1.0)).reshape(len(x), -1)


MIXING: dict[str, Callable[..., Any]] = {
    "batch norm": batch_norm,
    "nnx in training": nnx_in_training,
    "linen in training": linen_in_training,
    "haiku in training": haiku_in_training,
    "images in training": images_in_training,
    "mean subtracted": lambda x, p: (hidden(x, p) - hidden(x, p).mean(0)) @ p["v"],
    "softmax over the batch": lambda x, p: jax.nn.softmax(hidden(x, p), axis=0) @ p["v"],
    "largest of the batch": lambda x, p: (hidden(x, p) / hidden(x, p).max()) @ p["v"],
    "attention over the batch": attention_over_the_batch,
    "distances": lambda x, p: jnp.sum((x[:, None] - x[None]) ** 2, -1).sum(1)[:, None] @ p["v"][:1],
    "sorted": lambda x, p: jnp.sort(hidden(x, p), axis=0) @ p["v"],
    "summed up": lambda x, p: jnp.cumsum(hidden(x, p), axis=0) @ p["v"],
    "rolled": lambda x, p: (hidden(x, p) + jnp.roll(hidden(x, p), 1, axis=0)) @ p["v"],
    "turned round": lambda x, p: (hidden(x, p) + hidden(x, p)[::-1]) @ p["v"],
    "less the first": lambda x, p: (hidden(x, p) - hidden(x, p)[:1]) @ p["v"],
    "picked": lambda x, p: hidden(x, p)[jnp.zeros(len(x), int)] @ p["v"],
    "a neighbour's": lambda x, p: (hidden(x, p)[1:] @ p["v"]).sum(0) + hidden(x, p) @ p["v"],
    "merged with features": lambda x, p: (
        hidden(x, p).reshape(2, -1).sum(0)[: len(x), None] + hidden(x, p) @ p["v"]
    ),
    "transposed": lambda x, p: (hidden(x, p).T.reshape(len(x), 4)) @ p["v"],
    "scanned": scan_along_the_batch,
    "in a loop": in_a_loop,
    "under a condition": under_a_condition,
    "a remat": jax.checkpoint(batch_norm),
    "a jit": jax.jit(batch_norm),
    "mean of the batch": lambda x, p: (hidden(x, p) @ p["v"]).mean(0),
    "a number": lambda x, p: jnp.sum(hidden(x, p) @ p["v"]),
    "batch axis behind": lambda x, p: (hidden(x, p) @ p["v"]).T,
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_examples_are_refused(name):
    def model_fn(input, params):
        return MIXING[name](input, params)

    example = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(ValueError, match=r"vmap_over_data=False.*depend on one another.*eval\(\)"):
        require_independent(model_fn, PARAMS, example)


def heads(x, p):
    """Attention within each example."""
    h = (x[:, :, None] * p["w"][0]).reshape(len(x), 4, 2, 2)
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", h, h))
    return jnp.einsum("bhts,bshd->bthd", scores, h).reshape(len(x), -1)


def over_time(x, p):
    def step(carry, column):
        carry = jnp.tanh(carry * p["w"][0] + column[:, None])
        return carry, carry

    last, every = lax.scan(step, jnp.zeros((len(x), 4)), x.T)
    return last @ p["v"] + every.sum(0) @ p["v"]


def groups(x, p):
    h = hidden(x, p).reshape(len(x), 2, 2)
    h = (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-3)
    return h.reshape(x.shape) @ p["v"]


def nnx_in_evaluation(x, p):
    del p
    return nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))(x)


def images(x, p):
    h = lax.conv_general_dilated(
        x.reshape(len(x), 2, 2, 1), p["w"].reshape(2, 2, 1, 4), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
    return h.mean((1, 2)) @ p["v"]


SEPARATE: dict[str, Callable[..., Any]] = {
    "network": lambda x, p: hidden(x, p) @ p["v"],
    "images": images,
    "attention": heads,
    "over time": over_time,
    "groups": groups,
    "nnx in evaluation": nnx_in_evaluation,
    "one of each": lambda x, p: jnp.take_along_axis(
        hidden(x, p), jnp.argmax(x, 1)[:, None], axis=1
    ),
    "the last of each": lambda x, p: hidden(x, p)[jnp.arange(len(x)), jnp.argmax(x, 1)][:, None],
    "two views": lambda x, p: sum(
        jnp.split(hidden(jnp.concatenate([x, -x]), p), 2), jnp.zeros(())
    ) @ p["v"],
    "set": lambda x, p: hidden(x, p).at[:, 0].set(x[:, 1]) @ p["v"],
    "rows as examples": lambda x, p: (x.reshape(-1, 2) @ p["v"][:2]).reshape(len(x), -1),
    "a common shift": lambda x, p: jnp.exp(
        hidden(x, p) - hidden(x, p).max() - jnp.log(jnp.exp(hidden(x, p) - hidden(x, p).max())
                                                    .sum(-1, keepdims=True))
    ),
    "until all have settled": lambda x, p: lax.while_loop(
        lambda s: s[1] < 4, lambda s: (jnp.tanh(s[0] @ p["w"]), s[1] + 1), (x, 0)
    )[0] @ p["v"],
    "vmapped": lambda x, p: jax.vmap(lambda r: jnp.sort(hidden(r, p)))(x),
    "without data": lambda x, p: jnp.broadcast_to(p["v"], (len(x), *p["v"].shape)),
    "custom rule": lambda x, p: jax.nn.relu(jax.nn.gelu(hidden(x, p))) @ p["v"],
    "one size of batch alone": lambda x, p: (x.reshape(1, 4) @ p["w"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEPARATE)
def test_models_that_do_not_are_taken(name):
    def model_fn(input, params):
        return SEPARATE[name](input, params)

    require_independent(model_fn, PARAMS, jax.ShapeDtypeStruct((4,), jnp.float32))


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_every_model_under_vmap_is_taken(model):
    model_fn, params, inputs, _ = model.make()

    def batched(input, params):
        return jax.vmap(lambda x: model_fn(input=x, params=params))(input)

    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    require_independent(batched, params, example)


def test_what_is_not_known_is_not_refused_for_its_shapes_alone():
    """Without values of the parameters some are drawn."""

    def model_fn(input, params):
        return (hidden(input, params).at[:, 0].set(input[::-1, 1])) @ params["v"]

    example = jax.ShapeDtypeStruct((4,), jnp.float32)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    for params in (PARAMS, abstract):
        with pytest.raises(ValueError, match="depend on one another"):
            require_independent(model_fn, params, example)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "data_fit", "find_layers"])
def test_public_functions_refuse_them(name):
    def model_fn(input, params):
        return batch_norm(input, params)

    x, y = normal(SIZE, 4), np.zeros((SIZE, 2))
    options = {} if name == "find_layers" else {"loss_fn": "mse"}
    data = x if name == "find_layers" else (x, y)
    with pytest.raises(ValueError, match="depend on one another"):
        getattr(laplax_kfac, name)(model_fn, PARAMS, data, vmap_over_data=False, **options)
