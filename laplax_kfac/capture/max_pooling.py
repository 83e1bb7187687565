"""Max pooling whose pullback sends a cotangent to the first maximum of its window."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Int

from laplax_kfac import jaxprs, machine
from laplax_kfac.jaxprs import Evaluate


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


def max_pooling(eqn: JaxprEqn) -> Evaluate | None:
    """How to evaluate a max pooling whose windows are small enough to be unrolled."""
    names = ("window_dimensions", "window_strides", "padding", "window_dilation")
    windows = _Windows(*(tuple(eqn.params[name]) for name in names))
    spread = set(eqn.params["base_dilation"]) != {1}
    cropped = any(min(pair) < 0 for pair in windows.padding)
    large = math.prod(windows.size) > machine.MACHINE.largest_window
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
    (x,), (tangent,) = primals, tangents
    y, first = _maxima(windows, x)
    return y, _at_places(windows, tangent, first)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _maxima(
    windows: _Windows, x: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """The maximum of every window, and the place of the first of them.

    One reduction for both, which XLA does not do anew for every pullback, as it does a chain of
    comparisons.
    """
    shape = jax.eval_shape(functools.partial(_max_pool, windows), x).shape
    entries = jnp.stack(_entries(windows, x, -np.inf, shape))
    places = lax.broadcasted_iota(jnp.int8, entries.shape, 0)

    def larger(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, at), (y, other_at) = one, other
        before = (x > y) | (x != x) & ~(y != y)  # as with JAX, nothing is larger than a NaN
        ties = (x == y) | (x != x) & (y != y)
        first = before | ties & (at < other_at)
        return jnp.where(first, x, y), jnp.where(first, at, other_at)

    start = x.dtype.type(-np.inf), np.int8(np.iinfo(np.int8).max)
    y, first = lax.reduce((entries, places), start, larger, (0,))
    return y, first


@_maxima.defjvp
def _maxima_jvp(
    windows: _Windows, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Any]]:
    """The tangent of a window is that of its first maximum, as JAX has it."""
    (x,), (tangent,) = primals, tangents
    y, first = _maxima(windows, x)
    none = np.zeros(first.shape, jax.dtypes.float0)
    return (y, first), (_at_places(windows, tangent, first), none)


def _at_places(
    windows: _Windows, x: Float[Array, "..."], place: Int[Array, "..."]
) -> Float[Array, "..."]:
    """The entry of every window at a place."""
    if windows.are_tiles():
        return _sum_over_tiles(windows, x, place)
    terms = [
        jnp.where(place == number, entry, 0)
        for number, entry in enumerate(_entries(windows, x, 0.0, place.shape))
    ]
    return functools.reduce(jnp.add, terms)


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


def _sum_over_tiles(
    windows: _Windows, x: Float[Array, "..."], place: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Sum over every window of its entry at a place; transposed, it repeats and masks."""
    tiled = [n for pair in zip(place.shape, windows.size, strict=True) for n in pair]
    whole = [n * w for n, w in zip(place.shape, windows.size, strict=True)]
    places = np.arange(math.prod(windows.size), dtype=np.int8).reshape(
        [n for w in windows.size for n in (1, w)]
    )
    chosen = place.reshape([n for size in place.shape for n in (size, 1)]) == places
    tiles = lax.slice(x, [0] * x.ndim, whole).reshape(tiled)
    return jnp.sum(jnp.where(chosen, tiles, 0), axis=range(1, 2 * x.ndim, 2))
