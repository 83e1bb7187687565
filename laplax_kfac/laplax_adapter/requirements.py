"""What laplax must have for the adapter, and whether the installed one has it."""

import functools
import inspect
import re
from collections.abc import Iterable, Mapping

import laplax

try:
    import laplax.api
    import laplax.curv.cov
    import laplax.enums
    import laplax.eval.likelihood
    import laplax.eval.pushforward
    import laplax.register
    import laplax.util.flatten
    import laplax.util.mv
    from laplax.eval import metrics as metrics  # for plotting
    from laplax.eval import predictives as predictives  # for links
except ImportError as error:
    _MESSAGE = f"laplax_kfac needs laplax 0.0.2 or a later version like it; here, {error}."
    raise ImportError(_MESSAGE) from error

OLDEST = (0, 0, 2)

NEEDED = {
    "laplax.api.laplace": ("model_fn", "params", "data", "loss_fn", "curv_type"),
    "laplax.api.GGN": ("model_fn", "params", "data", "loss_fn", "factor", "vmap_over_data"),
    "laplax.api.calibration_options": (),
    "laplax.register.register_curvature_method": (
        "name", "create_curvature_fn", "curvature_to_precision_fn", "prec_to_posterior_fn",
        "posterior_state_to_scale_fn", "posterior_state_to_cov_fn", "marginal_log_likelihood_fn",
    ),
    "laplax.curv.cov.CURVATURE_METHODS": (),
    "laplax.enums.CurvApprox": (),
    "laplax.util.flatten.wrap_function": ("fn",),
    "laplax.util.mv.diagonal": ("mv",),
    "laplax.util.mv.to_dense": ("mv",),
}  # fmt: skip
"""What the curvature types need, with the parameters that are used."""

FOR_SPEED = {
    "laplax.eval.pushforward.get_dist_state": ("mean_params", "model_fn", "posterior_state"),
    "laplax.eval.pushforward.set_output_mv": ("posterior_state", "input", "jvp", "vjp"),
    "laplax.api.set_lin_pushforward": (
        "model_fn", "mean_params", "posterior_fn", "prior_arguments", "pushforward_fns",
    ),
    "laplax.api.evaluate_metrics_on_dataset": ("pred_fn", "data"),
    "laplax.api._build_calibration_objective": (
        "objective_type", "set_prob_predictive", "curv_estimate",
    ),
}  # fmt: skip
"""What the closed-form predictive needs besides; without it, laplax's own one is used."""


def version() -> str:
    """The version of the installed laplax, in words."""
    return str(getattr(laplax, "__version__", "of unknown version"))


def require() -> None:
    """Refuse a laplax that the curvature types cannot be registered with.

    Raises:
        ImportError: If laplax is too old, or lacks what the registration needs.
    """
    numbers = tuple(int(n) for n in re.findall(r"\d+", version())[:3])
    missing = lacking(NEEDED)
    if missing or (numbers and numbers < OLDEST):
        msg = (
            f"laplax_kfac cannot register its curvature types with laplax {version()}, which lacks "
            f"{', '.join(missing) or 'much that 0.0.2 has'}; install laplax 0.0.2, or a later "
            "version that has them."
        )
        raise ImportError(msg)


def lacking(wanted: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What of it is not there, in words."""
    found = []
    for path, parameters in wanted.items():
        try:
            thing = functools.reduce(getattr, path.split(".")[1:], laplax)
        except AttributeError:
            found.append(path)
            continue
        names = parameter_names(thing) if parameters else ()
        missing = [name for name in parameters if names is not None and name not in names]
        if missing:
            found.append(f"{path}({', '.join(missing)})")
    return found


def parameter_names(function: object) -> Iterable[str] | None:
    """Names of a function's parameters; None if it takes whatever it is given, as wrappers do."""
    if not callable(function):
        return ()
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
    kinds = {parameter.kind for parameter in parameters.values()}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    return parameters
