"""What users are told of hyperparameters that the evidence should not be trusted with."""

import warnings

import jax
import numpy as np
from jaxtyping import PyTree

from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.posterior.prior import Scalar

_MOST_NAMED = 5


class BoundaryWarning(UserWarning):
    """A hyperparameter ended at a bound: the evidence has no optimum inside."""


def warn_at_bounds(at_bound: PyTree, bounds: tuple[float, float], what: str = "evidence") -> None:
    """Warn of hyperparameters that ended at a bound, each entry of an array by its index.

    Args:
        at_bound: Which did; nothing is said under ``jit``.
        bounds: The bounds.
        what: What was maximised.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(at_bound)
    if any(isinstance(flag, jax.core.Tracer) for _, flag in found):
        return
    named = []
    for path, flag in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        entries = [list(map(int, index)) for index in np.argwhere(np.asarray(flag))]
        if entries and np.ndim(flag):
            more = f", and {len(entries) - _MOST_NAMED} more" * (len(entries) > _MOST_NAMED)
            name += f" at {', '.join(map(str, entries[:_MOST_NAMED]))}{more}"
        named += [name] * bool(entries)
    if named:
        meaning = (
            "that the data speak for no weight there: the layer is pruned."
            if what == "evidence"
            else "that predictions are best with no uncertainty there."
        )
        msg = (
            f"The {what} has no optimum between {bounds[0]:g} and {bounds[1]:g} in "
            f"{'; '.join(named)}: the bound is returned. A prior precision without an upper one "
            f"means {meaning}"
        )
        warnings.warn(msg, BoundaryWarning, stacklevel=3)


def warn_of_frozen(curvature: BlockDiagonal, noise_variance: Scalar | None) -> None:
    """Warn of a noise variance that the evidence is to find beside frozen parameters."""
    frozen = sum(layer.size for layer in curvature.layers if layer.frozen)
    if noise_variance is None or not frozen:
        return
    msg = (
        f"`noise_variance` is tuned by the evidence of a curvature that leaves out {frozen} of "
        f"{curvature.space.size} parameters (`params_filter`). Where these were fitted to the same "
        "data the residuals are too small for the evidence, which knows nothing of that fit, and "
        "so is the noise. Choose it by data that were held out, with `validation`, or tune it with "
        "the curvature of all parameters."
    )
    warnings.warn(msg, UserWarning, stacklevel=3)
