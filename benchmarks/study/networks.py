"""Networks as pure functions of one input: multilayer perceptrons and a small convolutional one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Activation = Callable[[Array], Array]


@dataclass(frozen=True)
class Network:
    """A model: how parameters are drawn, and what it computes; equal ones share what is compiled.

    Attributes:
        sizes: Number of features, of every hidden layer's units, and of outputs.
        activation: Between layers.
        convolutions: Whether two convolutions come before the first layer.
    """

    sizes: tuple[int, ...]
    activation: Activation = jnp.tanh
    convolutions: bool = False

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Parameters, drawn with variance 1 / inputs (2 / inputs before a rectifier)."""
        gain = 2.0 if self.activation is jax.nn.relu else 1.0
        shapes = {f"layer{k}": pair for k, pair in enumerate(pairwise(self.sizes))}
        kernels = {"conv0": (5, 5, 1, 8), "conv1": (5, 5, 8, 16)} if self.convolutions else {}
        params = {}
        for number, (name, shape) in enumerate((kernels | shapes).items()):
            fan_in = jnp.prod(jnp.asarray(shape[:-1]))
            noise = jax.random.normal(jax.random.fold_in(key, number), shape)
            params[name] = {"w": noise * jnp.sqrt(gain / fan_in), "b": jnp.zeros(shape[-1])}
        return params

    def __call__(self, input: Float[Array, "*shape"], params: PyTree) -> Float[Array, " outputs"]:
        """Outputs for one input."""
        if self.convolutions:
            for name, strides in (("conv0", (2, 2)), ("conv1", (3, 3))):
                input = jax.lax.conv_general_dilated(
                    input[None], params[name]["w"], strides, "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )[0]  # fmt: skip
                input = self.activation(input + params[name]["b"])
        x = input.reshape(-1)
        depth = len(self.sizes) - 1
        for k in range(depth):
            layer = params[f"layer{k}"]
            x = x @ layer["w"] + layer["b"]
            x = self.activation(x) if k < depth - 1 else x
        return x


@dataclass(frozen=True)
class Flat:
    """The same network with all of its parameters in one vector that no layer is found in.

    A term of value zero that data enter hides the layers, so that the curvature gets one dense
    block: the full generalised Gauss-Newton matrix.
    """

    network: Network

    def flatten(self, params: PyTree) -> PyTree:
        return {"theta": jax.flatten_util.ravel_pytree(params)[0]}

    def __call__(self, input: Float[Array, "*shape"], params: PyTree) -> Float[Array, " outputs"]:
        shapes = jax.eval_shape(self.network.init, jax.random.key(0))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        unravel = jax.flatten_util.ravel_pytree(zeros)[1]
        return self.network(input, unravel(params["theta"] + 0.0 * jnp.sum(input)))


def num_params(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
