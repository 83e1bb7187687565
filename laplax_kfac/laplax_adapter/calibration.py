"""A calibration method for laplax: descent on the log prior precision.

laplax's own, a grid search, finds one number for all parameters, as near as the grid is fine.
"""

from collections.abc import Callable

from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import listed, nearest, no_type_check
from laplax_kfac.evidence.minimisation import minimise
from laplax_kfac.laplax_adapter.curvature_types import PriorArguments

OPTIONS = ("steps", "bounds", "tolerance")


@no_type_check
def calibrate(
    objective: Callable[[PriorArguments, PyTree], Float[Array, ""]],
    data: PyTree,
    prior_arguments: PriorArguments | None = None,
    **options: float | int | tuple[float, float],
) -> dict[str, PyTree]:
    """Calibration method ``"tune"`` of `laplax.calibration`: L-BFGS on the log prior precision.

    With the marginal likelihood as its objective, and one of our curvature types, it finds the
    prior precision that `tune` finds: where laplax's evidence differs, it does so by constants.

    Args:
        objective: laplax's objective, of prior arguments and data; a differentiable one.
        data: The data that laplax passes on.
        prior_arguments: Where to start, ``{"prior_prec": 1.0}`` by default; ``prior_prec`` may
            have any form that the curvature type takes, and other arguments stay as they are.
        **options: Those of `laplax_kfac.evidence.tuning.minimise`.

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

    found, _ = minimise(of_precision, start["prior_prec"], **options)  # type: ignore[arg-type]
    return {**start, "prior_prec": found}
