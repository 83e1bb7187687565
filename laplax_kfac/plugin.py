"""The one module that knows laplax: it registers the curvature types ``"kfac"`` and ``"ekfac"``.

laplax has a register for the six functions that a curvature type needs; two gaps are closed here.
The enumeration ``CurvApprox`` gets a member, for `laplax.laplace` converts the string to one. And
`laplax.laplace` itself hands a curvature type nothing but a matrix-vector product, while KFAC
needs the model: a call with one of these types is dispatched to `laplace_kfac`, every other call
runs laplax's own code, unchanged.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import laplax
import laplax.api
import laplax.register
from jaxtyping import Array, Float, PyTree
from laplax.curv.cov import set_posterior_fn
from laplax.enums import CurvApprox

from laplax_kfac.blocks import BlockDiagonal
from laplax_kfac.curvature import Curvature, ekfac, kfac, kfoc
from laplax_kfac.posterior import Posterior, make_posterior
from laplax_kfac.prior import log_prior

CURVATURE_TYPES = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}
Flat = Float[Array, " P"]


# -- the six functions of a curvature type -----------------------------------------------------


def create_curvature(name: str, mv: Any = None, layout: PyTree = None, **options: Any) -> Curvature:
    """Curvature for `laplax.curv.cov.estimate_curvature`.

    Args:
        name: The curvature type.
        mv: Ignored: KFAC cannot be read off a matrix-vector product.
        layout: The parameters.
        **options: ``model_fn``, ``data``, ``loss_fn``, and the other arguments of `kfac`.

    Raises:
        TypeError: If ``model_fn``, ``data`` or ``loss_fn`` is missing.
    """
    del mv
    missing = [name for name in ("model_fn", "data", "loss_fn") if name not in options]
    if missing or layout is None:
        msg = (
            f"curv_type={name!r} reads the layers off the model, which a matrix-vector product "
            f"does not show; missing: {', '.join(missing or ['layout'])}. Call "
            f"laplax.laplace(model_fn, params, data, loss_fn=..., curv_type={name!r}), or pass "
            f"them on: estimate_curvature({name!r}, mv=None, layout=params, model_fn=model_fn, "
            "data=data, loss_fn=loss_fn)."
        )
        raise TypeError(msg)
    model_fn, data = options.pop("model_fn"), options.pop("data")
    return CURVATURE_TYPES[name](model_fn, layout, data, **options)


def curvature_to_precision(
    curv_estimate: Curvature, prior_arguments: Any, loss_scaling_factor: Any = 1.0
) -> BlockDiagonal:
    """Posterior precision ``(sigma_squared * curvature + prior_prec) / loss_scaling_factor``."""
    return make_posterior(
        curv_estimate,
        prior_arguments["prior_prec"],
        sigma_squared=prior_arguments.get("sigma_squared", 1.0),
        loss_scaling_factor=loss_scaling_factor,
    ).precision


def precision_to_posterior(precision: BlockDiagonal) -> Posterior:
    """The state of laplax's posterior: eigenvalues serve covariance and scale alike."""
    return Posterior(precision)


def _on_vectors(method: Callable[[Posterior, PyTree], PyTree], state: Posterior) -> Any:
    space = state.precision.space

    def mv(vector: Flat) -> Flat:
        return space.ravel(space.flatten(method(state, space.unflatten(space.unravel(vector)))))

    return mv


def posterior_to_scale(state: Posterior) -> Callable[[Flat], Flat]:
    """Product with a square root of the covariance, on flat parameters."""
    return _on_vectors(Posterior.scale_mv, state)


def posterior_to_covariance(state: Posterior) -> Callable[[Flat], Flat]:
    """Product with the covariance, on flat parameters."""
    return _on_vectors(Posterior.covariance_mv, state)


def marginal_log_likelihood(
    posterior_precision: BlockDiagonal,
    prior_arguments: Any,
    full_fn: Callable[..., Any],
    params: PyTree,
    data: Any,
) -> Float[Array, ""]:
    """Evidence in laplax's conventions, as for ``"full"``: they belong to the likelihood alone."""
    scale = 2 * prior_arguments.get("sigma", 1.0)
    fit = -full_fn(data["input"], data["target"], params) / scale
    prior = log_prior(prior_arguments["prior_prec"], posterior_precision, params)
    volume = posterior_precision.num_free() * jnp.log(2 * jnp.pi)
    return fit + prior + 0.5 * (volume - posterior_precision.log_determinant())


# -- laplax.laplace ----------------------------------------------------------------------------


def laplace_kfac(
    model_fn: Callable[..., Any],
    params: PyTree,
    data: Any,
    *,
    loss_fn: Any,
    curv_type: str = "kfac",
    num_curv_samples: Any = 1,
    num_total_samples: Any = 1,
    vmap_over_data: bool = True,
    curv_mv_jit: bool = False,
    **options: Any,
) -> tuple[Callable[..., Any], Curvature]:
    """What `laplax.laplace` does with one of our curvature types; see `kfac` for the options.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        data: One batch, or an iterable of batches.
        loss_fn: A laplax ``LossFn``, its string, or a callable.
        curv_type: ``"kfac"`` or ``"ekfac"``.
        num_curv_samples: As in laplax: the curvature is scaled by this over the next.
        num_total_samples: See ``num_curv_samples``.
        vmap_over_data: Whether ``model_fn`` takes one example or a batch.
        curv_mv_jit: Without effect: the pass over the data is always compiled.
        **options: Other arguments of `kfac`.

    Returns:
        laplax's posterior function, and the curvature.
    """
    del curv_mv_jit
    factor = float(num_curv_samples) / float(num_total_samples)
    fit = CURVATURE_TYPES[curv_type]
    curvature = fit(
        model_fn, params, data, loss_fn=loss_fn, vmap_over_data=vmap_over_data, **options
    ).map(lambda eigenvalues: factor * eigenvalues)
    return set_posterior_fn(curv_type, curvature, layout=params), curvature


def _forward(*args: Any, **kwargs: Any) -> Any:
    # Runs with laplax.api's globals, where `_install_dispatch` puts this name.
    return _laplax_kfac_dispatch(*args, **kwargs)  # type: ignore[name-defined]


def _install_dispatch() -> None:
    """Let `laplax.laplace` dispatch on the curvature type.

    The function object stays and gets new code, so that references to it taken before this import
    dispatch as well. What it did before runs as `original`, for every other curvature type.
    """
    api = laplax.api
    if not hasattr(api, "_laplax_kfac_original"):
        function = api.laplace
        original = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__
        )
        original.__kwdefaults__ = function.__kwdefaults__
        api._laplax_kfac_original = original
        function.__signature__ = inspect.signature(function)
        function.__code__ = _forward.__code__
    api._laplax_kfac_dispatch = _dispatch


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    name = str(kwargs.get("curv_type")).lower()
    if name not in CURVATURE_TYPES:
        return laplax.api._laplax_kfac_original(*args, **kwargs)
    return laplace_kfac(*args, **{**kwargs, "curv_type": name})


def _add_member(value: str) -> None:
    """Make ``CurvApprox("kfac")`` and ``CurvApprox.KFAC`` valid, and so on."""
    if value in CurvApprox._value2member_map_:
        return
    name = value.upper()
    member = str.__new__(CurvApprox, value)
    member._name_, member._value_ = name, value
    setattr(CurvApprox, name, member)
    CurvApprox._member_names_.append(name)
    CurvApprox._member_map_[name] = member
    CurvApprox._value2member_map_[value] = member


def register() -> None:
    """Register our curvature types with laplax; importing `laplax_kfac` does it.

    Doing it again is harmless.

    Raises:
        ImportError: If laplax lacks the functions that the registration needs.
    """
    needed = {
        "laplax.api.laplace": isinstance(getattr(laplax.api, "laplace", None), types.FunctionType),
        "laplax.register": hasattr(laplax.register, "register_curvature_method"),
    }
    lacking = [name for name, found in needed.items() if not found]
    if lacking:
        msg = (
            f"laplax {laplax.__version__} lacks {', '.join(lacking)}, which laplax_kfac registers "
            "with; install laplax 0.0.2 or a later version that has them."
        )
        raise ImportError(msg)
    _install_dispatch()
    for name in CURVATURE_TYPES:
        _add_member(name)
        laplax.register.register_curvature_method(
            name,
            create_curvature_fn=functools.partial(create_curvature, name),
            curvature_to_precision_fn=curvature_to_precision,
            prec_to_posterior_fn=precision_to_posterior,
            posterior_state_to_scale_fn=posterior_to_scale,
            posterior_state_to_cov_fn=posterior_to_covariance,
            marginal_log_likelihood_fn=marginal_log_likelihood,
        )
