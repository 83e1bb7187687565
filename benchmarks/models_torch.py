"""The workloads as torch modules, with the weights of `workloads.weights`."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from workloads import CONV8_STRIDES, HEADS, Workload, weights


def model(workload: Workload) -> nn.Module:
    """The network, its weights loaded."""
    make = {"mlp": mlp, "lenet": lenet, "conv8": conv8, "transformer": Transformer}
    params = weights(workload)
    network = make[workload.name](workload)
    modules = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for layer, module in zip(workload.layers, modules, strict=True):
            weight = params[f"{layer.name}_w"]
            if workload.name == "lenet" and layer.name == "dense0":  # rows in the order H, W, C
                weight = weight.reshape(5, 5, 16, -1).transpose(2, 0, 1, 3).reshape(400, -1)
            order = (1, 0) if weight.ndim == 2 else (3, 2, 0, 1)
            module.weight.copy_(torch.tensor(np.ascontiguousarray(weight.transpose(order))))
            module.bias.copy_(torch.tensor(params[f"{layer.name}_b"]))
    return network.eval()


def inputs(x: np.ndarray) -> Tensor:
    """Inputs in torch's layout."""
    return torch.tensor(x if x.ndim < 4 else np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def mlp(workload: Workload) -> nn.Module:
    parts: list[nn.Module] = []
    for layer in workload.layers:
        parts += [nn.Linear(*layer.weight), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def lenet(_: Workload) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def conv8(workload: Workload) -> nn.Module:
    parts: list[nn.Module] = []
    for layer, stride in zip(workload.layers, CONV8_STRIDES, strict=False):
        parts += [nn.Conv2d(*layer.weight[2:], 3, stride=stride, padding=1), nn.ReLU()]
    parts += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(*workload.layers[-1].weight)]
    return nn.Sequential(*parts)


class Transformer(nn.Module):
    """Pre-norm encoder; norms without parameters."""

    def __init__(self, workload: Workload):
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(*workload.layers[6 * i + 4].weight)
            for i in range(len(workload.layers) // 6)
        )
        self.dense = nn.Linear(*workload.layers[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.dense(functional.layer_norm(x, x.shape[-1:]).mean(dim=-2))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(x, x.shape[-1:])
        query, key, value = (
            part(y).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for part in (self.query, self.key, self.value)
        )
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        y = (logits.softmax(-1) @ value).transpose(-2, -3).flatten(-2)
        x = x + self.out(y)
        hidden = self.up(functional.layer_norm(x, x.shape[-1:])).relu()
        return x + self.down(hidden)
