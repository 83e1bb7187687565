"""Masks of subnetworks: the few parameters that shall be uncertain, chosen one by one.

A mask is a pytree of booleans like the parameters, and goes where ``params_filter`` does, with
``curvature="full"`` or ``"diagonal"``: a dense posterior over a subnetwork is often nearer to that
of the network than a diagonal over all of it (Daxberger et al. 2021, arXiv 2010.14689).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from laplax_kfac.arguments import positive_integer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.posterior.posterior import Posterior


def largest(scores: PyTree, number: int) -> PyTree:
    """A mask of the parameters with the largest scores.

    Args:
        scores: A score for every parameter: a pytree like these. Leaves of integers have none.
        number: How many parameters are chosen; of equal ones, the first.

    Returns:
        A pytree of booleans, NumPy arrays, True at as many entries.

    Raises:
        ValueError: If there are not so many, or a score is NaN.
    """
    space = ParameterSpace.of(scores)
    leaves = [np.asarray(x) for x in jax.tree.leaves(scores)]
    real = [jnp.issubdtype(dtype, jnp.floating) for dtype in space.dtypes]
    flat = np.concatenate(
        [x.ravel() if r else np.full(x.size, -np.inf) for x, r in zip(leaves, real, strict=True)]
    )
    most = sum(x.size for x, r in zip(leaves, real, strict=True) if r)
    if positive_integer("number", number) > most:
        msg = f"`number` is {number}, but there are {most} parameters to choose from."
        raise ValueError(msg)
    if np.isnan(flat).any():
        msg = "a score is NaN: there is no order among the parameters."
        raise ValueError(msg)
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:number]] = True
    parts = np.split(chosen, space.offsets[1:-1])
    shaped = [p.reshape(s) for p, s in zip(parts, space.shapes, strict=True)]
    return jax.tree.unflatten(space.treedef, shaped)


def largest_magnitude(params: PyTree, number: int) -> PyTree:
    """A mask of the parameters that are farthest from zero.

    Args:
        params: The parameters.
        number: How many are chosen.
    """
    inexact = lambda p: jnp.issubdtype(jnp.result_type(p), jnp.inexact)  # noqa: E731
    return largest(jax.tree.map(lambda p: abs(p) if inexact(p) else p, params), number)


def largest_variance(posterior: Posterior, number: int) -> PyTree:
    """A mask of the parameters that are most uncertain: with the largest marginal variance.

    Args:
        posterior: A posterior of all parameters, as from ``curvature="diagonal"`` or `kfac`.
        number: How many are chosen.
    """
    return largest(posterior.covariance_diagonal(), number)
