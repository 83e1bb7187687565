"""Small models of every kind, each with the layers that ought to be found in it.

Parameters and inputs are random, float64 where x64 is on; inputs have a leading batch axis, and
``model_fn(input=, params=)`` takes one example without it. Sizes differ wherever they can, so
that an axis that is taken for another one shows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import Array, lax

NUM_EXAMPLES = 3

ModelFn = Callable[..., Any]
Built = tuple[ModelFn, Any, Any]  # model_fn, params, a batch of inputs


@dataclass(frozen=True)
class Expected:
    """What `find_layers` ought to say about one layer; ``because`` is a part of its reason."""

    name: str
    pattern: str
    block: str
    in_features: int
    out_features: int = 1
    positions: int = 1
    stack: int = 1
    bias: bool = False
    because: str = ""


@dataclass(frozen=True)
class Model:
    """A model, and the layers that ought to be found in it."""

    name: str
    build: Callable[[], Built]
    layers: tuple[Expected, ...]

    def make(self) -> tuple[ModelFn, Any, Any, int]:
        """The model, its parameters, a batch of inputs, and the number of outputs an example."""
        model_fn, params, inputs = self.build()
        one = jax.tree.map(lambda x: x[0], inputs)
        output = jax.eval_shape(lambda p, x: model_fn(input=x, params=p), params, one)
        return model_fn, params, inputs, sum(o.size for o in jax.tree.leaves(output))


MODELS: list[Model] = []


def model(*layers: Expected) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Put a model into the catalogue, under the name of the function that builds it."""

    def add(build: Callable[[], Built]) -> Callable[[], Built]:
        MODELS.append(Model(build.__name__, build, layers))
        return build

    return add


def by_name(name: str) -> Model:
    """The model of that name."""
    (found,) = [m for m in MODELS if m.name == name]
    return found


def num_parameters(params: Any) -> int:
    """How many real numbers the parameters are."""
    return sum(leaf.size * (1 + jnp.iscomplexobj(leaf)) for leaf in jax.tree.leaves(params))


@functools.cache
def classified(name: str) -> Any:
    """The model of that name, its parameters, and data with classes as targets."""
    model_fn, params, inputs, _ = by_name(name).make()
    output = jax.eval_shape(jax.vmap(lambda x: model_fn(input=x, params=params)), inputs)
    *terms, classes = output.shape
    return model_fn, params, (inputs, np.arange(np.prod(terms)).reshape(terms) % classes)


def dense(name: str, rows: int, columns: int, positions: int = 1, **other: Any) -> Expected:
    return Expected(name, "dense", "kronecker", rows, columns, positions, **other)


def conv(name: str, rows: int, columns: int, positions: int, **other: Any) -> Expected:
    return Expected(name, "conv", "kronecker", rows, columns, positions, **other)


def own_bias(name: str, size: int, positions: int = 1, **other: Any) -> Expected:
    return Expected(name, "bias", "kronecker", 1, size, positions, **other)


def shift(name: str, size: int, positions: int = 1, **other: Any) -> Expected:
    return Expected(name, "shift", "kronecker", 1, size, positions, **other)


def embed(name: str, rows: int, columns: int, positions: int = 1, **other: Any) -> Expected:
    return Expected(name, "embedding", "kronecker", rows, columns, positions, **other)


def fallback(name: str, pattern: str, size: int, because: str) -> Expected:
    return Expected(name, pattern, "dense", size, because=because)


def unused(name: str, size: int, because: str = "does not influence the output") -> Expected:
    return Expected(name, "unused", "none", size, because=because)


def normal(like: Any, seed: int = 0) -> Any:
    """Random arrays like a pytree of shapes (tuples), arrays, or ``jax.ShapeDtypeStruct``."""
    rng = np.random.default_rng(seed)

    def is_shape(leaf: Any) -> bool:
        return isinstance(leaf, tuple) and all(isinstance(n, int) for n in leaf)

    def draw(leaf: Any) -> Array:
        shape = leaf if is_shape(leaf) else leaf.shape
        return jnp.asarray(rng.normal(size=shape) / 2, dtype=float)

    return jax.tree.map(draw, like, is_leaf=is_shape)


def inputs(*shape: int, seed: int = 1) -> Array:
    """A batch of random inputs of that shape."""
    batch: Array = normal((NUM_EXAMPLES, *shape), seed)
    return batch


def tokens(length: int, vocabulary: int) -> Array:
    """A batch of random token ids."""
    drawn = np.random.default_rng(2).integers(vocabulary, size=(NUM_EXAMPLES, length))
    return jnp.asarray(drawn)


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module], x: Any, *kept: Any) -> Built:
    """A flax.nnx module; ``kept`` are the kinds of variables that are parameters."""
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state, *_ = nnx.split(module, kept or nnx.Param, ...)
    return lambda input, params: nnx.merge(graph, params)(input), normal(state), x


def from_linen(module: nn.Module, x: Any) -> Built:
    """A flax.linen module."""
    one = jax.tree.map(lambda a: a[0], x)
    variables = jax.eval_shape(module.init, jax.random.key(0), one)
    return (
        lambda input, params: module.apply({"params": params}, input),
        normal(variables["params"]),
        x,
    )


def from_equinox(make: Callable[[Array], Any], x: Any) -> Built:
    """An equinox module."""
    abstract = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(abstract, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda input, params: eqx.combine(params, static)(input), normal(shapes), x


def from_haiku(forward: Callable[..., Any], x: Any) -> Built:
    """A function of haiku modules."""
    transformed: Any = hk.without_apply_rng(hk.transform(forward))
    one = jax.tree.map(lambda a: a[0], x)
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), one)
    return lambda input, params: transformed.apply(params, input), normal(shapes), x


# -- multilayer perceptrons --------------------------------------------------------------------

TWO_LAYERS = (dense("lin1", 4, 5, bias=True), dense("lin2", 5, 3, bias=True))


@model(*TWO_LAYERS)
def mlp() -> Built:
    params = {"lin1": {"w": (4, 5), "b": (5,)}, "lin2": {"w": (5, 3), "b": (3,)}}

    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ params["lin1"]["w"] + params["lin1"]["b"])
        return h @ params["lin2"]["w"] + params["lin2"]["b"]

    return model_fn, normal(params), inputs(4)


@model(*TWO_LAYERS)
def mlp_weight_on_the_left() -> Built:
    params = {"lin1": {"w": (5, 4), "b": (5,)}, "lin2": {"w": (3, 5), "b": (3,)}}

    def model_fn(input: Array, params: Any) -> Array:
        h = jax.nn.gelu(params["lin1"]["w"] @ input + params["lin1"]["b"])
        return params["lin2"]["b"] + params["lin2"]["w"] @ h

    return model_fn, normal(params), inputs(4)


@model(dense("0", 4, 5), dense("1", 5, 3))
def mlp_without_bias() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params[0]) @ params[1]

    return model_fn, normal([(4, 5), (5, 3)]), inputs(4)


@model(*TWO_LAYERS)
def nnx_mlp() -> Built:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.lin1 = nnx.Linear(4, 5, rngs=rngs)
            self.lin2 = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.lin2(nnx.relu(self.lin1(x)))

    return from_nnx(Net, inputs(4))


@model(dense("layers_0", 4, 5, bias=True), dense("layers_2", 5, 3))
def linen_mlp() -> Built:
    return from_linen(nn.Sequential([nn.Dense(5), nn.silu, nn.Dense(3, use_bias=False)]), inputs(4))


@model(dense("layers/0", 4, 5, bias=True), dense("layers/1", 5, 3, bias=True))
def equinox_mlp() -> Built:
    return from_equinox(lambda key: eqx.nn.MLP(4, 3, 5, 1, key=key), inputs(4))


@model(dense("mlp/~/linear_0", 4, 5, bias=True), dense("mlp/~/linear_1", 5, 3, bias=True))
def haiku_mlp() -> Built:
    return from_haiku(lambda x: hk.nets.MLP([5, 3])(x), inputs(4))


@model(dense("lin1", 4, 5, 6, bias=True), dense("mix", 6, 2, 5, bias=True))
def mixer() -> Built:
    params = {"lin1": {"w": (4, 5), "b": (5,)}, "mix": {"w": (2, 6), "b": (2,)}}

    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ params["lin1"]["w"] + params["lin1"]["b"])
        return params["mix"]["w"] @ h + params["mix"]["b"][:, None]

    return model_fn, normal(params), inputs(6, 4)


@model(dense("layer", 3, 4, 5), dense("out", 4, 2, 5, bias=True))
def weight_of_a_constant() -> Built:
    positions = np.random.default_rng(3).normal(size=(5, 3))

    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input + positions @ params["layer"]["w"])
        return h @ params["out"]["w"] + params["out"]["b"]

    params = {"layer": {"w": (3, 4)}, "out": {"w": (4, 2), "b": (2,)}}
    return model_fn, normal(params), inputs(5, 4)


@model(dense("one", 4, 3, bias=True), dense("two", 2, 3), dense("out", 3, 2, bias=True))
def two_inputs_and_two_outputs() -> Built:
    params = {
        "one": {"w": (4, 3), "b": (3,)},
        "out": {"w": (3, 2), "b": (2,)},
        "two": {"w": (2, 3)},
    }

    def model_fn(input: Any, params: Any) -> Any:
        one = input["one"] @ params["one"]["w"] + params["one"]["b"]
        h = jnp.tanh(one + input["two"] @ params["two"]["w"])
        return {"mean": h @ params["out"]["w"] + params["out"]["b"], "hidden": h}

    return model_fn, normal(params), {"one": inputs(4), "two": inputs(2, seed=5)}


# -- products with several axes ----------------------------------------------------------------


@model(dense("proj", 6, 4, 5, bias=True))
def linen_dense_general() -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.DenseGeneral(features=(2, 2), axis=(-2, -1), name="proj")(x)

    return from_linen(Net(), inputs(5, 2, 3))


@model(dense("mix", 6, 12, 5, bias=True))
def einsum_with_interleaved_axes() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        product = jnp.einsum("sab,cadb->scd", input, params["mix"]["w"])
        return jnp.tanh(product + params["mix"]["b"])

    return model_fn, normal({"mix": {"w": (3, 2, 4, 3), "b": (3, 4)}}), inputs(5, 2, 3)


@model(dense("mix", 3, 4, 5, stack=2, bias=True))
def grouped_einsum() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.einsum("sgi,gio->sgo", input, params["mix"]["w"]) + params["mix"]["b"]

    return model_fn, normal({"mix": {"w": (2, 3, 4), "b": (2, 4)}}), inputs(5, 2, 3)


@model(own_bias("mix/b", 4, 10), dense("mix/w", 3, 4, 5, stack=2))
def grouped_einsum_with_one_bias_for_all_groups() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.einsum("sgi,gio->sgo", input, params["mix"]["w"]) + params["mix"]["b"]

    return model_fn, normal({"mix": {"w": (2, 3, 4), "b": (4,)}}), inputs(5, 2, 3)


@model(dense("w", 3, 5, stack=4))
def einsum_with_two_batch_axes() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.einsum("abi,oaib->abo", jnp.sin(input), params["w"])

    return model_fn, normal({"w": (5, 2, 3, 2)}), inputs(2, 2, 3)


@model(
    dense("attn/key", 4, 4, 3, bias=True),
    dense("attn/out", 4, 4, 3, bias=True),
    dense("attn/query", 4, 4, 3, bias=True),
    dense("attn/value", 4, 4, 3, bias=True),
)
def nnx_attention() -> Built:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attn = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.attn(x)

    return from_nnx(Net, inputs(3, 4))


# -- convolutions ------------------------------------------------------------------------------


@model(conv("conv", 9, 2, 9, bias=True), dense("lin", 18, 3, bias=True))
def nnx_cnn() -> Built:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 2, kernel_size=(3, 3), strides=2, rngs=rngs)
            self.lin = nnx.Linear(18, 3, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.lin(nnx.tanh(self.conv(x)).reshape(-1))

    return from_nnx(Net, inputs(6, 5, 1))


@model(conv("weight", 3, 2, 4, stack=2, bias=True))
def equinox_grouped_conv1d() -> Built:
    return from_equinox(
        lambda key: eqx.nn.Conv1d(2, 4, 3, stride=2, groups=2, padding=1, key=key), inputs(2, 7)
    )


@model(conv("weight", 12, 3, 20, bias=True))
def equinox_dilated_conv2d() -> Built:
    return from_equinox(
        lambda key: eqx.nn.Conv2d(
            2, 3, (2, 3), dilation=2, padding=((1, 0), (2, 1)), key=key
        ),
        inputs(2, 5, 6),
    )  # fmt: skip


@model(conv("weight", 8, 2, 8))
def equinox_conv3d() -> Built:
    return from_equinox(
        lambda key: eqx.nn.Conv3d(1, 2, 2, use_bias=False, key=key), inputs(1, 3, 3, 3)
    )


@model(conv("weight", 18, 3, 36, bias=True))
def equinox_transposed_conv2d() -> Built:
    return from_equinox(
        lambda key: eqx.nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, padding=1, key=key),
        inputs(2, 3, 3),
    )


@model(conv("up", 8, 3, 36, bias=True))
def linen_conv_with_transposed_kernel() -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            layer = nn.ConvTranspose(3, (2, 2), strides=(2, 2), transpose_kernel=True, name="up")
            return layer(x)

    return from_linen(Net(), inputs(3, 3, 2))


@model(dense("local", 6, 2, stack=3, bias=True))
def linen_local_conv() -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.ConvLocal(2, (2,), padding="VALID", name="local")(x)

    return from_linen(Net(), inputs(4, 3))


@model(conv("conv", 9, 2, 16, stack=2, bias=True))
def depthwise_conv() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        y = lax.conv_general_dilated(
            input[None], params["conv"]["w"], (1, 1), "SAME", feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.mean(jnp.tanh(y[0] + params["conv"]["b"]), axis=(0, 1))

    return model_fn, normal({"conv": {"w": (3, 3, 1, 4), "b": (4,)}}), inputs(4, 4, 2)


def taps(name: str, kernel: int, positions: int, stack: int, **other: Any) -> Expected:
    return Expected(name, "taps", "kronecker", kernel, 1, positions, stack, **other)


@model(taps("conv", 4, 6, 3, bias=True))
def taps_of_a_causal_conv() -> Built:
    """A depthwise kernel as Mamba has it: one slice of the padded input a tap."""

    def model_fn(input: Array, params: Any) -> Array:
        x, w = jnp.pad(input, ((3, 0), (0, 0))), params["conv"]["w"][:, 0]
        y = w[0] * x[:6]
        for j in range(1, 4):
            y = y + w[j] * x[j : j + 6]
        return jnp.mean(jnp.tanh(y + params["conv"]["b"]), axis=0)

    return model_fn, normal({"conv": {"w": (4, 1, 3), "b": (3,)}}), inputs(6, 3)


@model(dense("last", 3, 2), taps("layers", 3, 5, 6, bias=True))
def taps_in_a_scan() -> Built:
    """Channels first, the taps in reverse and halved, and added to the bias, in stacked layers."""

    def layer(x: Array, params: Any) -> tuple[Array, None]:
        padded, y = jnp.pad(x, ((0, 0), (1, 1))), params["b"][:, None]
        for j in range(3):
            y = y + (0.5 if j else -0.5) * params["w"][:, 2 - j, None] * padded[:, j : j + 5]
        return jnp.tanh(y), None

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.mean(lax.scan(layer, input, params["layers"])[0], axis=1) @ params["last"]

    shapes = {"layers": {"w": (2, 3, 3), "b": (2, 3)}, "last": (3, 2)}
    return model_fn, normal(shapes), inputs(3, 5)


class _Taps(eqx.Module):
    """A depthwise convolution of images, the difference of products summed in pairs."""

    weight: Array
    bias: Array

    @jax.jit
    def __call__(self, x: Array) -> Array:
        tap = lambda i, j: self.weight[i, j] * x[i : i + 3, j : j + 4]  # noqa: E731
        y = (tap(0, 0) - tap(0, 1)) - 3.0 * (tap(1, 0) + tap(1, 1))
        return jnp.mean(jnp.transpose(y, (2, 0, 1)) + self.bias[:, None, None], axis=(1, 2)) ** 2


@model(taps("weight", 4, 12, 2, bias=True))
def equinox_taps_of_images() -> Built:
    return from_equinox(lambda _: _Taps(normal((2, 2, 2)), normal((2,), 3)), inputs(4, 5, 2))


@model(
    fallback("gains/0", "scale", 3, "elementwise"), fallback("gains/1", "scale", 3, "elementwise")
)
def gains_of_two_branches() -> Built:
    """A sum of products, but of leaves of their own: each has its exact block."""

    def model_fn(input: Array, params: Any) -> Array:
        first, second = params["gains"]
        return jnp.mean(jnp.tanh(first * input + second * jnp.sin(input)), axis=0)

    return model_fn, normal({"gains": [(3,), (3,)]}), inputs(4, 3)


@model(conv("conv", 6, 3, 4, stack=2, bias=True))
def vmapped_conv() -> Built:
    """Groups are made of what is vmapped over, by reshapes that also transpose."""

    def one(w: Array, b: Array, x: Array) -> Array:
        return (
            lax.conv_general_dilated(
                x[None], w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
            )[0]
            + b
        )

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(jax.vmap(one)(params["conv"]["w"], params["conv"]["b"], input))

    return model_fn, normal({"conv": {"w": (2, 3, 2, 3), "b": (2, 3)}}), inputs(2, 4, 2)


@model(conv("conv", 8, 3, 20, bias=True))
def conv_of_odd_layout() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        y = lax.conv_general_dilated(
            input[:, :, None], params["conv"]["w"], (2, 1), ((1, 0), (0, 2)),
            lhs_dilation=(1, 2), rhs_dilation=(2, 1), dimension_numbers=("HWNC", "IOHW", "CWNH"),
        )  # fmt: skip
        return y + params["conv"]["b"][:, None, None, None]

    return model_fn, normal({"conv": {"w": (2, 3, 2, 2), "b": (3,)}}), inputs(4, 5, 2)


@model(conv("filter", 3, 1, 6, bias=True), dense("out", 6, 2))
def convolved_signal() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        filtered = jnp.convolve(input, params["filter"]["w"], mode="valid")
        return jnp.tanh(filtered + params["filter"]["b"]) @ params["out"]["w"]

    return model_fn, normal({"filter": {"w": (3,), "b": ()}, "out": {"w": (6, 2)}}), inputs(8)


@model(conv("filter", 9, 1, 12, bias=True))
def signal_shorter_than_its_filter() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(jnp.convolve(input, params["filter"]["w"]) + params["filter"]["b"])

    return model_fn, normal({"filter": {"w": (9,), "b": ()}}), inputs(4)


@model(conv("v", 32, 1, 48), dense("w", 3, 8))
def conv_of_two_weights() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        filters = lax.conv_general_dilated(params["v"], params["w"], (1, 1), "SAME")
        return jnp.tanh(jnp.einsum("nchw,c->nhw", filters, input))

    return model_fn, normal({"v": (1, 2, 4, 4), "w": (3, 2, 2, 2)}), inputs(3)


# -- nested programs ---------------------------------------------------------------------------


def _linear(x: Array, layer: Any) -> Array:
    y: Array = x @ layer["w"] + layer["b"]
    return y


@model(dense("inner", 4, 5, bias=True), dense("outer", 5, 3, bias=True))
def jitted() -> Built:
    params = {"inner": {"w": (4, 5), "b": (5,)}, "outer": {"w": (5, 3), "b": (3,)}}
    layer = jax.jit(_linear)

    @jax.jit
    def both(x: Array, params: Any) -> Array:
        return layer(jnp.tanh(layer(x, params["inner"])), params["outer"])

    return lambda input, params: both(input, params), normal(params), inputs(4)


@model(dense("inner", 4, 5, 2, bias=True), dense("outer", 5, 3, 2, bias=True))
def rematerialised() -> Built:
    params = {"inner": {"w": (4, 5), "b": (5,)}, "outer": {"w": (5, 3), "b": (3,)}}

    def model_fn(input: Array, params: Any) -> Array:
        policy = jax.checkpoint_policies.dots_saveable
        first = jax.checkpoint(lambda x: jnp.tanh(_linear(x, params["inner"])), policy=policy)
        return jax.checkpoint(lambda x: _linear(jnp.sin(first(x)), params["outer"]))(input)

    return model_fn, normal(params), inputs(2, 4)


@model(dense("first", 4, 6, bias=True), dense("second", 2, 5, stack=3, bias=True))
def vmapped_ensemble() -> Built:
    params = {"first": {"w": (3, 4, 2), "b": (3, 2)}, "second": {"w": (3, 2, 5), "b": (3, 5)}}

    def member(x: Array, params: Any) -> Array:
        return _linear(jnp.tanh(_linear(x, params["first"])), params["second"])

    return (
        lambda input, params: jax.vmap(member, in_axes=(None, 0))(input, params),
        normal(params),
        inputs(4),
    )


@model(dense("lin", 4, 3, 6, bias=True))
def vmapped_over_tokens() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        along = jax.vmap(jax.vmap(lambda x: _linear(x, params["lin"])))
        return along(input)

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(2, 3, 4)


@model(dense("head", 4, 2, bias=True), dense("layers", 4, 4, stack=3, bias=True))
def scan_over_layers() -> Built:
    params = {"layers": {"w": (3, 4, 4), "b": (3, 4)}, "head": {"w": (4, 2), "b": (2,)}}

    def model_fn(input: Array, params: Any) -> Array:
        h, _ = lax.scan(lambda h, p: (jnp.tanh(_linear(h, p)), None), input, params["layers"])
        return _linear(h, params["head"])

    return model_fn, normal(params), inputs(4)


@model(dense("layers", 4, 4, 2, stack=3, bias=True))
def reversed_scan_over_layers() -> Built:
    def layer(h: Array, p: Any) -> tuple[Array, Array]:
        h = jnp.tanh(p["w"] @ h + p["b"][:, None])
        return h, jnp.sum(h, axis=1)

    def model_fn(input: Array, params: Any) -> Any:
        return lax.scan(layer, input, params["layers"], reverse=True, unroll=2)

    return model_fn, normal({"layers": {"w": (3, 4, 4), "b": (3, 4)}}), inputs(4, 2)


@model(
    fallback("cell/h0", "other", 4, "the initial value of a scan's carry"),
    dense("cell/wh", 4, 4, 5, bias=True),
    dense("cell/wx", 3, 4, 5),
    dense("head", 4, 2, bias=True),
)
def scan_over_time() -> Built:
    params = {
        "cell": {"b": (4,), "h0": (4,), "wh": (4, 4), "wx": (3, 4)},
        "head": {"w": (4, 2), "b": (2,)},
    }

    def model_fn(input: Array, params: Any) -> Array:
        cell = params["cell"]

        def step(h: Array, x: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ cell["wh"] + x @ cell["wx"] + cell["b"]), None

        h, _ = lax.scan(step, cell["h0"], input)
        return _linear(h, params["head"])

    return model_fn, normal(params), inputs(5, 3)


@model(dense("layers", 4, 4, 3, stack=2, bias=True))
def scan_over_layers_of_a_scan_over_time() -> Built:
    def layer(xs: Array, p: Any) -> tuple[Array, None]:
        def step(h: Array, x: Array) -> tuple[Array, Array]:
            h = jnp.tanh(_linear(h + x, p))
            return h, h

        return lax.scan(step, jnp.zeros(4), xs)[1], None

    def model_fn(input: Array, params: Any) -> Array:
        return lax.scan(layer, input, params["layers"])[0]

    return model_fn, normal({"layers": {"w": (2, 4, 4), "b": (2, 4)}}), inputs(3, 4)


@model(dense("layers", 4, 4, 3, stack=2, bias=True))
def scan_over_time_of_a_scan_over_layers() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def layer(h: Array, p: Any) -> tuple[Array, None]:
            return jnp.tanh(_linear(h, p)), None

        def step(h: Array, x: Array) -> tuple[Array, None]:
            return lax.scan(layer, h + x, params["layers"])[0], None

        return lax.scan(step, jnp.zeros(4), input)[0]

    return model_fn, normal({"layers": {"w": (2, 4, 4), "b": (2, 4)}}), inputs(3, 4)


@model(dense("layers/0/w", 4, 4, stack=3, bias=True))
def scan_over_stacked_leaves() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
        return lax.scan(lambda h, p: (jnp.tanh(_linear(h, p)), None), input, stacked)[0]

    return model_fn, normal({"layers": [{"w": (4, 4), "b": (4,)}] * 3}), inputs(4)


@model(
    dense("left", 4, 3, bias=True),
    dense("right", 4, 3, bias=True),
    dense("shared", 3, 2, 2, bias=True, because="sum of 2 uses"),
)
def cond_branches() -> Built:
    one = {"w": (4, 3), "b": (3,)}
    params = {"left": one, "right": one, "shared": {"w": (3, 2), "b": (2,)}}

    def model_fn(input: Array, params: Any) -> Array:
        return lax.cond(
            input[0] > 0,
            lambda x: _linear(jnp.tanh(_linear(x, params["left"])), params["shared"]),
            lambda x: _linear(jnp.sin(_linear(x, params["right"])), params["shared"]),
            input,
        )

    x = inputs(4)
    return model_fn, normal(params), x.at[:, 0].set(jnp.asarray([1.0, -1.0, 2.0]))


@model(own_bias("b", 3), dense("w", 4, 3, 2, because="2 uses"))
def bias_after_a_cond() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        z = lax.cond(
            input[0] > 0, lambda x: x @ params["w"], lambda x: jnp.sin(x) @ params["w"], input
        )
        return jnp.tanh(z + params["b"])

    return model_fn, normal({"w": (4, 3), "b": (3,)}), inputs(4)


@model(own_bias("b", 4, stack=3), dense("w", 4, 4, 3))
def scan_over_biases_of_one_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, b: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ params["w"] + b), None

        return lax.scan(step, input, params["b"])[0]

    return model_fn, normal({"w": (4, 4), "b": (3, 4)}), inputs(4)


@model(own_bias("b", 4, 3), dense("w", 4, 4, stack=3))
def scan_over_weights_with_one_bias() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, w: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ w + params["b"]), None

        return lax.scan(step, input, params["w"])[0]

    return model_fn, normal({"w": (3, 4, 4), "b": (4,)}), inputs(4)


@model(fallback("w", "other", 48, "put out by a scan before its use"))
def scan_that_puts_out_its_weights() -> Built:
    def model_fn(input: Array, params: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), w[0]), input, params["w"])

    return model_fn, normal({"w": (3, 4, 4)}), inputs(4)


@model(dense("even", 4, 4, 5, bias=True), dense("odd", 4, 4, 5, bias=True))
def cond_in_a_scan() -> Built:
    layer = {"w": (4, 4), "b": (4,)}

    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, x: Array) -> tuple[Array, None]:
            odd = jnp.sum(x) > 0
            branches = [lambda h, k=k: jnp.tanh(_linear(h, params[k])) for k in ("even", "odd")]
            return x + lax.switch(odd.astype(int), branches, h), None

        return lax.scan(step, jnp.ones(4), input)[0]

    return model_fn, normal({"even": layer, "odd": layer}), inputs(5, 4)


@model(dense("lin", 4, 3, 5, bias=True))
def mapped() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return lax.map(lambda x: _linear(x, params["lin"]), input, batch_size=2)

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(5, 4)


@model(dense("lin", 4, 4, 3, bias=True))
def fori_loop() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(_linear(h, params["lin"])), input)

    return model_fn, normal({"lin": {"w": (4, 4), "b": (4,)}}), inputs(4)


@model(dense("layers", 4, 4, stack=3))
def fori_loop_over_indexed_layers() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return lax.fori_loop(0, 3, lambda k, h: jnp.tanh(h @ params["layers"][k]), input)

    return model_fn, normal({"layers": (3, 4, 4)}), inputs(4)


@model(
    dense("blocks/down", 5, 4, 2, stack=3), dense("blocks/up", 4, 5, 2, stack=3, bias=True)
)  # fmt: skip
def linen_scan_of_remat() -> Built:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: None) -> tuple[Array, None]:
            h = jnp.tanh(nn.Dense(5, name="up")(x))
            return x + nn.Dense(4, use_bias=False, name="down")(h), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return blocks(name="blocks")(x, None)[0]

    return from_linen(Net(), inputs(2, 4))


@model(
    dense("OptimizedLSTMCell_0/hf/kernel", 3, 12, 4, bias=True),
    dense("OptimizedLSTMCell_0/if/kernel", 2, 12, 4),
)
def linen_lstm() -> Built:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Any:
            return nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=float))(x)

    return from_linen(Net(), inputs(4, 2))


# -- one weight in several places --------------------------------------------------------------


@model(dense("w", 4, 4, 2, because="nearest Kronecker product of the sum of 2 uses"))
def tied() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params["w"]) @ params["w"]

    return model_fn, normal({"w": (4, 4)}), inputs(4)


@model(own_bias("b", 3), own_bias("c", 4), dense("w", 4, 3, 2, because="2 uses"))
def tied_autoencoder() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ params["w"] + params["b"])
        return h @ params["w"].T + params["c"]

    return model_fn, normal({"w": (4, 3), "b": (3,), "c": (4,)}), inputs(4)


@model(dense("w", 4, 4, 7, because="2 uses"))
def tied_square_and_transposed() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ params["w"])  # five positions
        return params["w"] @ h[:2].T  # two

    return model_fn, normal({"w": (4, 4)}), inputs(5, 4)


@model(dense("head", 3, 2), dense("net", 4, 3, 2, bias=True, because="2 uses"))
def siamese() -> Built:
    def model_fn(input: Any, params: Any) -> Array:
        first, second = (jnp.tanh(_linear(x, params["net"])) for x in input)
        return jnp.abs(first - second) @ params["head"]["w"]

    params = {"net": {"w": (4, 3), "b": (3,)}, "head": {"w": (3, 2)}}
    return model_fn, normal(params), (inputs(4), inputs(4, seed=5))


@model(dense("w", 3, 4, 8, because="2 uses"))
def gram_of_a_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (params["w"] @ params["w"].T))

    return model_fn, normal({"w": (4, 3)}), inputs(4)


@model(fallback("w", "other", 16, "another arrangement"))
def tied_in_another_arrangement() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params["w"]) @ params["w"].reshape(2, 2, 4).swapaxes(0, 1).reshape(
            4, 4
        )

    return model_fn, normal({"w": (4, 4)}), inputs(4)


@model(fallback("w", "other", 20, "used again in other parts"))
def tied_in_part() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params["w"])[1:] @ params["w"][:, 1:].T

    return model_fn, normal({"w": (4, 5)}), inputs(4)


# -- biases ------------------------------------------------------------------------------------


@model(dense("lin", 4, 6, bias=True))
def bias_after_reshape() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return (input @ params["lin"]["w"]).reshape(2, 3) + params["lin"]["b"]

    return model_fn, normal({"lin": {"w": (4, 6), "b": (2, 3)}}), inputs(4)


@model(dense("lin", 4, 3, 5, bias=True))
def bias_after_transpose() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh((input @ params["lin"]["w"]).T[::-1] + params["lin"]["b"][:, None])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(5, 4)


@model(dense("lin", 4, 5, bias=True))
def bias_after_split() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        lin = params["lin"]
        first, second = jnp.split(input @ lin["w"], [3])
        return jnp.tanh(first + lin["first"])[:2] * jnp.sin(second + lin["second"])

    return model_fn, normal({"lin": {"w": (4, 5), "first": (3,), "second": (2,)}}), inputs(4)


@model(dense("one", 4, 5, bias=True), dense("two", 5, 3, bias=True))
def bias_subtracted() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ params["one"]["w"] - params["one"]["b"])
        return params["two"]["b"] - h @ params["two"]["w"]

    params = {"one": {"w": (4, 5), "b": (5,)}, "two": {"w": (5, 3), "b": (3,)}}
    return model_fn, normal(params), inputs(4)


@model(dense("one", 4, 5, bias=True), dense("two", 5, 3, bias=True))
def ntk_parameterisation() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(0.7 * (input @ params["one"]["w"]) + 0.1 * params["one"]["b"])
        return (h @ params["two"]["w"]) / jnp.sqrt(5.0) + params["two"]["b"]

    params = {"one": {"w": (4, 5), "b": (5,)}, "two": {"w": (5, 3), "b": (3,)}}
    return model_fn, normal(params), inputs(4)


@model(dense("lin/w", 4, 3, 5, bias=True), own_bias("lin/c", 3, 5))
def two_biases() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return input @ params["lin"]["w"] + params["lin"]["b"] + params["lin"]["c"]

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,), "c": (3,)}}), inputs(5, 4)


@model(dense("lin/w", 4, 3), own_bias("lin/b", 3, 2))
def bias_added_twice() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params["lin"]["w"] + params["lin"]["b"] + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("one", 4, 3, bias=True), dense("two", 4, 3))
def bias_of_a_sum_of_products() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        two = jnp.sin(input) @ params["two"]["w"]
        return input @ params["one"]["w"] + two + params["one"]["b"]

    return model_fn, normal({"one": {"w": (4, 3), "b": (3,)}, "two": {"w": (4, 3)}}), inputs(4)


@model(own_bias("b", 4, 2), dense("one", 4, 4), dense("two", 4, 4))
def one_bias_in_two_layers() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ params["one"]["w"] + params["b"])
        return h @ params["two"]["w"] + params["b"]

    params = {"b": (4,), "one": {"w": (4, 4)}, "two": {"w": (4, 4)}}
    return model_fn, normal(params), inputs(4)


@model(dense("lin", 4, 4, 5, bias=True))
def bias_after_a_skip_connection() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh((input + input @ params["lin"]["w"]) + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 4), "b": (4,)}}), inputs(5, 4)


@model(shift("pos", 20), dense("w", 3, 4, 5))
def bias_for_every_position() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params["w"] + params["pos"])

    return model_fn, normal({"w": (3, 4), "pos": (5, 4)}), inputs(5, 3)


@model(own_bias("b", 2), dense("w", 4, 5))
def bias_on_part_of_the_outputs() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        first, second = jnp.split(input @ params["w"], [2])
        return jnp.tanh(jnp.concatenate([first + params["b"], second]))

    return model_fn, normal({"w": (4, 5), "b": (2,)}), inputs(4)


@model(own_bias("b", 3, 2), dense("w", 4, 3))
def bias_on_copies_of_the_output() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        copies = jnp.broadcast_to(input @ params["w"], (2, 3))
        return jnp.tanh(copies + params["b"])

    return model_fn, normal({"w": (4, 3), "b": (3,)}), inputs(4)


@model(fallback("b", "bias", 1, "one number"), dense("w", 4, 3))
def bias_of_one_number() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ params["w"] + params["b"])

    return model_fn, normal({"w": (4, 3), "b": ()}), inputs(4)


@model(own_bias("b", 3), dense("w", 4, 3))
def bias_after_constant_gains() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh((input @ params["w"]) * np.asarray([1.0, 2.0, -0.5]) + params["b"])

    return model_fn, normal({"w": (4, 3), "b": (3,)}), inputs(4)


@model(own_bias("b", 2), dense("w", 4, 3))
def bias_at_given_places() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh((input @ params["w"]).at[np.asarray([2, 0])].add(params["b"]))

    return model_fn, normal({"w": (4, 3), "b": (2,)}), inputs(4)


@model(own_bias("b", 3, because="added to data"), dense("w", 4, 3))
def bias_after_a_branch() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        z = input @ params["w"]
        return jnp.tanh(z + params["b"]) * z

    return model_fn, normal({"w": (4, 3), "b": (3,)}), inputs(4)


# -- scaled weights ----------------------------------------------------------------------------


@model(dense("lin", 4, 3, bias=True))
def weight_times_a_number() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (-params["lin"]["w"] / np.sqrt(4)) + 3.0 * params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("lin", 4, 3, bias=True))
def weight_with_scaled_rows() -> Built:
    rows = np.asarray([1.0, -2.0, 0.0, 0.5])

    def model_fn(input: Array, params: Any) -> Array:
        return input @ (rows[:, None] * params["lin"]["w"]) + params["lin"]["b"]

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(own_bias("lin/b", 3), dense("lin/w", 4, 3))
def weight_with_scaled_columns() -> Built:
    columns = np.asarray([1.0, 0.0, -0.5])

    def model_fn(input: Array, params: Any) -> Array:
        return input @ (params["lin"]["w"] * columns) + params["lin"]["b"]

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(own_bias("lin/b", 3), fallback("lin/w", "dense", 12, "scaled entry by entry"))
def masked_weight() -> Built:
    mask = np.tril(np.ones((4, 3)))

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (params["lin"]["w"] * mask) + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("lin", 4, 3, bias=True))
def weight_where_rows_are_kept() -> Built:
    kept = np.asarray([True, False, True, True])[:, None]

    def model_fn(input: Array, params: Any) -> Array:
        weight = jnp.where(kept, params["lin"]["w"], 0.5)
        return jnp.tanh(input @ weight + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(fallback("w", "dense", 16, "scaled entry by entry"))
def weight_above_the_diagonal() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ jnp.triu(params["w"]))

    return model_fn, normal({"w": (4, 4)}), inputs(4)


@model(unused("u[0:3]", 3), unused("v", 9), dense("u[3:12]", 4, 3))
def weight_with_a_row_of_another() -> Built:
    """The rows that are chosen are one weight, of two leaves."""

    def model_fn(input: Array, params: Any) -> Array:
        first = jnp.arange(4)[:, None] == 0
        return jnp.tanh(input @ jnp.where(first, params["v"], params["u"]))

    return model_fn, normal({"u": (4, 3), "v": (4, 3)}), inputs(4)


@model(own_bias("b", 4, 2), dense("w", 4, 4, 2, because="2 uses"))
def tied_weight_with_scaled_columns() -> Built:
    columns = np.asarray([1.0, 2.0, -0.5, 3.0])

    def model_fn(input: Array, params: Any) -> Array:
        weight = params["w"] * columns
        return jnp.tanh(input @ weight + params["b"]) @ weight.T + params["b"]

    return model_fn, normal({"w": (4, 4), "b": (4,)}), inputs(4)


@model(dense("lin", 4, 3, bias=True))
def weight_with_rows_dropped_at_random() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, (4, 1))
        return jnp.tanh(input @ (params["lin"]["w"] * kept) + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("lin", 4, 3, bias=True))
def constant_minus_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (1.0 - params["lin"]["w"]) + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("layers", 4, 4, 2, stack=3))
def scan_over_layers_scaled_one_by_one() -> Built:
    scales = np.asarray([1.0, -0.5, 2.0])[:, None, None]

    def model_fn(input: Array, params: Any) -> Array:
        scaled = params["layers"]["w"] * scales
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), input, scaled)[0]

    return model_fn, normal({"layers": {"w": (3, 4, 4)}}), inputs(2, 4)


# -- where the entries of a weight come from ---------------------------------------------------


@model(dense("k", 4, 9, 5))
def fused_leaves() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        fused = jnp.concatenate([params["q"], params["k"], params["v"]], axis=1)
        q, k, v = jnp.split(input @ fused, 3, axis=1)
        return jax.nn.softmax(q @ k.T) @ v

    return model_fn, normal({"q": (4, 3), "k": (4, 3), "v": (4, 3)}), inputs(5, 4)


@model(dense("qkv", 4, 9, 5, bias=True))
def fused_product() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        q, k, v = jnp.split(_linear(input, params["qkv"]), 3, axis=1)
        return jax.nn.softmax(q @ k.T) @ v

    return model_fn, normal({"qkv": {"w": (4, 9), "b": (9,)}}), inputs(5, 4)


@model(dense("w[0:16]", 4, 4), dense("w[16:32]", 4, 4), dense("w[32:48]", 4, 4))
def stacked_weights_indexed_one_by_one() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        for layer in range(3):
            input = jnp.tanh(input @ params["w"][layer])
        return input

    return model_fn, normal({"w": (3, 4, 4)}), inputs(4)


@model(dense("params[0:20]", 4, 5, bias=True), dense("params[25:40]", 5, 3, bias=True))
def flat_vector() -> Built:
    def model_fn(input: Array, params: Array) -> Array:
        w1, b1, w2, b2 = jnp.split(params, [20, 25, 40])
        return jnp.tanh(input @ w1.reshape(4, 5) + b1) @ w2.reshape(3, 5).T + b2

    return model_fn, normal((43,)), inputs(4)


@model(unused("w[5:20]", 15), dense("w[0:5]", 1, 5, because="weight of"))
def one_row_of_a_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return input @ params["w"][:1]

    return model_fn, normal({"w": (4, 5)}), inputs(1)


@model(dense("lin", 4, 3, bias=True))
def rows_in_another_order() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        weight = params["lin"]["w"][np.asarray([2, 0, 3, 1])]
        return jnp.tanh(input @ weight + params["lin"]["b"])

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("w", 4, 3))
def scaled_rows_in_another_order() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(
            input @ (params["w"] / np.arange(1.0, 5.0)[:, None])[np.asarray([2, 0, 3, 1])]
        )

    return model_fn, normal({"w": (4, 3)}), inputs(4)


@model(dense("w", 3, 3))
def padded_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ jnp.pad(params["w"], ((1, 0), (0, 0))))

    return model_fn, normal({"w": (3, 3)}), inputs(4)


@model(fallback("w", "dense", 10, "combined with constants or data"))
def triangular_weight() -> Built:
    places = np.tril_indices(4)

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ jnp.zeros((4, 4)).at[places].set(params["w"]))

    return model_fn, normal({"w": (10,)}), inputs(4)


@model(fallback("w", "other", 16, "added to another parameter before its use"))
def symmetric_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (params["w"] + params["w"].T))

    return model_fn, normal({"w": (4, 4)}), inputs(4)


@model(fallback("w", "dense", 6, "repeated within one weight"))
def repeated_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ jnp.tile(params["w"], (2, 1)))

    return model_fn, normal({"w": (2, 3)}), inputs(4)


@model(dense("mix", 3, 4, 10, bias=True))
def one_weight_for_all_groups() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        weights = jnp.broadcast_to(params["mix"]["w"], (2, 3, 4))
        return jnp.einsum("sgi,gio->sgo", input, weights) + params["mix"]["b"]

    return model_fn, normal({"mix": {"w": (3, 4), "b": (4,)}}), inputs(5, 2, 3)


@model(fallback("w", "dense", 12, "scaled differently where it is shared"))
def one_weight_scaled_for_every_group() -> Built:
    scales = np.asarray([1.0, 2.0])[:, None, None]

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.einsum("sgi,gio->sgo", input, params["w"] * scales)

    return model_fn, normal({"w": (3, 4)}), inputs(5, 2, 3)


# -- parameters without a Kronecker form -------------------------------------------------------


@model(
    dense("lin", 4, 5, bias=True),
    fallback("norm/bias", "shift", 5, "normalisation"),
    fallback("norm/scale", "scale", 5, "elementwise"),
)
def nnx_layer_norm() -> Built:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.lin = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.LayerNorm(5, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.norm(self.lin(x))

    return from_nnx(Net, inputs(4))


@model(
    dense("lin", 4, 5, bias=True),
    own_bias("norm/bias", 5),
    own_bias("norm/mean", 5, because="added to the output of a layer"),
    fallback("norm/scale", "scale", 5, "elementwise"),
    fallback("norm/var", "other", 5, "rsqrt"),
)
def nnx_batch_norm_with_its_averages() -> Built:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.lin = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.norm(self.lin(x))

    model_fn, params, x = from_nnx(Net, inputs(4), nnx.Param, nnx.BatchStat)
    return model_fn, jax.tree.map(jnp.abs, params), x


@model(
    dense("lin", 4, 5, bias=True),
    fallback("slope", "scale", 5, "elementwise"),
)
def learned_slope() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = _linear(input, params["lin"])
        return jnp.where(h > 0, h, params["slope"] * h)

    return model_fn, normal({"lin": {"w": (4, 5), "b": (5,)}, "slope": (5,)}), inputs(4)


@model(unused("frozen", 20), dense("trained", 5, 3))
def stop_gradient() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(input @ lax.stop_gradient(params["frozen"]))
        return h @ params["trained"] + jnp.sum(lax.stop_gradient(params["trained"]))

    return model_fn, normal({"frozen": (4, 5), "trained": (5, 3)}), inputs(4)


@model(
    unused("count", 1, "an integer leaf"),
    unused("dead", 3),
    unused("empty", 0, "has no entries"),
    dense("lin", 4, 3, bias=True),
    unused("never", 2),
)
def leaves_that_do_not_count() -> Built:
    params = {
        **normal({"dead": (3,), "empty": (0,), "lin": {"w": (4, 3), "b": (3,)}, "never": (2,)}),
        "count": jnp.asarray(3),
    }

    def model_fn(input: Array, params: Any) -> Array:
        dead = input[:3] @ params["dead"]
        del dead
        return params["count"] * _linear(input, params["lin"])

    return model_fn, params, inputs(4)


@model(
    own_bias("b", 3),
    fallback("g", "other", 3, "multiplied by another parameter"),
    fallback("v", "other", 12, ""),
)
def weight_norm() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        v = params["v"]
        weight = params["g"] * v / jnp.sqrt(jnp.sum(v**2, axis=0))
        return jnp.tanh(input @ weight + params["b"])

    return model_fn, normal({"v": (4, 3), "g": (3,), "b": (3,)}), inputs(4)


@model(fallback("w", "other", 12, "used by `exp`"))
def exponential_of_a_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return input @ jnp.exp(params["w"])

    return model_fn, normal({"w": (4, 3)}), inputs(4)


@model(dense("a", 4, 2), dense("b", 2, 3), dense("w", 4, 3))
def merged_lora() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ (params["w"] + params["a"] @ params["b"]))

    return model_fn, normal({"w": (4, 3), "a": (4, 2), "b": (2, 3)}), inputs(4)


@model(dense("lin", 4, 3, bias=True), fallback("spread", "other", 12, "no pattern covers"))
def weights_drawn_around_a_mean() -> Built:
    noise = normal((4, 3), seed=5)

    def model_fn(input: Array, params: Any) -> Array:
        drawn = params["lin"]["w"] + jax.nn.softplus(params["spread"]) * noise
        return jnp.tanh(input @ drawn + params["lin"]["b"])

    params = {"lin": {"w": (4, 3), "b": (3,)}, "spread": (4, 3)}
    return model_fn, normal(params), inputs(4)


@model(dense("lin", 4, 3, bias=True), dense("out", 3, 2))
def rounded_with_a_straight_through_gradient() -> Built:
    def rounded(x: Array) -> Array:
        levels = jnp.round(4.0 * x / jnp.max(jnp.abs(x)))
        return x + lax.stop_gradient(jnp.clip(levels, -3, 3) - x)

    def model_fn(input: Array, params: Any) -> Array:
        hidden = input @ rounded(params["lin"]["w"])
        return rounded(hidden + params["lin"]["b"]) @ params["out"]

    params = {"lin": {"w": (4, 3), "b": (3,)}, "out": (3, 2)}
    return model_fn, normal(params), inputs(4)


@model(dense("lin", 4, 3, bias=True))
def largest_output_times_its_number() -> Built:
    """What reads the product has no derivative but through the sum."""

    def model_fn(input: Array, params: Any) -> Array:
        product = input @ params["lin"]["w"]
        return jnp.tanh(product + params["lin"]["b"]) * (1 + jnp.argmax(product))

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("left", 2, 3), dense("right", 3, 1), own_bias("bias", 4))
def block_diagonal_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        weight = jax.scipy.linalg.block_diag(params["left"], 2.0 * params["right"])
        return jnp.tanh(input @ weight + params["bias"])

    return model_fn, normal({"left": (2, 3), "right": (3, 1), "bias": (4,)}), inputs(5)


@model(conv("conv", 8, 3, 20, bias=True), dense("out", 3, 2))
def padded_kernel() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        kernel = jnp.pad(params["conv"]["w"], ((1, 0), (0, 1), (0, 0), (0, 0)))
        numbers = ("NHWC", "HWIO", "NHWC")
        images = lax.conv_general_dilated(
            input[None], kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return jnp.tanh(images + params["conv"]["b"]).sum((0, 1, 2)) @ params["out"]

    params = {"conv": {"w": (2, 2, 2, 3), "b": (3,)}, "out": (3, 2)}
    return model_fn, normal(params), inputs(5, 4, 2)


@model(embed("table", 5, 3, 4))
def table_below_a_row_of_zeros() -> Built:
    """As for tokens that pad a text."""

    def model_fn(input: Array, params: Any) -> Array:
        table = jnp.concatenate([jnp.zeros((1, 3)), params["table"], jnp.ones((1, 3))])
        return jnp.tanh(jnp.sum(table[input], axis=0))

    return model_fn, normal({"table": (5, 3)}), tokens(4, 7)


@model(dense("a", 4, 2), dense("b", 2, 3), dense("lin", 4, 3, bias=True))
def added_lora() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        low_rank = (input @ params["a"]) @ params["b"]
        return jnp.tanh(input @ params["lin"]["w"] + low_rank + params["lin"]["b"])

    params = {"lin": {"w": (4, 3), "b": (3,)}, "a": (4, 2), "b": (2, 3)}
    return model_fn, normal(params), inputs(4)


def _attend(h: Array) -> Array:
    y: Array = jax.nn.softmax(h @ h.T) @ h
    return y[0]


@model(
    fallback("cls", "other", 4, "added to another parameter before its use"),
    dense("lin", 3, 4, 5, bias=True),
    fallback("pos", "other", 24, "added to another parameter before its use"),
)
def class_token_and_positions() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.concatenate([params["cls"][None], _linear(input, params["lin"])])
        return _attend(h + params["pos"])

    params = {"cls": (4,), "pos": (6, 4), "lin": {"w": (3, 4), "b": (4,)}}
    return model_fn, normal(params), inputs(5, 3)


@model(
    fallback("cls", "dense", 4, "combined with constants or data"), dense("lin", 3, 4, 5, bias=True)
)  # fmt: skip
def class_token() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _attend(jnp.concatenate([params["cls"][None], _linear(input, params["lin"])]))

    return model_fn, normal({"cls": (4,), "lin": {"w": (3, 4), "b": (4,)}}), inputs(5, 3)


@model(fallback("cls", "dense", 4, "combined with constants or data"), dense("w", 4, 2, 6))
def class_token_into_a_layer() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.concatenate([params["cls"][None], input]) @ params["w"]

    return model_fn, normal({"cls": (4,), "w": (4, 2)}), inputs(5, 4)


@model(dense("mean", 4, 2, bias=True), fallback("spread", "direct", 2, "part of the output itself"))
def parameter_as_an_output() -> Built:
    def model_fn(input: Array, params: Any) -> tuple[Array, Array]:
        return _linear(input, params["mean"]), params["spread"]

    return model_fn, normal({"mean": {"w": (4, 2), "b": (2,)}, "spread": (2,)}), inputs(4)


@model(dense("out", 4, 3, bias=True), embed("table", 7, 4, 5))
def embedding() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _linear(jnp.mean(params["table"][input], axis=0), params["out"])

    params = {"table": (7, 4), "out": {"w": (4, 3), "b": (3,)}}
    return model_fn, normal(params), tokens(5, 7)


@model(embed("table", 7, 4, 5))
def scaled_embedding() -> Built:
    rows = np.linspace(0.5, 2.0, 7)[:, None] / 3

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh((params["table"] * rows)[input] * np.sqrt(2.0))

    return model_fn, normal({"table": (7, 4)}), tokens(5, 7)


@model(embed("table", 6, 3, 4), dense("w", 3, 2, 4))
def embedding_with_a_row_for_padding() -> Built:
    """Row 0 is a constant: it counts as a row of the table that no token moves."""

    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(params["table"].at[0].set(0.0)[input]) @ params["w"]

    return model_fn, normal({"table": (6, 3), "w": (3, 2)}), tokens(4, 6)


@model(
    own_bias("b", 7),
    Expected("table", "dense+embedding", "kronecker", 7, 4, 6, because="2 uses"),
    dense("w", 4, 4),
)
def embedding_tied_to_the_output() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = jnp.tanh(jnp.sum(params["table"][input], axis=0) @ params["w"])
        return h @ params["table"].T + params["b"]

    return model_fn, normal({"table": (7, 4), "w": (4, 4), "b": (7,)}), tokens(5, 7)


@model(dense("cell", 4, 4, 5, bias=True), embed("table", 7, 4, 5))
def embedding_in_a_scan() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, token: Array) -> tuple[Array, None]:
            return jnp.tanh(_linear(h, params["cell"]) + params["table"][token]), None

        return lax.scan(step, jnp.zeros(4), input)[0]

    params = {"cell": {"w": (4, 4), "b": (4,)}, "table": (7, 4)}
    return model_fn, normal(params), tokens(5, 7)


@model(embed("table", 7, 4, 5))
def embedding_of_tokens_out_of_bounds() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        filled = jnp.take(params["table"], input + 3, axis=0, mode="fill", fill_value=0.5)
        return jnp.tanh(filled)

    return model_fn, normal({"table": (7, 4)}), tokens(5, 7)


@model(dense("router", 4, 3), embed("experts", 3, 8))
def one_expert_for_every_example() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        chosen = jnp.argmax(input @ params["router"])
        return jnp.tanh(input @ params["experts"][chosen]) * jnp.max(input @ params["router"])

    return model_fn, normal({"router": (4, 3), "experts": (3, 4, 2)}), inputs(4)


@model(dense("table", 7, 4, 5))
def one_hot_embedding() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(jax.nn.one_hot(input, 7) @ params["table"])

    return model_fn, normal({"table": (7, 4)}), tokens(5, 7)


@model(fallback("w", "scale", 12, "elementwise"))
def product_written_as_a_sum() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.sum(input[:, None] * params["w"], axis=0)

    return model_fn, normal({"w": (4, 3)}), inputs(4)


# -- rules of derivatives ----------------------------------------------------------------------


@jax.custom_jvp
def _kinked(x: Array) -> Array:
    return jnp.abs(x)


@_kinked.defjvp
def _kinked_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _kinked(*primals), 0.3 * tangents[0]  # not the derivative: the rule must be heeded


@jax.custom_vjp
def _straight_through(x: Array) -> Array:
    return jnp.round(x)


_straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (2.0 * g,))


@jax.custom_vjp
def _product_with_a_rule(x: Array, w: Array) -> Array:
    return x @ w


_product_with_a_rule.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, 3.0 * jnp.outer(xw[0], g))
)


@model(*TWO_LAYERS)
def custom_jvp_activation() -> Built:
    _, params, x = mlp()

    def model_fn(input: Array, params: Any) -> Array:
        return _linear(_kinked(_linear(input, params["lin1"])), params["lin2"])

    return model_fn, params, x


@model(*TWO_LAYERS)
def custom_vjp_activation() -> Built:
    _, params, x = mlp()

    def model_fn(input: Array, params: Any) -> Array:
        return _linear(_straight_through(3 * _linear(input, params["lin1"])), params["lin2"])

    return model_fn, params, x


@model(dense("one", 4, 5), fallback("two", "other", 15, "derivative of its own"))
def custom_vjp_around_a_product() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _product_with_a_rule(jnp.tanh(input @ params["one"]), params["two"])

    return model_fn, normal({"one": (4, 5), "two": (5, 3)}), inputs(4)


@model(dense("one", 4, 5), dense("two", 5, 3))
def linear_rule_of_a_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ _kinked(params["one"])) @ params["two"]

    return model_fn, normal({"one": (4, 5), "two": (5, 3)}), inputs(4)


@jax.custom_jvp
def _warped(x: Array) -> Array:
    return jnp.sin(x)


_warped.defjvps(lambda t, _, x: 0.5 * t * jnp.cos(x))


@model(fallback("one", "other", 20, "used by `custom_jvp_call`"), dense("two", 5, 3))
def custom_jvp_of_a_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ _warped(params["one"])) @ params["two"]

    return model_fn, normal({"one": (4, 5), "two": (5, 3)}), inputs(4)


@model(dense("w", 4, 3))
def straight_through_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(input @ _straight_through(3 * params["w"]))

    return model_fn, normal({"w": (4, 3)}), inputs(4)


@model(own_bias("b", 3), dense("w", 4, 3, 2, because="2 uses"))
def derivative_inside_the_model() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jax.grad(lambda x: jnp.sum(jnp.tanh(_linear(x, params))))(input)

    return model_fn, normal({"w": (4, 3), "b": (3,)}), inputs(4)


@model(dense("lin", 4, 3, bias=True))
def callback() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        jax.debug.callback(lambda _: None, input)
        return jnp.tanh(_linear(input, params["lin"]))

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(4)


@model(dense("lin", 4, 3, 2, bias=True))
def reduction_with_an_operator_of_its_own() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = _linear(input, params["lin"])
        return lax.reduce(h, np.asarray(-2.0, h.dtype), jnp.logaddexp, (0,))

    return model_fn, normal({"lin": {"w": (4, 3), "b": (3,)}}), inputs(2, 4)


@model(fallback("w", "other", 12, "reduce"))
def reduction_of_a_weight() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        weight = lax.reduce(params["w"], np.asarray(0.0, float), lambda a, b: a + 2.0 * b, (0,))
        return input @ weight

    return model_fn, normal({"w": (2, 3, 2)}), inputs(3)


# -- cases at the borders -----------------------------------------------------------------------


@model(
    fallback("cls", "dense", 4, "combined with constants or data"), dense("lin", 3, 4, 5, bias=True)
)
def class_token_behind_the_inputs() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _attend(jnp.concatenate([_linear(input, params["lin"]), params["cls"][None]]))

    return model_fn, normal({"cls": (4,), "lin": {"w": (3, 4), "b": (4,)}}), inputs(5, 3)


@model(own_bias("b", 7), dense("w", 4, 3))
def bias_of_more_than_a_layer() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(jnp.concatenate([input @ params["w"], input]) + params["b"])

    return model_fn, normal({"w": (4, 3), "b": (7,)}), inputs(4)


@model(own_bias("b", 5), dense("w", 4, 3))
def bias_of_a_padded_output() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh(jnp.pad(input @ params["w"], (1, 1)) + params["b"])

    return model_fn, normal({"w": (4, 3), "b": (5,)}), inputs(4)


@model(own_bias("b", 3), dense("w", 4, 3))
def bias_of_a_masked_output() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.tanh((input @ params["w"]) * np.asarray([1.0, 1.0, 0.0]) + params["b"])

    return model_fn, normal({"w": (4, 3), "b": (3,)}), inputs(4)


@model(*[unused(f"none/{k}", 0, "no entries") for k in "bw"], dense("some", 4, 3, bias=True))
def layer_without_outputs() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        layers = [_linear(input, params[k]) for k in ("none", "some")]
        return jnp.concatenate(layers)

    params = {"none": {"w": (4, 0), "b": (0,)}, "some": {"w": (4, 3), "b": (3,)}}
    return model_fn, normal(params), inputs(4)


@model(*[unused(f"layers/{k}", 0, "no entries") for k in "bw"], dense("out", 4, 3, bias=True))
def scan_over_no_layers() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h, _ = lax.scan(lambda h, p: (jnp.tanh(_linear(h, p)), None), input, params["layers"])
        return _linear(h, params["out"])

    params = {"layers": {"w": (0, 4, 4), "b": (0, 4)}, "out": {"w": (4, 3), "b": (3,)}}
    return model_fn, normal(params), inputs(4)


# -- complex weights, made of real parameters -----------------------------------------------------

TWICE = "the sum of 2 uses, of real and imaginary parts"
"""The parts of a complex product are two uses of the real and imaginary part of its weight."""


@model(dense("im", 1, 4))
def weight_times_an_imaginary_number() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.abs(jnp.sum(input) + input @ (1j * params["im"]))

    return model_fn, normal({"im": (1, 4)}), inputs(1)


def _complex(shapes: Any) -> Any:
    """Random complex arrays."""
    return jax.tree.map(lax.complex, normal(shapes), normal(shapes, seed=1))


@model(dense("first", 4, 6, bias=True), dense("second", 6, 2, 2, because=TWICE))
def complex_leaves() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        h = input @ params["first"]["w"] + params["first"]["b"]
        return jnp.abs((h * jnp.exp(-jnp.abs(h))) @ params["second"])

    shapes = {"first": {"w": (4, 3), "b": (3,)}, "second": (3, 2)}
    return model_fn, _complex(shapes), inputs(4)


@model(dense("out", 2, 2), dense("spectral", 4, 2, 2, stack=6, because=TWICE))
def complex_leaf_of_modes_in_two_dimensions() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        z = jnp.fft.rfft2(input)  # (in, 4, 3)
        y = jnp.einsum("ixy,ioxy->oxy", z[:, :3, :2], params["spectral"])
        y = jnp.pad(y, ((0, 0), (0, 1), (0, 1)))
        return jnp.tanh(jnp.fft.irfft2(y, s=input.shape[1:])).mean((1, 2)) @ params["out"]

    params = {"spectral": _complex((2, 2, 3, 2)), "out": normal((2, 2))}
    return model_fn, params, inputs(2, 4, 4)


@model(fallback("w", "complex", 8, "no product with data"), dense("v", 4, 2))
def complex_leaf_of_a_nonlinear_function() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.abs(jnp.exp(params["w"]) @ jnp.sin(input @ params["v"]))

    return model_fn, {"w": _complex((2, 2)), "v": normal((4, 2))}, inputs(4)


@model(dense("w", 4, 3, 2, because=TWICE))
def real_weight_of_complex_features() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.abs(jnp.fft.fft(input) @ params["w"])

    return model_fn, normal({"w": (4, 3)}), inputs(4)


@model(
    dense("layers/0/w/im", 4, 6, bias=True),
    dense("layers/1/w", 6, 2, 2, because=TWICE),
    *[Expected(f"layers/1/b/{part}", "bias", "kronecker", 1, 2) for part in ("im", "re")],
)  # fmt: skip
def complex_dense_layers() -> Built:
    def linear(x: Array, p: Any) -> Array:
        return x @ (p["w"]["re"] + 1j * p["w"]["im"]) + lax.complex(p["b"]["re"], p["b"]["im"])

    def model_fn(input: Array, params: Any) -> Array:
        h = linear(input, params["layers"][0])
        h = lax.complex(jnp.tanh(h.real), jnp.tanh(h.imag))
        return jnp.abs(linear(h, params["layers"][1]))

    def shapes(rows: int, columns: int) -> Any:
        weights = {"re": (rows, columns), "im": (rows, columns)}
        return {"w": weights, "b": {"re": (columns,), "im": (columns,)}}

    return model_fn, normal({"layers": [shapes(4, 3), shapes(3, 2)]}), inputs(4)


@model(
    dense("out", 2, 2), dense("skip", 2, 2, 8), dense("spectral", 4, 2, 2, stack=3, because=TWICE)
)
def fourier_layer_with_a_skip() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        z, weight = jnp.fft.rfft(input, axis=0)[:3], params["spectral"]
        y = jnp.einsum("mi,mio->mo", z, weight["re"] + 1j * weight["im"])
        h = jnp.tanh(jnp.fft.irfft(y, n=len(input), axis=0) + input @ params["skip"])
        return h.mean(0) @ params["out"]

    spectral = {"re": (3, 2, 2), "im": (3, 2, 2)}
    return model_fn, normal({"spectral": spectral, "skip": (2, 2), "out": (2, 2)}), inputs(8, 2)


@model(
    dense("high", 4, 3, 2, stack=6, because=TWICE), dense("low", 4, 3, 2, stack=6, because=TWICE),
)  # fmt: skip
def fourier_layer_in_two_dimensions() -> Built:
    """Channels first, corners of modes put into zeros, parts packed in the last axis of a leaf."""

    def model_fn(input: Array, params: Any) -> Array:
        z = jnp.fft.rfft2(input)  # (in, 5, 4)

        def product(x: Array, w: Array) -> Array:
            return jnp.einsum("ixy,ioxy->oxy", x, lax.complex(w[..., 0], w[..., 1]))

        spectrum = jnp.zeros((3, *z.shape[1:]), z.dtype)
        spectrum = spectrum.at[:, :2, :3].set(product(z[:, :2, :3], params["low"]))
        spectrum = spectrum.at[:, -2:, :3].set(product(z[:, -2:, :3], params["high"]))
        return jnp.tanh(jnp.fft.irfft2(spectrum, s=input.shape[1:])).mean((1, 2))

    return model_fn, normal({"low": (2, 3, 2, 3, 2), "high": (2, 3, 2, 3, 2)}), inputs(2, 5, 6)


class _Spectral(nnx.Module):
    """A layer of the full transform, parts in two parameters, modes last."""

    def __init__(self, channels: int, modes: int, rngs: nnx.Rngs) -> None:
        shape = (channels, channels, modes)
        self.real = nnx.Param(jax.random.normal(rngs.params(), shape, float))
        self.imag = nnx.Param(jax.random.normal(rngs.params(), shape, float))
        self.modes = modes

    def __call__(self, x: Array) -> Array:
        z = jnp.fft.fft(x.astype(complex), axis=-1)[..., : self.modes]
        y = jnp.einsum("bim,iom->bom", z, self.real[...] + 1j * self.imag[...])
        y = jnp.pad(y, ((0, 0), (0, 0), (0, x.shape[-1] - self.modes)))
        return jnp.fft.ifft(y, axis=-1).real


@model(
    dense("first", 4, 2, 2, stack=2, because=TWICE),
    dense("second", 4, 2, 2, stack=2, because=TWICE),
)  # fmt: skip
def nnx_fourier_operator() -> Built:
    class Operator(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = _Spectral(2, 2, rngs), _Spectral(2, 2, rngs)

        def __call__(self, x: Array) -> Array:
            return jnp.tanh(self.second(jnp.tanh(self.first(x)))).mean(-1)

    graph, params = nnx.split(Operator(nnx.Rngs(0)))

    def model_fn(input: Array, params: Any) -> Array:
        return nnx.merge(graph, params)(input[None])[0]

    return model_fn, params, inputs(2, 6)


@model(dense("im", 4, 2, 2, stack=6, because=TWICE))
def fourier_layers_in_a_scan() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        @jax.checkpoint
        def layer(h: Array, w: Any) -> tuple[Array, None]:
            y = jnp.einsum("mi,mio->mo", jnp.fft.rfft(h, axis=0)[1:3], lax.complex(*w))
            return jnp.tanh(jnp.fft.irfft(y, n=len(h), axis=0)), None

        return lax.scan(layer, input, (params["re"], params["im"]))[0].mean(0)

    return model_fn, normal({"re": (3, 2, 2, 2), "im": (3, 2, 2, 2)}), inputs(6, 2)


@model(
    Expected("w", "conv", "kronecker", 2 * 2 * 3, 2, 8, because=TWICE),
    fallback("filter/im", "scale", 2, "elementwise"),
    fallback("filter/re", "scale", 2, "elementwise"),
)  # fmt: skip
def complex_convolution_and_filter() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        weight, scale = (lax.complex(params[k]["re"], params[k]["im"]) for k in ("w", "filter"))
        z = jnp.fft.fft(input, axis=0)[None]  # (1, 4, 2)
        layout = ("NWC", "WIO", "NWC")
        y = lax.conv_general_dilated(z, weight, (1,), "SAME", dimension_numbers=layout)
        return jnp.abs(y * scale).mean((0, 1))

    shapes = {"w": {"re": (3, 2, 2), "im": (3, 2, 2)}, "filter": {"re": (2,), "im": (2,)}}
    return model_fn, normal(shapes), inputs(4, 2)


@model(dense("w", 3, 2), dense("v", 4, 3, 4, bias=False))
def fourier_mixing_of_tokens() -> Built:
    """Complex intermediate values without parameters."""

    def model_fn(input: Array, params: Any) -> Array:
        mixed = jnp.fft.fft2(jnp.tanh(input @ params["v"])).real
        return jnp.sum(mixed, axis=0) @ params["w"]

    return model_fn, normal({"v": (4, 3), "w": (3, 2)}), inputs(4, 4)


@model(fallback("w", "complex", 6, "no product with data"))
def weight_in_the_frequency_domain() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return jnp.fft.irfft(jnp.fft.rfft(input) * jnp.fft.rfft(params["w"]), n=6)

    return model_fn, normal({"w": (6,)}), inputs(6)


@model(dense("w", 3, 4))
def weight_padded_with_a_literal() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return input @ lax.pad(params["w"], np.asarray(0.0, float), ((0, 1, 0), (1, 0, 0)))

    return model_fn, normal({"w": (3, 4)}), inputs(4)


@model(dense("w[0:4]", 1, 4), dense("w[4:12]", 2, 4))
def block_diagonal_of_parts() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return input @ jax.scipy.linalg.block_diag(params["w"][:1], params["w"][1:])

    return model_fn, normal({"w": (3, 4)}), inputs(3)


@model(fallback("b", "bias", 4, "scaled differently"), dense("w", 4, 4, 3))
def bias_scaled_by_the_time() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, t: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ params["w"] + params["b"] * t), None

        return lax.scan(step, input, jnp.asarray([1.0, 2.0, 4.0]))[0]

    return model_fn, normal({"w": (4, 4), "b": (4,)}), inputs(4)


@model(fallback("b", "bias", 4, "scaled differently"), dense("w", 4, 4, 3))
def bias_added_and_scaled_by_the_time() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, t: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ params["w"] + params["b"] * t + params["b"]), None

        return lax.scan(step, input, jnp.asarray([1.0, 2.0, 4.0]))[0]

    return model_fn, normal({"w": (4, 4), "b": (4,)}), inputs(4)


@model(fallback("w", "dense", 16, "scaled differently where it is shared"))
def weight_scaled_by_the_time() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def step(h: Array, t: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ (params["w"] * t).T), None

        return lax.scan(step, input, jnp.asarray([1.0, 2.0, 4.0]))[0]

    return model_fn, normal({"w": (4, 4)}), inputs(4)


# The rest of the catalogue, which is made of what is above.
from support import frontends as frontends  # noqa: E402
from support import primitives as primitives  # noqa: E402
from support import solvers as solvers  # noqa: E402
