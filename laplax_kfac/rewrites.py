"""Equations evaluated in a form with the same value and derivative, and a cheaper pullback.

One forward pass serves R pullbacks, so what all columns share is better computed once. JAX pulls
back through max pooling by a search for the maximum of every window; here the forward pass marks
the maxima, and the pullback multiplies with the marks. Convolutions of few channels, which XLA
spends on copies on a CPU, become matrix products along whole rows of an image.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import Array, Bool, Float

from laplax_kfac import jaxprs

_LARGEST_WINDOW = 64
"""Entries of the largest window that is unrolled."""


Evaluate = Callable[[Sequence[Any]], list[Any]]


def rewrite(eqn: JaxprEqn, *, layer: bool = False) -> Evaluate | None:
    """How to evaluate an equation at the values of its operands, where there is a better way.

    Args:
        eqn: The equation.
        layer: Whether it is a layer's: then its weight is the same for all examples.
    """
    if eqn.primitive.name == "reduce_window_max":
        return _max_pooling(eqn)
    if eqn.primitive.name == "conv_general_dilated" and layer:
        return _convolution(eqn)
    return None


def has_rewrite(jaxpr: Jaxpr) -> bool:
    """Whether there is a better way for an equation here, or in a body that a walk enters."""
    return any(
        rewrite(eqn) is not None or any(has_rewrite(body) for body in jaxprs.bodies(eqn))
        for eqn in jaxpr.eqns
    )


# -- max pooling -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Windows:
    """Windows that move over an array; one entry an axis.

    Attributes:
        size: Entries of a window.
        strides: Steps from one window to the next.
        padding: Entries added before and after.
        dilation: Steps from one entry of a window to the next.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def are_tiles(self) -> bool:
        """Whether no entry is in two windows, or between two."""
        plain = set(self.dilation) == {1} and set(self.padding) == {(0, 0)}
        return plain and self.size == self.strides


def _max_pooling(eqn: JaxprEqn) -> Evaluate | None:
    names = ("window_dimensions", "window_strides", "padding", "window_dilation")
    windows = _Windows(*(tuple(eqn.params[name]) for name in names))
    spread = set(eqn.params["base_dilation"]) != {1}
    cropped = any(min(pair) < 0 for pair in windows.padding)
    large = math.prod(windows.size) > _LARGEST_WINDOW
    if spread or cropped or large or not jaxprs.is_inexact(eqn.outvars[0]):
        return None
    return lambda values: [_max_pool(windows, values[0])]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _max_pool(windows: _Windows, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return lax.reduce_window(
        x, -np.inf, lax.max, windows.size, windows.strides, windows.padding,
        window_dilation=windows.dilation,
    )  # fmt: skip


@_max_pool.defjvp
def _max_pool_jvp(
    windows: _Windows, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """The tangent of a window is that of its first maximum, as JAX has it."""
    (x,), (tangent,) = primals, tangents
    y = _max_pool(windows, x)
    firsts = _first_maxima(_entries(windows, x, -np.inf, y.shape), y)
    if windows.are_tiles():
        return y, _sum_over_tiles(windows, tangent, firsts)
    moved = _entries(windows, tangent, 0.0, y.shape)
    terms = [jnp.where(first, t, 0) for first, t in zip(firsts, moved, strict=True)]
    return y, functools.reduce(jnp.add, terms)


def _entries(
    windows: _Windows, x: Float[Array, "..."], fill: float, shape: tuple[int, ...]
) -> list[Float[Array, "..."]]:
    """The entries of all windows, an array like the output for every place in a window."""
    padded = lax.pad(x, x.dtype.type(fill), [(*pair, 0) for pair in windows.padding])
    spans = [(n - 1) * stride + 1 for n, stride in zip(shape, windows.strides, strict=True)]
    entries = []
    for place in np.ndindex(*windows.size):
        start = [k * step for k, step in zip(place, windows.dilation, strict=True)]
        stop = [s + span for s, span in zip(start, spans, strict=True)]
        entries.append(lax.slice(padded, start, stop, windows.strides))
    return entries


def _first_maxima(
    entries: Sequence[Float[Array, "..."]], maximum: Float[Array, "..."]
) -> list[Bool[Array, "..."]]:
    taken, firsts = jnp.zeros(maximum.shape, bool), []
    for entry in entries:
        firsts.append((entry == maximum) & ~taken)
        taken = taken | firsts[-1]
    return firsts


def _sum_over_tiles(
    windows: _Windows, x: Float[Array, "..."], masks: Sequence[Bool[Array, "..."]]
) -> Float[Array, "..."]:
    """Sum over every window of what its mask keeps; transposed, it repeats and masks."""
    shape = masks[0].shape
    tiled = [n for pair in zip(shape, windows.size, strict=True) for n in pair]
    whole = [n * w for n, w in zip(shape, windows.size, strict=True)]
    mask = jnp.stack(masks).reshape(*windows.size, *shape)
    mask = mask.transpose([a for d in range(x.ndim) for a in (x.ndim + d, d)])
    tiles = lax.slice(x, [0] * x.ndim, whole).reshape(tiled)
    return jnp.sum(jnp.where(mask, tiles, 0), axis=range(1, 2 * x.ndim, 2))


# -- convolution -------------------------------------------------------------------------------


def _convolution(eqn: JaxprEqn) -> Evaluate | None:
    """A convolution of images as a product along their rows, where that is cheaper on a CPU."""
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    groups = params["feature_group_count"] * params["batch_group_count"]
    plain = groups == 1 and set(params["lhs_dilation"]) == {1}
    if len(spec.lhs_spec) != 4 or not plain or min(map(min, params["padding"])) < 0:
        return None
    if jax.default_backend() != "cpu" or not _rows_are_cheaper(eqn):
        return None
    return lambda values: [_row_convolution(eqn, *values)]


def _rows_are_cheaper(eqn: JaxprEqn) -> bool:
    """Compare estimates of the pullback's time, in nanoseconds an example.

    XLA copies the patches of the cotangent; that takes longer than the product with few channels
    to pull back to. With whole rows as channels the product is larger, and takes most of the time.
    """
    spec = eqn.params["dimension_numbers"]
    _, inputs, height, width = (jaxprs.shape(eqn.invars[0])[d] for d in spec.lhs_spec)
    _, outputs, _, columns = (jaxprs.shape(eqn.outvars[0])[d] for d in spec.out_spec)
    *_, kernel_rows, kernel_columns = (jaxprs.shape(eqn.invars[1])[d] for d in spec.rhs_spec)
    copied = 0.6 * height * width * kernel_rows * kernel_columns * outputs
    products = height * kernel_rows * columns * outputs * (0.6 + width * inputs / 70)
    return products < 0.7 * copied


def _row_convolution(eqn: JaxprEqn, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Array:
    """A convolution over the rows, with all channels of all columns of a row as its channels."""
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    x = x.transpose([spec.lhs_spec[k] for k in (0, 2, 3, 1)])  # (batch, height, width, in)
    kernel = kernel.transpose([spec.rhs_spec[k] for k in (2, 3, 1, 0)])
    *_, rows, columns = (jaxprs.shape(eqn.outvars[0])[d] for d in spec.out_spec)
    y = lax.conv_general_dilated(
        x.reshape(*x.shape[:2], -1),
        _row_kernel(params, kernel, x.shape[2], columns),
        params["window_strides"][:1],
        params["padding"][:1],
        rhs_dilation=params["rhs_dilation"][:1],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    ).reshape(x.shape[0], rows, columns, -1)
    return y.transpose(np.argsort([spec.out_spec[k] for k in (0, 2, 3, 1)]))


def _row_kernel(
    params: dict[str, Any], kernel: Float[Array, "h w in out"], width: int, columns: int
) -> Float[Array, "h wide_in wide_out"]:
    """(kernel row; column, channel of an input row; column, channel of an output row)."""
    kernel_rows, kernel_columns, inputs, outputs = kernel.shape
    units = jnp.eye(width * inputs, dtype=kernel.dtype).reshape(-1, width, inputs)
    responses = lax.conv_general_dilated(
        units,
        kernel.transpose(1, 2, 0, 3).reshape(kernel_columns, inputs, kernel_rows * outputs),
        params["window_strides"][1:],
        params["padding"][1:],
        rhs_dilation=params["rhs_dilation"][1:],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=lax.Precision.HIGHEST,
    ).reshape(-1, columns, kernel_rows, outputs)
    return responses.transpose(2, 0, 1, 3).reshape(kernel_rows, width * inputs, -1)
