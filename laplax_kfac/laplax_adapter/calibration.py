"""A calibration method for laplax: descent on the log prior precision.

laplax's own, a grid search, finds one number for all parameters, as near as the grid is fine.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import listed, nearest, no_type_check
from laplax_kfac.evidence.minimisation import minimise
from laplax_kfac.evidence.notices import warn_at_bounds
from laplax_kfac.evidence.problem import DEFAULT_BOUNDS
from laplax_kfac.laplax_adapter.curvature_types import PriorArguments

OPTIONS = ("steps", "bounds", "tolerance")


@no_type_check
def calibrate(
    objective: Callable[[PriorArguments, PyTree], Float[Array, ""]],
    data: PyTree,
    prior_arguments: PriorArguments | None = None,
    **options: Any,
) -> dict[str, PyTree]:
    """Calibration method ``"tune"`` of `laplax.calibration`: L-BFGS on the log prior precision.

    With the marginal likelihood as its objective, and one of our curvature types, it finds the
    prior precision that `tune` finds: where laplax's evidence differs, it does so by constants.

    Args:
        objective: laplax's objective, of prior arguments and data; a differentiable one.
        data: The data that laplax passes on.
        prior_arguments: Where to start, ``{"prior_prec": 1.0}`` by default; ``prior_prec`` may
            have any form that the curvature type takes, and other arguments stay as they are.
        **options: Those of `laplax_kfac.evidence.minimisation.minimise`.

    Warns:
        BoundaryWarning: If a value ends at a bound.
        UserWarning: If the optimum was not found.

    Returns:
        The prior arguments.

    Raises:
        TypeError: If there is no option of a name.
        ValueError: If an option has no sense, or the start is not positive.
    """
    for name in options:
        if name not in OPTIONS:
            msg = (
                f"`{name}` is no option of calibration method 'tune', which takes "
                f"{listed(OPTIONS)}.{nearest(name, OPTIONS)}"
            )
            raise TypeError(msg)
    start = {"prior_prec": 1.0} if prior_arguments is None else dict(prior_arguments)

    def of_precision(prior_prec: PyTree) -> Float[Array, ""]:
        return objective({**start, "prior_prec": prior_prec}, data)

    found, converged = minimise(of_precision, start["prior_prec"], **options)
    bounds = options.get("bounds", DEFAULT_BOUNDS)
    low, high = bounds
    at_bound = jax.tree.map(lambda v: (v <= low * 1.001) | (v >= high / 1.001), found)
    warn_at_bounds({"prior_prec": at_bound}, bounds, "objective")
    if not converged:
        msg = (
            'calibration_method="tune" ended before the optimum was found, or where the objective '
            "is not a number: the prior precision is the best one seen. Raise `steps`, or pass "
            "`prior_arguments` with a start nearby."
        )
        warnings.warn(msg, UserWarning, stacklevel=2)
    return {**start, "prior_prec": found}
