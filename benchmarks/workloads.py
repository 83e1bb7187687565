"""The four workloads, without any framework: shapes, weights, data, and what the mathematics needs.

Every contender gets the same weights and the same data, so that their curvatures can be compared.
Images are NHWC, dense weights (in, out), kernels HWIO; `models_torch` converts.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

CLASSES = 10
SEED = 0
RATE_SIZE = 2048
RATE_REPEATS = 4
RATE_OPERATIONS = RATE_REPEATS * 2.0 * RATE_SIZE**3
"""One measurement of the machine's rate: products of square float32 matrices."""


@dataclass(frozen=True)
class Layer:
    """One dense layer or convolution.

    Attributes:
        name: Prefix of its parameters.
        weight: Shape of its weight: (in, out), or (height, width, in, out).
        positions: Positions S that the weight is shared over.
        reads_data: Whether its input is the data, so that nothing is pulled back through it.
    """

    name: str
    weight: tuple[int, ...]
    positions: int = 1
    reads_data: bool = False

    @property
    def inputs(self) -> int:
        """Rows of its weight as a matrix."""
        return math.prod(self.weight[:-1])

    @property
    def outputs(self) -> int:
        """Columns of its weight."""
        return self.weight[-1]


@dataclass(frozen=True)
class Workload:
    """A network, its data, and the size of a pass over them.

    Attributes:
        name: Which forward function of `models_jax` and `models_torch`.
        shape: Shape of one input.
        layers: Its layers, in the order of evaluation.
        num_examples: Size N of the data.
        batch_size: Examples a batch.
        run_examples: How many of the examples a run does where its time is linear in them.
        other_products: Multiply-adds of one forward pass outside the layers (attention).
        classes: Number of outputs C.
    """

    name: str
    shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    num_examples: int
    batch_size: int
    run_examples: int
    other_products: int = 0
    classes: int = CLASSES

    @property
    def fraction(self) -> float:
        """Part of the data that a run does."""
        return self.run_examples / self.num_examples

    @property
    def num_params(self) -> int:
        """Weights and biases."""
        return sum((layer.inputs + 1) * layer.outputs for layer in self.layers)

    def sized(self, num_examples: int, batch_size: int, run: int | None = None) -> "Workload":
        """The same network with other data; a run does all of them, or ``run``."""
        return replace(
            self,
            num_examples=num_examples,
            batch_size=batch_size,
            run_examples=run or num_examples,
        )


def mlp(sizes: tuple[int, ...] = (784, 1024, 1024, 10)) -> Workload:
    """Dense layers with relu between them."""
    layers = tuple(
        Layer(f"dense{i}", pair, reads_data=i == 0)
        for i, pair in enumerate(itertools.pairwise(sizes))
    )
    return Workload("mlp", sizes[:1], layers, 4096, 256, 4096, classes=sizes[-1])


def lenet() -> Workload:
    """LeCun et al. (1998) with relu and max pooling, on 28 x 28 images."""
    layers = (
        Layer("conv0", (5, 5, 1, 6), 28 * 28, reads_data=True),
        Layer("conv1", (5, 5, 6, 16), 10 * 10),
        Layer("dense0", (400, 120)),
        Layer("dense1", (120, 84)),
        Layer("dense2", (84, CLASSES)),
    )
    return Workload("lenet", (28, 28, 1), layers, 4096, 256, 4096)


CONV8_CHANNELS = (32, 32, 64, 64, 128, 128, 256, 256)
CONV8_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)


def conv8() -> Workload:
    """Eight 3 x 3 convolutions without norm layers, mean pooling, one dense layer."""
    layers, size, channels = [], 32, 3
    for i, (out, stride) in enumerate(zip(CONV8_CHANNELS, CONV8_STRIDES, strict=True)):
        size //= stride
        layers.append(Layer(f"conv{i}", (3, 3, channels, out), size**2, reads_data=i == 0))
        channels = out
    layers.append(Layer("dense0", (channels, CLASSES)))
    return Workload("conv8", (32, 32, 3), tuple(layers), 512, 64, 512)


HEADS = 8


def transformer(
    tokens: int = 128, width: int = 256, hidden: int = 1024, depth: int = 6
) -> Workload:
    """An encoder on token vectors; norms before each part, without parameters; mean pooling."""
    layers = []
    for i in range(depth):
        parts = {part: (width, width) for part in ("query", "key", "value", "out")}
        parts |= {"up": (width, hidden), "down": (hidden, width)}
        layers += [
            Layer(f"block{i}_{part}", weight, tokens, i == 0 and part in ("query", "key", "value"))
            for part, weight in parts.items()
        ]
    layers.append(Layer("dense0", (width, CLASSES)))
    attention = 2 * tokens**2 * width * depth
    return Workload(
        "transformer", (tokens, width), tuple(layers), 512, 64, 512, other_products=attention
    )


WORKLOADS = {"mlp": mlp(), "lenet": lenet(), "conv8": conv8(), "transformer": transformer()}
PART = {"conv8": {"run": 128}, "transformer": {"run": 64}}
"""Parts of the data that runs do, by workload, where their time is linear in the examples."""
FEW = {"conv8": {"examples": 128}, "transformer": {"examples": 64}}
"""Smaller data of the two large networks, where it is not."""
QUICK = {
    "mlp": (64, 32),
    "small": (64, 32),
    "lenet": (64, 32),
    "conv8": (16, 8),
    "transformer": (8, 4),
}
"""Examples and batch of ``--quick``, which only shows that the scripts run."""


def weights(workload: Workload) -> dict[str, np.ndarray]:
    """Random weights of the usual scale; small random biases."""
    rng = np.random.default_rng(SEED)
    params = {}
    for layer in workload.layers:
        gain = 1.0 if workload.name == "transformer" else 2.0  # attention must not saturate
        scale = math.sqrt(gain / layer.inputs)
        params[f"{layer.name}_w"] = (scale * rng.standard_normal(layer.weight)).astype(np.float32)
        params[f"{layer.name}_b"] = (0.1 * rng.standard_normal(layer.outputs)).astype(np.float32)
    return params


def data(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and labels, as many as a run does."""
    rng = np.random.default_rng(SEED + 1)
    x = rng.standard_normal((workload.run_examples, *workload.shape)).astype(np.float32)
    return x, rng.integers(workload.classes, size=workload.run_examples)


def columns(workload: Workload, fisher_type: str) -> int:
    """Vectors pulled back for every example, in the naive count: C for the exact Hessian."""
    return workload.classes if fisher_type == "type2" else 1


def operations(workload: Workload, pulled: int) -> dict[str, float]:
    """Floating-point operations of a naive pass over the data, by part.

    A product of (n, k) and (k, m) counts 2 n k m. With S positions and R = ``pulled`` vectors an
    example and a layer with weight (in, out) needs ``2 S in out`` forward, ``2 R S in out`` for the
    pullbacks to its input (none at the first layer), ``2 S (in + 1)^2`` for the input factor and
    ``2 R S out^2`` for the output factor. Products of two activations (attention) have two
    pullbacks each. Everything that is no matrix product counts nothing.
    """
    forward = sum(2 * y.positions * y.inputs * y.outputs for y in workload.layers)
    pullback = sum(
        2 * y.positions * y.inputs * y.outputs for y in workload.layers if not y.reads_data
    )
    factors = sum(
        2 * y.positions * ((y.inputs + 1) ** 2 + pulled * y.outputs**2) for y in workload.layers
    )
    n = float(workload.num_examples)
    return {
        "forward": n * (forward + 2 * workload.other_products),
        "pullbacks": n * pulled * (pullback + 4 * workload.other_products),
        "factors": n * factors,
    }


def from_description(description: dict[str, Any]) -> Workload:
    """The workload that a JSON description names, with the sizes it gives.

    Keys: ``name``; ``examples`` and ``batch``; ``run``, the examples that a run does; ``sizes`` of
    an MLP; ``tokens`` of a transformer.
    """
    if "sizes" in description:
        workload = mlp(tuple(description["sizes"]))
    elif "tokens" in description:
        workload = transformer(description["tokens"])
    else:
        workload = WORKLOADS[description["name"]]
    return workload.sized(
        description.get("examples", workload.num_examples),
        description.get("batch", workload.batch_size),
        description.get("run"),
    )
