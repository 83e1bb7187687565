"""Outputs and targets in one form: what the functions of a likelihood are made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PyTree, Shaped

from laplax_kfac.faults import NOT_FINITE

LossFunction = Callable[[PyTree, PyTree], PyTree]
"""(output, target) of one example -> loss terms."""


def times(weights: PyTree, tree: PyTree) -> PyTree:
    """Multiply along leading axes; a weight of zero gives zero, even of what is not finite."""

    def scaled(weight: ArrayLike, part: PyTree) -> PyTree:
        def one(x: Array) -> Array:
            axes = (*jnp.shape(weight), *[1] * (x.ndim - jnp.ndim(weight)))
            factor = jnp.reshape(weight, axes).astype(x.dtype)
            return jnp.where(factor == 0, jnp.zeros((), x.dtype), factor * x)

        return jax.tree.map(one, part)

    return jax.tree.map(scaled, weights, tree)


def floating(x: Any) -> Float[Array, "..."]:
    """Numbers of any kind as floating-point ones."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def total_of(tree: PyTree) -> Float[Array, ""]:
    """The sum of all entries of a pytree."""
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, tree))


def gradient_of(losses: LossFunction, f: PyTree, y: PyTree) -> PyTree:
    """Gradient of the summed loss terms in the output."""
    return jax.grad(lambda f: total_of(losses(f, y)))(f)


def real(f: PyTree) -> PyTree:
    """Outputs in at least float32: square roots and softmaxes of bfloat16 lose too much."""
    return jax.tree.map(lambda o: jnp.asarray(o, jnp.promote_types(o.dtype, jnp.float32)), f)


def one_array(f: PyTree, name: str) -> Num[Array, "..."]:
    """The only array of an output.

    Raises:
        ValueError: If there are several.
    """
    leaves = jax.tree.leaves(f)
    if len(leaves) != 1:
        msg = (
            f"`loss_fn='{name}'` needs a model with one output array, found {len(leaves)}; pass a "
            f"callable loss, or a `model_fn` that returns one array."
        )
        raise ValueError(msg)
    return jnp.asarray(leaves[0])


def like_output(f: PyTree, array: Array) -> PyTree:
    """One array as the only leaf of a pytree like the output."""
    return jax.tree.map(lambda _: array, f)


def only(y: PyTree) -> Any:
    """The only array of a target.

    Raises:
        ValueError: If there are several.
    """
    leaves = jax.tree.leaves(y)
    if len(leaves) != 1:
        msg = (
            f"An example's target must be one array, found {jax.tree.structure(y)}; pairs (target, "
            "weights) need the loss `laplax_kfac.likelihood.weighted(loss_fn)`."
        )
        raise ValueError(msg)
    return leaves[0]


def target_like(
    output: Array | np.ndarray | jax.ShapeDtypeStruct, target: Any
) -> Shaped[Array, "..."]:
    """A target in the shape of the output; axes of length one may be missing, or too many."""
    if not jax.tree_util.all_leaves([target]):
        msg = (
            "targets must have the structure of the output, which is an array here; found "
            f"{jax.tree.structure(target)}."
        )
        raise ValueError(msg)
    found, wanted = jnp.shape(target), output.shape
    if [n for n in found if n != 1] != [n for n in wanted if n != 1]:
        msg = f"targets must have the shape of the output, {wanted} an example; found {found}."
        raise ValueError(msg)
    return jnp.asarray(target).reshape(wanted)


def nonfinite_targets(f: PyTree, y: PyTree) -> dict[str, PyTree]:
    """Targets of the shape of the output that are NaN or infinite: faults of a `Likelihood`."""
    finite = jax.tree.map(lambda a, b: jnp.isfinite(target_like(a, b)), f, y)
    return {NOT_FINITE: jax.tree.map(jnp.logical_not, finite)}


def one_target_like(output: Float[Array, "..."], y: PyTree) -> Float[Array, "..."]:
    """The only array of a target in the shape and dtype of an output."""
    return target_like(output, only(y)).astype(output.dtype)
