"""Pictures of curvature: needs matplotlib, the extra ``plot``. Each returns its axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from laplax_kfac.blocks import BlockDiagonal, apply
from laplax_kfac.tuning import Tuned


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        msg = "laplax_kfac.plotting needs matplotlib: pip install 'laplax-kfac[plot]'."
        raise ImportError(msg) from error
    return plt.subplots(layout="constrained")[1]


def _layer_number(curvature: BlockDiagonal, layer: str) -> int:
    names = [entry.name for entry in curvature.layers]
    if layer not in names:
        msg = f"`layer` is {layer!r}; the curvature has the layers {names}."
        raise ValueError(msg)
    return names.index(layer)


def block_matrix(curvature: BlockDiagonal, layer: str) -> Float[Array, "p p"]:
    """One layer's block as a dense matrix, over its (rows, out) matrix raveled.

    Raises:
        ValueError: If there is no such layer.
    """
    number = _layer_number(curvature, layer)
    block, record = curvature.blocks[number], curvature.layers[number]
    eye = jnp.eye(record.size).reshape(record.size, *record.shape)
    return jax.vmap(lambda v: apply(block, v))(eye).reshape(record.size, record.size)


def plot_block(curvature: BlockDiagonal, layer: str, *, axes: Any = None) -> Any:
    """Image of one layer's block; the colour scale is logarithmic in the entries' size.

    Args:
        curvature: The curvature, or a posterior's precision.
        layer: Name of the layer.
        axes: Where to draw; a new figure by default.

    Raises:
        ValueError: If there is no such layer.
    """
    axes = _axes(axes)
    from matplotlib.colors import SymLogNorm

    matrix = np.asarray(block_matrix(curvature, layer))
    top = float(np.abs(matrix).max(initial=0.0)) or 1.0
    norm = SymLogNorm(linthresh=1e-3 * top, vmin=-top, vmax=top)
    image = axes.imshow(matrix, norm=norm, cmap="RdBu_r", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    axes.set_title(f"{layer}: {curvature.layers[_layer_number(curvature, layer)].block}")
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def plot_spectrum(curvature: BlockDiagonal, *, axes: Any = None) -> Any:
    """Eigenvalues of every block in descending order, one line a layer.

    Args:
        curvature: The curvature, or a posterior's precision.
        axes: Where to draw; a new figure by default.
    """
    axes = _axes(axes)
    for block, layer in zip(curvature.blocks, curvature.layers, strict=True):
        values = np.sort(np.asarray(block.eigenvalues).ravel())[::-1]
        positive = values[values > 0]
        if positive.size:
            axes.plot(np.linspace(0, positive.size / values.size, positive.size), positive,
                      label=layer.name)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("fraction of the block's eigenvalues")
    axes.set_ylabel("eigenvalue")
    if axes.get_lines():
        axes.legend()
    return axes


def plot_evidence(tuned: Tuned, *, axes: Any = None) -> Any:
    """Evidence over the steps of `tune`.

    Args:
        tuned: What `tune` returned.
        axes: Where to draw; a new figure by default.
    """
    axes = _axes(axes)
    axes.plot(np.asarray(tuned.trace))
    axes.set_xlabel("step")
    axes.set_ylabel("log marginal likelihood")
    return axes
