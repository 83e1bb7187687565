"""Convolutions of any rank, layout, stride, padding, dilation and number of groups.

A convolution is a dense layer of patches: position t of the output is the product of the kernel,
a matrix ``(in = places of the kernel x channels, out)``, with the patch of the input that the
kernel lies on there. A group of channels is an entry of the stack.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Shaped

from laplax_kfac import jaxprs, machine
from laplax_kfac.gram import Symmetric
from laplax_kfac.patterns import correlation, patches
from laplax_kfac.patterns.contract import Entries, Inputs, Moments, Operands, Pattern, register


def operands(eqn: JaxprEqn) -> tuple[int, ...]:
    """Which operands may be the weight."""
    # A convolution with batch groups sums over examples: it arises from derivatives, not layers.
    if eqn.params["batch_group_count"] != 1:
        return ()
    return (0, 1) if eqn.params["feature_group_count"] == 1 else (1,)


def weight(eqn: JaxprEqn, operand: int, w: Entries) -> Entries:
    """The weight as ``(stack, in, out)``."""
    groups = eqn.params["feature_group_count"]
    if operand == 0:  # jnp.convolve exchanges its arguments: the weight is moved over the data
        w = w.transpose(eqn.params["dimension_numbers"].lhs_spec)  # (batch, in, *space)
        return w.reshape(1, w.shape[0], math.prod(w.shape[1:])).transpose(0, 2, 1)
    out, features, *kernel = eqn.params["dimension_numbers"].rhs_spec
    w = w.transpose(out, *kernel, features)  # (out, *kernel, in / groups)
    return w.reshape(groups, w.shape[0] // groups, math.prod(w.shape[1:])).transpose(0, 2, 1)


def inputs(eqn: JaxprEqn, operand: int, others: Operands) -> Inputs:
    """Layer inputs ``(positions, stack, in)``."""
    (x,), groups = others, eqn.params["feature_group_count"]
    if operand == 0:
        return _responses(eqn, x)
    x = _channels_last(eqn, x)
    # Groups in front of patches: then each group has its own.
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 1)
    found = patches.extract(_axes(eqn), x, first=2)  # (batch, groups, *positions, in)
    found = jnp.moveaxis(found, 1, -2)
    return found.reshape(math.prod(found.shape[:-2]), *found.shape[-2:])


def _channels_last(
    eqn: JaxprEqn, x: Shaped[Array, "..."]
) -> Shaped[Array, "batch *space channels"]:
    """Images as (batch, *space, channels)."""
    batch, features, *space = eqn.params["dimension_numbers"].lhs_spec
    return x.transpose(batch, *space, features)


def _axes(eqn: JaxprEqn) -> tuple[patches.Axis, ...]:
    """The patches that a convolution applies its kernel to."""
    params = eqn.params
    image, kernel = (
        [jaxprs.shape(atom)[d] for d in spec[2:]]
        for atom, spec in zip(eqn.invars, params["dimension_numbers"], strict=False)
    )
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    options = (params[name] for name in names)
    return tuple(patches.Axis(*axis) for axis in zip(image, kernel, *options, strict=True))


def moments(eqn: JaxprEqn, operand: int) -> Moments | None:
    """Sums over the inputs by correlation of images, where that is cheaper."""
    axes = _axes(eqn)
    plain = operand == 1 and eqn.params["feature_group_count"] == 1
    if not plain or _work(eqn, axes) < machine.MACHINE.least_moment_work:
        return None
    if jax.default_backend() != "cpu" or not patches.has_cheap_moment(axes):
        return None

    def of_examples(others: Operands, weights: Float[Array, " N"]) -> tuple[Symmetric, Array]:
        (x,) = others
        summed = jnp.tensordot(weights, x, 1, precision=lax.Precision.HIGHEST)
        total = inputs(eqn, operand, (summed,))
        images = jax.vmap(lambda x: _channels_last(eqn, x))(x)
        weights = jnp.repeat(weights, images.shape[1])
        images = images.reshape(-1, *images.shape[2:])
        cheaper = correlation.is_cheaper(axes, images.shape)
        second_moment = correlation.second_moment if cheaper else patches.second_moment
        second: Symmetric = second_moment(axes, images, weights)
        return jax.tree.map(lambda part: part[None], second), jnp.sum(total, axis=0)

    return of_examples


def _work(eqn: JaxprEqn, axes: Sequence[patches.Axis]) -> int:
    """Multiply-adds an image in the products of its patches with themselves."""
    spec = eqn.params["dimension_numbers"].rhs_spec
    entries = math.prod(jaxprs.shape(eqn.invars[1])[d] for d in spec[1:])
    return math.prod(axis.positions for axis in axes) * entries**2


def _responses(eqn: JaxprEqn, x: Shaped[Array, "..."]) -> Shaped[Array, "positions 1 in"]:
    """Inputs of a weight on the left: what each of its entries alone would put out."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    features, *space = (jaxprs.shape(eqn.invars[0])[d] for d in numbers.lhs_spec[1:])
    entries = features * math.prod(space)
    units = jnp.eye(entries, dtype=x.dtype).reshape(entries, features, *space)
    names = ("lhs_dilation", "rhs_dilation", "window_strides", "padding")
    responses = lax.conv_general_dilated(
        units,
        x.transpose(numbers.rhs_spec),
        precision=lax.Precision.HIGHEST,
        **{name: params[name] for name in names},
    )  # (entries, out, *space)
    return responses.reshape(entries, -1).T[:, None, :]


def outputs(eqn: JaxprEqn, operand: int, y: Entries) -> Entries:
    """The output as ``(positions, stack, out)``."""
    y = y.transpose(eqn.params["dimension_numbers"].out_spec)
    if operand == 0:
        return y.reshape(y.shape[0], math.prod(y.shape[1:])).transpose(1, 0)[:, None, :]
    return _channels_last_by_group(y, eqn.params["feature_group_count"])


def _channels_last_by_group(x: Entries, groups: int) -> Entries:
    """(batch, channels, *space) -> (batch x space, groups, channels / groups)."""
    batch, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    x = x.reshape(batch, groups, channels // groups, space).transpose(0, 3, 1, 2)
    return x.reshape(batch * space, groups, channels // groups)


CONV = Pattern("conv", operands, weight, inputs, outputs, moments=moments)


register("conv_general_dilated", CONV)
