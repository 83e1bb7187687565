"""Equations evaluated in a form with the same value and derivative, and a cheaper pullback.

One forward pass serves R pullbacks, so what all columns share is better computed once. JAX pulls
back through max pooling by a search for the maximum of every window; here the forward pass marks
the maxima, and the pullback multiplies with the marks. Convolutions of few channels, which XLA
spends on copies on a CPU, become matrix products along whole rows of an image.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import Array, Float, Int

from laplax_kfac import jaxprs

_LARGEST_WINDOW = 64
"""Entries of the largest window that is unrolled."""
_MOST_PHASES = 16
"""Convolutions that one with strides is taken apart to."""


Evaluate = Callable[[Sequence[Any]], list[Any]]


def rewrite(eqn: JaxprEqn, *, layer: bool = False) -> Evaluate | None:
    """How to evaluate an equation at the values of its operands, where there is a better way.

    Args:
        eqn: The equation.
        layer: Whether it is a layer's: then its weight is the same for all examples.
    """
    if eqn.primitive.name == "reduce_window_max":
        return _max_pooling(eqn)
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution(eqn, layer=layer)
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


# -- convolution -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """Options of a convolution, as JAX has them."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    precision: Any
    preferred_element_type: Any

    @classmethod
    def of(cls, params: dict[str, Any]) -> "_Options":
        """Those of an equation."""
        return cls(**{field.name: params[field.name] for field in fields(cls)})

    def along(self, axis: int) -> "_Options":
        """Those along one axis of space."""
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        return replace(self, **{name: (getattr(self, name)[axis],) for name in names})


def _convolution(eqn: JaxprEqn, *, layer: bool) -> Evaluate | None:
    """A convolution in a form that a CPU does well, in a loop too."""
    params = eqn.params
    groups = params["feature_group_count"] * params["batch_group_count"]
    if groups > 1 or jax.default_backend() != "cpu" or not jaxprs.is_inexact(eqn.outvars[0]):
        return None
    along_rows = layer and _has_rows(eqn) and _rows_are_cheaper(eqn)
    convolve = functools.partial(_row_convolution if along_rows else _convolve, _Options.of(params))
    (batch, features, *space), (out, into, *kernel), y_spec = params["dimension_numbers"]

    def evaluate(values: Sequence[Any]) -> list[Any]:
        x, w = values
        y = convolve(x.transpose(batch, *space, features), w.transpose(*kernel, into, out))
        return [y.transpose(np.argsort([y_spec[0], *y_spec[2:], y_spec[1]]))]

    return evaluate


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _convolve(
    options: _Options, x: Float[Array, "n *space in"], kernel: Float[Array, "*window in out"]
) -> Float[Array, "n *positions out"]:
    """A convolution whose pullback has its kernel in the layout that XLA has a fast product for.

    In the body of a loop, XLA leaves a kernel as it is, and moves over the images by plain loops.
    The pullback exchanges the kernel's last axes; so they are exchanged before.
    """
    return _convolve_plainly(options, x, kernel)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(
    options: _Options, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve(options, x, kernel)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_convolve_by_phases(options, dx, kernel.swapaxes(-1, -2)))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(_convolve_plainly(options, x, dkernel))
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


def _convolve_by_phases(
    options: _Options, x: Float[Array, "n *space in"], kernel: Float[Array, "*window out in"]
) -> Float[Array, "n *positions out"]:
    """With strides, a sum of convolutions without, of entries of the images a stride apart.

    So are the pullbacks then, where XLA would spread the cotangent by zeros and move over these.
    """
    strides = options.window_strides
    spread = {*options.lhs_dilation, *options.rhs_dilation} != {1}
    if not 1 < math.prod(strides) <= _MOST_PHASES or spread:
        return _convolve_plainly(options, x, kernel, exchanged=True)
    positions = jax.eval_shape(
        functools.partial(_convolve_plainly, options, exchanged=True), x, kernel
    ).shape[1:-1]
    phases: dict[tuple[int, ...], Array] = {(): x}
    for axis, stride in enumerate(strides):
        phases = {
            (*phase, k): part
            for phase, entries in phases.items()
            for k, part in enumerate(_every(stride, entries, axis + 1))
        }
    terms = []
    for phase, entries in phases.items():
        places, padding = [], []
        for k, stride, (before, _), window, size, count in zip(
            phase,
            strides,
            options.padding,
            kernel.shape,
            entries.shape[1:],
            positions,
            strict=False,
        ):
            first = (k + before) % stride  # of the window's places that meet these entries
            steps = len(range(first, window, stride))
            least = (first - before - k) // stride
            places.append(slice(first, None, stride))
            padding.append((-least, count - 1 + least + steps - size))
        part = kernel[tuple(places)]
        if part.size:
            plain = replace(options, window_strides=(1,) * len(strides), padding=tuple(padding))
            terms.append(_convolve_plainly(plain, entries, part, exchanged=True))
    return functools.reduce(jnp.add, terms)


def _every(stride: int, x: Float[Array, "..."], axis: int) -> list[Float[Array, "..."]]:
    """Entries a stride apart along an axis, from each of the first; zeros fill the last ones up."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (0, -x.shape[axis] % stride, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    x = x.reshape(*x.shape[:axis], -1, stride, *x.shape[axis + 1 :])
    return [part.squeeze(axis + 1) for part in jnp.split(x, stride, axis + 1)]


def _convolve_plainly(
    options: _Options, x: Array, kernel: Array, *, exchanged: bool = False
) -> Array:
    last = x.ndim - 1
    space = tuple(range(last - 1))
    images = (0, last, *(axis + 1 for axis in space))
    channels = (last - 1, last) if exchanged else (last, last - 1)
    numbers = lax.ConvDimensionNumbers(images, (*channels, *space), images)
    options_by_name = {field.name: getattr(options, field.name) for field in fields(options)}
    return lax.conv_general_dilated(x, kernel, **options_by_name, dimension_numbers=numbers)


def _has_rows(eqn: JaxprEqn) -> bool:
    """Whether it is one of plain images, not cropped and without zeros between their entries."""
    params = eqn.params
    plain = set(params["lhs_dilation"]) == {1}
    return len(params["window_strides"]) == 2 and plain and min(map(min, params["padding"])) >= 0


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


def _row_convolution(
    options: _Options, x: Float[Array, "n height width in"], kernel: Float[Array, "h w in out"]
) -> Float[Array, "n rows columns out"]:
    """A convolution over the rows, with all channels of all columns of a row as its channels."""
    rows = x.reshape(*x.shape[:2], -1)
    y = _convolve(options.along(0), rows, _row_kernel(options.along(1), kernel, x.shape[2]))
    return y.reshape(*y.shape[:2], -1, kernel.shape[-1])


def _row_kernel(
    options: _Options, kernel: Float[Array, "h w in out"], width: int
) -> Float[Array, "h wide_in wide_out"]:
    """(kernel row; column, channel of an input row; column, channel of an output row)."""
    kernel_rows, kernel_columns, inputs, outputs = kernel.shape
    units = jnp.eye(width * inputs, dtype=kernel.dtype).reshape(-1, width, inputs)
    columns_first = kernel.transpose(1, 2, 0, 3).reshape(kernel_columns, inputs, -1)
    exact = replace(options, precision=lax.Precision.HIGHEST, preferred_element_type=None)
    responses = _convolve_plainly(exact, units, columns_first)
    responses = responses.reshape(len(units), -1, kernel_rows, outputs)
    return responses.transpose(2, 0, 1, 3).reshape(kernel_rows, width * inputs, -1)
