"""The one module that knows laplax: it registers our curvature types, ``"kfac"`` and its like.

laplax has a register for the six functions that a curvature type needs. Four of its functions
learn more, by a route around their code that leaves every other curvature type alone:

* ``laplace`` hands a curvature type nothing but a matrix-vector product, while KFAC needs the
  model: a call with one of our types goes to `laplace_kfac`.
* ``lin_setup``, the first of laplax's linearised pushforward functions, gets the closed form of
  the output covariance, see `setup_linearised`.
* ``calibration`` and ``evaluation`` work through a dataset one example at a time; with our types
  the predictions for all examples are worked out together first.
"""

import functools
import inspect
import itertools
import operator
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import laplax
from jaxtyping import Array, Float, PyTree

from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import Batch, as_batch, batch_size
from laplax_kfac.curvature.kfac import Curvature, ekfac, kfac, kfoc
from laplax_kfac.evidence.tuning import minimise
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.posterior.prior import log_prior
from laplax_kfac.predictive.pushforward import (
    LINEARISED,
    Dataset,
    Numbered,
    OutputCovariance,
    Tabulated,
    closed_form,
    program_of,
)

try:
    import laplax.api
    import laplax.curv.cov
    import laplax.enums
    import laplax.eval.pushforward
    import laplax.register
    import laplax.util.mv
    from laplax.eval import metrics as metrics  # for plotting
    from laplax.eval import predictives as predictives  # for links
except ImportError as error:
    _MESSAGE = f"laplax_kfac needs laplax 0.0.2 or a later version like it; here, {error}."
    raise ImportError(_MESSAGE) from error

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
        curv_type: One of `CURVATURE_TYPES`, or a name that was registered with one of them as its
            default.
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
    curvature = laplax.curv.cov.CURVATURE_METHODS[curv_type](
        None, layout=params, model_fn=model_fn, data=data, loss_fn=loss_fn,
        vmap_over_data=vmap_over_data, **options,
    )  # fmt: skip
    if factor != 1.0:  # each product is a compilation
        curvature = curvature.map(lambda eigenvalues: factor * eigenvalues)
    return laplax.curv.cov.set_posterior_fn(curv_type, curvature, layout=params), curvature


def _laplace(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    ours = _our_name(kwargs.get("curv_type"))
    if ours is None:
        return original(*args, **kwargs)
    return laplace_kfac(*args, **{**kwargs, "curv_type": ours})


def _our_name(curv_type: Any) -> str | None:
    """The registered name of a curvature type whose curvature is made here; None for others."""
    for name in (curv_type, curv_type.lower()) if isinstance(curv_type, str) else ():
        made_by = getattr(laplax.curv.cov.CURVATURE_METHODS.get(name), "func", None)
        where = (getattr(made_by, "__module__", None), getattr(made_by, "__name__", None))
        if where == (__name__, create_curvature.__name__):  # by name: this module may be reloaded
            return str(name)
    return None


# -- the linearised pushforward ----------------------------------------------------------------


def setup_linearised(
    results: dict[str, Any], aux: dict[str, Any], input: Any, dist_state: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first of laplax's linearised ``pushforward_fns``; output covariances in closed form.

    Goes where laplax's ``lin_setup`` goes, before ``lin_pred_mean``, ``lin_pred_var`` and the
    others, which it leaves as they are. The generic setup pulls every output through a product
    with the covariance of all parameters; here the Jacobian of each layer is contracted in the
    eigenbasis of its block. Other curvature types get the generic setup, and so does a model whose
    layers are not those of the curvature.

    Importing the package makes ``lin_setup`` itself do this.

    Args:
        results: Predictions so far.
        aux: What pushforward functions hand on to each other.
        input: One input.
        dist_state: laplax's distribution state.
        **kwargs: Ignored, as by ``lin_setup``.
    """
    generic = laplax.eval.pushforward.lin_setup
    return _lin_setup(
        _original_of(generic) or generic, results, aux, input=input, dist_state=dist_state, **kwargs
    )


def _lin_setup(
    original: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    results, aux = original(*args, **kwargs)
    given = _by_name(original, args, kwargs)
    state, x = given["dist_state"]["posterior_state"].state, given["input"]
    if isinstance(state, Tabulated) and isinstance(x, Numbered):
        aux["cov_mv"] = state.at(x, jnp.shape(results["map"]))
    elif isinstance(state, Tabulated | Posterior):
        posterior = state.posterior if isinstance(state, Tabulated) else state
        closed = closed_form(posterior, aux["model_fn"], aux["mean_params"], x)
        aux["cov_mv"] = closed or aux["cov_mv"]
    return results, aux


def _diagonal(mv: OutputCovariance, layout: Any = None, **_: Any) -> Float[Array, " C"]:
    """What ``laplax.util.mv.diagonal`` returns for an output covariance."""
    del layout
    return mv.variance()


def _to_dense(mv: OutputCovariance, layout: Any = None, **_: Any) -> Float[Array, "..."]:
    """What ``laplax.util.mv.to_dense`` returns for an output covariance."""
    del layout
    return mv.to_dense()


# -- laplax.calibration and laplax.evaluation: all examples of a dataset together --------------

_DIAGONAL = {"none": True, "mean_field_0": True, "mean_field_1": True, "mean_field_2": False}
"""Whether laplax's predictive type needs variances alone; the others need samples or fail."""

_GRID_SEARCH = "grid_search"


def _dataset(given: Mapping[str, Any], prior_arguments: Any) -> Dataset | None:
    """The data of a call of calibration or evaluation; None where it is worked on as before."""
    diagonal = _DIAGONAL.get(str(given["predictive_type"]).lower())
    linear = str(given["pushforward_type"]).lower() == "linear"
    if diagonal is None or not linear or given["pushforward_fns"]:
        return None
    posterior_fn, model_fn, params = (given[k] for k in ("posterior_fn", "model_fn", "params"))
    batch = _one_batch(given["data"])
    if batch is None or not _is_ours(posterior_fn, prior_arguments):
        return None
    precision = posterior_fn(prior_arguments).state.precision
    first = jax.tree.map(lambda x: x[0], batch["input"])
    program = program_of(precision, model_fn, params, first)
    if program is None:
        return None
    dataset = Dataset(posterior_fn, model_fn, params, batch, precision, program, diagonal)
    return dataset if dataset.fits else None


def _one_batch(data: Any) -> Batch | None:
    """One batch as laplax takes it, with its inputs as arrays; None for a loader, or an error."""
    if not isinstance(data, tuple | list | dict):
        return None
    try:
        batch = as_batch(data)
        batch_size(batch)
    except ValueError:
        return None  # laplax says what is wrong
    return {"input": jax.tree.map(jnp.asarray, batch["input"]), "target": batch["target"]}


def _is_ours(posterior_fn: Callable[..., Any], prior_arguments: Any) -> bool:
    """Whether a posterior function makes a posterior of this package; nothing is computed."""
    try:
        state = jax.eval_shape(lambda: posterior_fn(prior_arguments).state)
    except Exception:  # whatever it raises, it raises again where laplax calls it
        return False
    return isinstance(state, Posterior)


def _numbered(dataset: Dataset) -> dict[str, Any]:
    """Arguments of calibration and evaluation with which they look predictions up."""
    return {
        "posterior_fn": dataset.posterior_fn,
        "model_fn": dataset.predict,
        "data": dataset.numbered,
        "num_samples": 0,  # laplax would draw its samples of weights, which none of these needs
    }


def _calibration(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Laplax's calibration; on a grid, with what does not depend on the prior done once."""
    given = _by_name(original, args, kwargs)
    wanted = (
        str(given.get("calibration_method")).lower() == _GRID_SEARCH
        and str(given["calibration_objective"]).lower() in ("nll", "chi_squared", "ece")
        and _our_name(given["curv_type"]) is not None
    )
    dataset = _dataset(given, {"prior_prec": 1.0}) if wanted else None
    if dataset is None or not _same_bases(dataset.matrix, given["curv_estimate"]):
        return original(*args, **kwargs)
    grid = {"calibration_method": LINEARISED, LINEARISED: dataset.linearise()}
    prior, set_predictive = original(**{**given, **_numbered(dataset), **grid})
    own = {name: given[name] for name in ("posterior_fn", "model_fn", "num_samples")}
    return prior, functools.partial(set_predictive, **own)


def _grid_search(objective: Callable[..., Any], data: Any, **options: Any) -> dict[str, Any]:
    """Laplax's grid search, handing the objective the linearised model as an argument.

    In a closure it would be a constant of the compiled objective, which takes seconds to compile.
    """
    linearised = options.pop(LINEARISED)
    defaults = {"log_prior_prec_min": -3.0, "log_prior_prec_max": 3.0, "grid_size": 50}
    chosen = laplax.api.calibration_options[_GRID_SEARCH](
        objective=lambda prior: objective({**prior, LINEARISED: linearised}, data),
        patience=options.get("patience"),
        **{name: options.get(name, default) for name, default in defaults.items()},
    )
    return {"prior_prec": chosen}


def _evaluation(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Laplax's evaluation; of a dataset, with all predictions worked out together."""
    given = _by_name(original, args, kwargs)
    dataset = _dataset(given, given["arguments"]) if given else None
    if dataset is None:
        return original(*args, **kwargs)
    return original(**{**given, **_numbered(dataset)})


def _by_name(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call with their names and defaults; none if the call is wrong."""
    signature = inspect.signature(function)
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:
        return {}
    call.apply_defaults()
    named = dict(call.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name)
    return named


def _same_bases(matrix: BlockDiagonal, other: Any) -> bool:
    """Whether both have the very same arrays as bases, so that no prior changes them."""
    if not isinstance(other, BlockDiagonal) or len(other.blocks) != len(matrix.blocks):
        return False
    pairs = zip(matrix.blocks, other.blocks, strict=True)
    leaves = [(jax.tree.leaves(b.sides), jax.tree.leaves(c.sides)) for b, c in pairs]
    return all(len(us) == len(vs) and all(map(operator.is_, us, vs)) for us, vs in leaves)


# -- installing --------------------------------------------------------------------------------

NEEDED = {
    "laplax.api.laplace": ("model_fn", "params", "data", "loss_fn", "curv_type"),
    "laplax.curv.cov.set_posterior_fn": ("curv_type", "curv_estimate", "layout"),
    "laplax.register.register_curvature_method": (
        "name", "create_curvature_fn", "curvature_to_precision_fn", "prec_to_posterior_fn",
        "posterior_state_to_scale_fn", "posterior_state_to_cov_fn", "marginal_log_likelihood_fn",
    ),
    "laplax.curv.cov.CURVATURE_METHODS": (),
    "laplax.enums.CurvApprox": (),
}  # fmt: skip
"""What has to be in laplax, with the parameters that are used."""

FOR_SPEED = {
    "laplax.eval.pushforward.lin_setup": ("results", "aux", "input", "dist_state"),
    "laplax.api.calibration": (
        "posterior_fn", "model_fn", "params", "data", "curv_estimate", "curv_type",
        "predictive_type", "pushforward_type", "pushforward_fns", "num_samples",
        "calibration_objective", "calibration_method",
    ),
    "laplax.api.evaluation": (
        "posterior_fn", "model_fn", "params", "arguments", "data", "predictive_type",
        "pushforward_type", "pushforward_fns", "num_samples",
    ),
    "laplax.api.calibration_options": (),
    "laplax.enums.CalibrationMethod.GRID_SEARCH": (),
    "laplax.util.mv.diagonal": ("mv", "layout"),
    "laplax.util.mv.to_dense": ("mv", "layout"),
}  # fmt: skip
"""What the closed-form predictive needs besides; without it, laplax's own one is used."""

ROUTES = {
    "laplax.eval.pushforward.lin_setup": _lin_setup,
    "laplax.api.calibration": _calibration,
    "laplax.api.evaluation": _evaluation,
}


def calibrate(
    objective: Callable[[Any, Any], Any],
    data: Any,
    prior_arguments: Any = None,
    **options: Any,
) -> dict[str, Any]:
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
    """
    start = {"prior_prec": 1.0} if prior_arguments is None else dict(prior_arguments)

    def of_precision(prior_prec: PyTree) -> Float[Array, ""]:
        return objective({**start, "prior_prec": prior_prec}, data)

    found, _ = minimise(of_precision, start["prior_prec"], **options)
    return {**start, "prior_prec": found}


def register() -> None:
    """Register our curvature types with laplax; importing `laplax_kfac` does it.

    Doing it again is harmless.

    Raises:
        ImportError: If laplax is too old, or lacks what the registration needs.
    """
    version = str(getattr(laplax, "__version__", "of unknown version"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    lacking = _lacking(NEEDED) or _not_plain(["laplax.api.laplace"])
    if lacking or (numbers and numbers < (0, 0, 2)):
        msg = (
            f"laplax_kfac cannot register its curvature types with laplax {version}, which lacks "
            f"{', '.join(lacking) or 'much that 0.0.2 has'}; install laplax 0.0.2, or a later "
            "version that has them."
        )
        raise ImportError(msg)
    laplax.api.calibration_options["tune"] = calibrate  # as laplax.register does, which logs it
    for name in CURVATURE_TYPES:
        _add_member(name)
        for spelling in _spellings(name):
            laplax.register.register_curvature_method(
                spelling,
                create_curvature_fn=functools.partial(create_curvature, name),
                curvature_to_precision_fn=curvature_to_precision,
                prec_to_posterior_fn=precision_to_posterior,
                posterior_state_to_scale_fn=posterior_to_scale,
                posterior_state_to_cov_fn=posterior_to_covariance,
                marginal_log_likelihood_fn=marginal_log_likelihood,
            )
    _route("laplax.api.laplace", _laplace)
    lacking = _lacking(FOR_SPEED) or _not_plain(ROUTES)
    if lacking:
        msg = (
            f"laplax {version} lacks {', '.join(lacking)}: with the curvature types of laplax_kfac "
            "its calibration and evaluation are right but slow. "
            "laplax_kfac.predictive_covariance is not affected."
        )
        warnings.warn(msg, stacklevel=2)
        return
    laplax.util.mv.diagonal.register(OutputCovariance)(_diagonal)
    laplax.util.mv.to_dense.register(OutputCovariance)(_to_dense)
    laplax.api.calibration_options[LINEARISED] = _grid_search
    for path, handler in ROUTES.items():
        _route(path, handler)


def _lacking(wanted: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What of it is not there, in words."""
    found = []
    for path, parameters in wanted.items():
        try:
            names = _parameters(_find(path))
        except AttributeError:
            found.append(path)
            continue
        missing = [name for name in parameters if name not in names]
        if missing:
            found.append(f"{path}({', '.join(missing)})")
    return found


def _not_plain(paths: Iterable[str]) -> list[str]:
    """Which of these have no code of their own that a route could be put around, in words."""
    return [
        f"{path} as a plain function"
        for path in paths
        if not isinstance(f := _find(path), types.FunctionType) or f.__closure__
    ]


def _find(path: str) -> Any:
    """``laplax.api.laplace`` and the like.

    Raises:
        AttributeError: If there is none.
    """
    return functools.reduce(getattr, path.split(".")[1:], laplax)


def _parameters(thing: Any) -> Iterable[str]:
    return inspect.signature(thing).parameters if inspect.isroutine(thing) else ()


def _spellings(name: str) -> list[str]:
    """A name in all mixtures of small and capital letters: laplax looks names up as they are."""
    return ["".join(letters) for letters in itertools.product(*((c, c.upper()) for c in name))]


def _add_member(value: str) -> None:
    """Make ``CurvApprox("kfac")`` and ``CurvApprox.KFAC`` valid, and so on."""
    enum = laplax.enums.CurvApprox
    if value in enum._value2member_map_:
        return
    name = value.upper()
    member = str.__new__(enum, value)
    member._name_, member._value_ = name, value
    setattr(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member


def _forward(*args: Any, **kwargs: Any) -> Any:
    # Runs with the globals of the function whose code it becomes; `_route` puts the name there.
    return _laplax_kfac_route(*args, **kwargs)  # type: ignore[name-defined]


def _route(path: str, handler: Callable[..., Any]) -> None:
    """Let a function of laplax run ``handler(original, *args, **kwargs)``.

    The function object stays and gets new code, so that references to it that were taken before
    this import do the same. ``original`` is what it did before.
    """
    function = _find(path)
    route = f"_laplax_kfac_{function.__name__}"
    original = _original_of(function)
    if original is None:
        original = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__,
            function.__closure__,
        )  # fmt: skip
        original.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(original, function)
        function.__signature__ = inspect.signature(function)
        function.__defaults__ = function.__kwdefaults__ = None
        function.__code__ = _forward.__code__.replace(co_names=(route,))
    function.__globals__[route] = functools.partial(handler, original)


def _original_of(function: Any) -> Any:
    """What a function of laplax did before it was routed; None if it was not."""
    route = getattr(function, "__globals__", {}).get(f"_laplax_kfac_{function.__name__}")
    return route.args[0] if route is not None else None
