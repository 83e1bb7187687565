"""Registering our curvature types with laplax, which importing the package does."""

import warnings

import laplax.api
import laplax.eval.pushforward
import laplax.register

from laplax_kfac.laplax_adapter import (
    closed_form,
    grid_search,
    output_covariance,
    predictions,
    problem,
    rebinding,
    requirements,
    spelling,
)
from laplax_kfac.laplax_adapter import curvature_types as types
from laplax_kfac.laplax_adapter.calibration import calibrate

FOR_SPEED = (
    (laplax.eval.pushforward, "get_dist_state", closed_form.distribution_state),
    (laplax.eval.pushforward, "set_output_mv", closed_form.output_products),
    (laplax.api, "set_lin_pushforward", predictions.linearised_pushforward),
    (laplax.api, "evaluate_metrics_on_dataset", predictions.metrics_on_dataset),
    (laplax.api, "_build_calibration_objective", grid_search.calibration_objective),
)
"""Names of laplax that are bound to something of ours for the closed-form predictive."""

GRID_SEARCH = "grid_search"


def register() -> None:
    """Register our curvature types with laplax; importing `laplax_kfac` does it.

    Doing it again is harmless.

    Raises:
        ImportError: If laplax is too old, or lacks what the registration needs.
    """
    requirements.require()
    laplax.api.calibration_options["tune"] = calibrate  # as laplax.register does, which logs it
    for name in types.CURVATURE_TYPES:
        laplax.register.register_curvature_method(
            name,
            create_curvature_fn=types.CurvatureType(name),
            curvature_to_precision_fn=types.curvature_to_precision,
            prec_to_posterior_fn=types.precision_to_posterior,
            posterior_state_to_scale_fn=types.posterior_to_scale,
            posterior_state_to_cov_fn=types.posterior_to_covariance,
            marginal_log_likelihood_fn=types.marginal_log_likelihood,
        )
    spelling.in_any_case()
    spelling.add_members()
    problem.multiply_as_laplax_does()
    rebinding.rebind(laplax.api, "GGN", problem.lazy_ggn)
    missing = requirements.lacking(requirements.FOR_SPEED)
    if missing:
        msg = (
            f"laplax {requirements.version()} lacks {', '.join(missing)}: with the curvature types "
            "of laplax_kfac its calibration and evaluation are right but slow. "
            "laplax_kfac.predictive_covariance is not affected."
        )
        warnings.warn(msg, stacklevel=2)
        return
    output_covariance.answer_at_once()
    for module, name, handler in FOR_SPEED:
        rebinding.rebind(module, name, handler)
    options = laplax.api.calibration_options
    options[GRID_SEARCH] = rebinding.rebound(grid_search.search_grid, options[GRID_SEARCH])
