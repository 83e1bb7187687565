"""References to test against: dense, slow, in float64, and obviously right."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree


def per_example_gradients(
    function: Callable[[Any, Any], Any], params: Any, inputs: Any, cotangents: Any
) -> Any:
    """Pull vectors at the output of ``function(params, x)`` back to the parameters.

    Args:
        function: The model for one example.
        params: Its parameters; integer leaves have gradient zero.
        inputs: A batch of inputs, with a leading axis N.
        cotangents: Like the outputs, with leading axes (N, R).

    Returns:
        Like the parameters, with leading axes (N, R).
    """
    leaves, treedef = jax.tree.flatten(params)
    moved = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def of_one_example(example: tuple[Any, Any]) -> Any:
        x, vectors = example

        def output(values: list[Any]) -> Any:
            everything = list(leaves)
            for k, value in zip(moved, values, strict=True):
                everything[k] = value
            return function(jax.tree.unflatten(treedef, everything), x)

        _, pullback = jax.vjp(output, [leaves[k] for k in moved])

        def gradient(vector: Any) -> Any:
            # Of a complex leaf, JAX gives the derivative in the imaginary part with a minus.
            found = dict(zip(moved, map(jnp.conj, pullback(vector)[0]), strict=True))
            zeros = [jnp.zeros(leaf.shape) for leaf in leaves]
            return jax.tree.unflatten(treedef, [found.get(k, z) for k, z in enumerate(zeros)])

        return jax.vmap(gradient)(vectors)

    return lax.map(of_one_example, (inputs, cotangents))


# -- curvature as dense matrices, in laplax's flat order ---------------------------------------


def _cross_entropy(f: Any, y: Any) -> Any:
    if y.shape == f.shape:  # probabilities
        return -jnp.sum(y * jax.nn.log_softmax(f))
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(f), y[..., None], axis=-1))


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "mse": lambda f, y: jnp.sum((f - y) ** 2),
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": lambda f, y: jnp.sum(jnp.log1p(jnp.exp(f)) - y * f),
}
"""Losses of one example, from their definitions."""


@functools.partial(jax.jit, static_argnums=(0, 3))
def _ggn_and_fisher(
    model_fn: Callable[..., Any], params: Any, data: tuple[Any, Any], loss: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    flat, unravel = ravel_pytree(params)

    def one(x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
        f, unravel_output = ravel_pytree(model_fn(input=x, params=params))
        jacobian = jax.jacrev(lambda v: ravel_pytree(model_fn(input=x, params=unravel(v)))[0])(flat)
        hessian = jax.hessian(lambda v: loss(unravel_output(v), y))(f)
        gradient = jacobian.T @ jax.grad(lambda v: loss(unravel_output(v), y))(f)
        return jacobian.T @ hessian @ jacobian, jnp.outer(gradient, gradient)

    ggn, fisher = jax.vmap(one)(*data)
    return ggn.sum(axis=0), fisher.sum(axis=0)


def dense_ggn(model_fn: Callable[..., Any], params: Any, data: Any, loss: Any) -> jax.Array:
    """sum_n J_n^T H_n J_n, with J_n by reverse mode and H_n the Hessian of the loss."""
    return _ggn_and_fisher(model_fn, params, data, LOSSES.get(loss, loss))[0]


def dense_empirical_fisher(
    model_fn: Callable[..., Any], params: Any, data: Any, loss: Any
) -> jax.Array:
    """sum_n g_n g_n^T, with g_n the gradient of example n's loss at its target."""
    return _ggn_and_fisher(model_fn, params, data, LOSSES.get(loss, loss))[1]


def block_mask(params: Any, groups: Iterable[Iterable[str]]) -> np.ndarray:
    """True where two parameters are in leaves of the same group; leaves by their key paths."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    group_of = {path: number for number, group in enumerate(groups) for path in group}
    owner = np.concatenate(
        [np.full(leaf.size, group_of[jax.tree_util.keystr(path)]) for path, leaf in leaves]
    )
    return owner[:, None] == owner[None, :]


def laplax_full(model_fn: Callable[..., Any], params: Any, data: Any, loss: str) -> jax.Array:
    """The GGN matrix as laplax's own curvature type "full" has it."""
    return laplax.laplace(model_fn, params, data, loss_fn=loss, curv_type="full")[1]


def sizes(jaxpr: Any) -> Iterator[int]:
    """Numbers of entries of all intermediates, those of loops and calls included."""
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(variable.aval.shape)) for variable in eqn.outvars)
        parameters = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
        )
        for inner in parameters:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)
