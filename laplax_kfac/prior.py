"""The Gaussian prior: one precision for all parameters, one a layer, or one a group of leaves."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from laplax_kfac.blocks import BlockDiagonal

Scalar = Float[Array, ""] | float
PriorPrecision = Any
"""A scalar, an array with one value a layer, or a pytree prefix of the parameters."""


def per_block(prior_prec: PriorPrecision, matrix: BlockDiagonal) -> tuple[Scalar, ...]:
    """The prior precision of every block.

    Args:
        prior_prec: A positive scalar; or an array with one value for each layer of ``matrix`` that
            is not frozen, in their order; or a pytree prefix of the parameters, whose values hold
            for all leaves below them.
        matrix: The curvature.

    Returns:
        One scalar a block; 1 for frozen ones, which have no prior.

    Raises:
        ValueError: If it is of another shape or structure, if it is not positive, or if it differs
            between leaves that share a block.
    """
    if isinstance(prior_prec, int | float | np.generic | np.ndarray | jax.Array):
        values = _from_array(prior_prec, matrix)
    else:
        values = _from_prefix(prior_prec, matrix)
    for value in values:
        require_positive("prior_prec", value)
    return tuple(values)


def require_positive(name: str, value: Scalar) -> None:
    """Refuse a value that is not positive, as far as it is known.

    Raises:
        ValueError: If it is known and not positive.
    """
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        why = ", or the posterior is improper" if name == "prior_prec" else ""
        msg = f"`{name}` must be positive{why}; found {value}."
        raise ValueError(msg)


def log_prior(
    prior_prec: PriorPrecision, matrix: BlockDiagonal, params: PyTree
) -> Float[Array, ""]:
    """Log-density of the prior, centred at zero, at the parameters that are not frozen."""
    total = jnp.zeros(())
    blocks = zip(per_block(prior_prec, matrix), matrix.layers, matrix.read(params), strict=True)
    for value, layer, part in blocks:
        if layer.frozen:
            continue
        norm = jnp.sum(jnp.abs(part) ** 2) if jnp.issubdtype(part.dtype, jnp.inexact) else 0.0
        total = total - 0.5 * (value * norm - layer.size * jnp.log(value / (2 * jnp.pi)))
    return total


def _from_array(prior_prec: Any, matrix: BlockDiagonal) -> list[Scalar]:
    if np.ndim(prior_prec) == 0:
        return [1.0 if layer.frozen else prior_prec for layer in matrix.layers]
    free = [layer.name for layer in matrix.layers if not layer.frozen]
    if np.shape(prior_prec) != (len(free),):
        msg = (
            f"`prior_prec` has shape {np.shape(prior_prec)}, but the curvature has {len(free)} "
            f"layers ({', '.join(free)}): pass a scalar, one value a layer, or a pytree prefix of "
            "`params`."
        )
        raise ValueError(msg)
    values = iter([prior_prec[k] for k in range(len(free))])
    return [1.0 if layer.frozen else next(values) for layer in matrix.layers]


def _from_prefix(prior_prec: PyTree, matrix: BlockDiagonal) -> list[Scalar]:
    space = matrix.space
    numbers: list[Any] = list(range(len(space.shapes)))
    everything = space.unflatten(numbers)
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(prior_prec, everything))
    except ValueError as error:
        msg = (
            "`prior_prec` must be a scalar, an array with one value a layer, or a pytree prefix of "
            f"`params`, found {jax.tree.structure(prior_prec)} for {space.treedef}."
        )
        raise ValueError(msg) from error
    if any(np.ndim(leaf) != 0 for leaf in leaves):
        msg = "`prior_prec` as a pytree prefix of `params` must have scalar leaves."
        raise ValueError(msg)
    number = {path: k for k, path in enumerate(space.paths)}
    return [
        1.0 if layer.frozen else _common(layer.name, [leaves[number[p]] for p in layer.params])
        for layer in matrix.layers
    ]


def _common(name: str, values: Sequence[Scalar]) -> Scalar:
    """The value that the leaves of one block share."""
    first = values[0]
    for value in values[1:]:
        traced = isinstance(value, jax.core.Tracer) or isinstance(first, jax.core.Tracer)
        if value is not first and (traced or value != first):
            msg = (
                f"`prior_prec` differs between the parameters of layer {name!r}, which share a "
                "block; give them one value, or fit with `separate_weight_and_bias=True`."
            )
            raise ValueError(msg)
    return first
