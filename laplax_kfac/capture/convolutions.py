"""Convolutions whose pullbacks are products that XLA is fast at: by phases, or by whole rows."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float

from laplax_kfac import jaxprs, machine
from laplax_kfac.jaxprs import Evaluate, Value


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


def convolution(eqn: JaxprEqn, *, layer: bool) -> Evaluate | None:
    """A convolution in a form that a CPU does well, in a loop too."""
    params = eqn.params
    groups = params["feature_group_count"] * params["batch_group_count"]
    if groups > 1 or jax.default_backend() != "cpu" or not jaxprs.is_inexact(eqn.outvars[0]):
        return None
    along_rows = layer and _has_rows(eqn) and _rows_are_cheaper(eqn)
    convolve = functools.partial(_row_convolution if along_rows else _convolve, _Options.of(params))
    (batch, features, *space), (out, into, *kernel), y_spec = params["dimension_numbers"]

    def evaluate(values: Sequence[Value]) -> list[Value]:
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
    if not 1 < math.prod(strides) <= machine.MACHINE.most_phases or spread:
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
            # With stride s, position p meets entry p s + w - before through place w of the window.
            # Entries j s + k are met by places w = k + before (mod s), that is first + i s, and
            # then j = p + i + least: phase k is a convolution of stride one of its entries with
            # these places, from entry `least` on.
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
    tuned = machine.MACHINE
    spec = eqn.params["dimension_numbers"]
    _, inputs, height, width = (jaxprs.shape(eqn.invars[0])[d] for d in spec.lhs_spec)
    _, outputs, _, columns = (jaxprs.shape(eqn.outvars[0])[d] for d in spec.out_spec)
    *_, kernel_rows, kernel_columns = (jaxprs.shape(eqn.invars[1])[d] for d in spec.rhs_spec)
    copied = tuned.copied_patch * height * width * kernel_rows * kernel_columns * outputs
    products = (
        height
        * kernel_rows
        * columns
        * outputs
        * (tuned.row_entry + width * inputs / tuned.row_products)
    )
    return products < tuned.row_margin * copied


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
    # A convolution of one row is linear: its matrix, by the responses to unit vectors. Each row of
    # the kernel gives one such matrix, and they are what is convolved along the height.
    kernel_rows, kernel_columns, inputs, outputs = kernel.shape
    units = jnp.eye(width * inputs, dtype=kernel.dtype).reshape(-1, width, inputs)
    columns_first = kernel.transpose(1, 2, 0, 3).reshape(kernel_columns, inputs, -1)
    exact = replace(options, precision=lax.Precision.HIGHEST, preferred_element_type=None)
    responses = _convolve_plainly(exact, units, columns_first)
    responses = responses.reshape(len(units), -1, kernel_rows, outputs)
    return responses.transpose(2, 0, 1, 3).reshape(kernel_rows, width * inputs, -1)
