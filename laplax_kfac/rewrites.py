"""Equations evaluated in a form with the same value and derivative, and a cheaper pullback.

One forward pass serves R pullbacks, so what all columns share is better computed once. JAX pulls
back through max pooling by a search for the maximum of every window; here the forward pass marks
the maxima, and the pullback multiplies with the marks.
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


def rewrite(eqn: JaxprEqn) -> Callable[[Sequence[Any]], list[Any]] | None:
    """How to evaluate an equation at the values of its operands, where there is a better way."""
    if eqn.primitive.name == "reduce_window_max":
        return _max_pooling(eqn)
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


def _max_pooling(eqn: JaxprEqn) -> Callable[[Sequence[Any]], list[Any]] | None:
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
