"""laplax with "kfac" and "ekfac" against laplax with "full", on models where the three agree."""

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import laplax.register
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from laplax.curv.cov import create_posterior_fn, estimate_curvature
from laplax.enums import CurvApprox
from laplax.eval import pushforward
from laplax.eval.utils import transfer_entry
from laplax.util.tree import normal_like
from support.linear_models import (
    CASES,
    CLASSES,
    CONSTANT,
    REGRESSION,
    TRAINED,
    Loader,
    X,
    as_matrix,
    fit,
    linear,
)
from support.matrices import normal
from support.oracles import dense_ggn
from support.tolerances import tolerance

import laplax_kfac
import laplax_kfac.laplax_adapter.plugin

pytestmark = pytest.mark.usefixtures("x64")
OURS = list(laplax_kfac.laplax_adapter.plugin.CURVATURE_TYPES)


# -- the same numbers as "full" ----------------------------------------------------------------


@pytest.mark.parametrize("curv_type", OURS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_curvature_is_that_of_full(case, curv_type):
    full = fit(case, "full")[1]
    found = fit(case, curv_type)[1]
    assert isinstance(found, laplax_kfac.Curvature)
    np.testing.assert_allclose(found.to_dense(), full, **tolerance(jnp.float64))
    # Neither is taken for granted:
    exact = dense_ggn(linear, case.params, case.data, case.loss_fn)
    np.testing.assert_allclose(full, exact, **tolerance(jnp.float64))


PRIORS = [
    ({"prior_prec": 1.0}, 1.0),
    ({"prior_prec": 0.01, "sigma_squared": 0.3}, 1.0),
    ({"prior_prec": 20.0, "sigma_squared": 2.0}, 5.0),
]


@pytest.mark.parametrize("curv_type", OURS)
@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("case", [REGRESSION, CLASSES], ids=str)
def test_products_with_covariance_and_scale_are_those_of_full(case, prior, curv_type):
    arguments, loss_scaling_factor = prior
    found, full = (
        fit(case, name)[0](arguments, loss_scaling_factor) for name in (curv_type, "full")
    )
    covariance, scale, expected = (
        as_matrix(mv, case.params)
        for mv in (found.cov_mv(found.state), found.scale_mv(found.state), full.cov_mv(full.state))
    )
    np.testing.assert_allclose(covariance, expected, **tolerance(jnp.float64))
    np.testing.assert_allclose(scale @ scale.T, expected, **tolerance(jnp.float64))


def test_posteriors_of_several_leaves_are_in_laplax_flat_order():
    def model_fn(input, params):
        return jnp.tanh(input @ params["z"]["w"] + params["z"]["b"]) @ params["a"]

    params = {"a": normal(4, 2), "z": {"b": normal(4), "w": normal(3, 4)}}
    posterior_fn, curv = laplax.laplace(
        model_fn, params, (X, normal(6, 2)), loss_fn="mse", curv_type="kfac"
    )
    posterior = posterior_fn({"prior_prec": 0.5})
    found = as_matrix(posterior.cov_mv(posterior.state), params)
    expected = np.linalg.inv(np.asarray(curv.to_dense()) + 0.5 * np.eye(24))
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_weights_that_laplax_samples_have_the_covariance_of_full():
    n, full = 50_000, np.asarray(fit(REGRESSION, "full")[1])
    posterior = fit(REGRESSION, "kfac")[0]({"prior_prec": 0.5})

    @jax.jit
    def second_moments(key):
        def draw(key):
            sample = normal_like(key, TRAINED, posterior.scale_mv(posterior.state))
            return ravel_pytree(jax.tree.map(jnp.subtract, sample, TRAINED))[0]

        offsets = jax.vmap(draw)(jax.random.split(key, n))
        return offsets.T @ offsets / n

    covariance = np.linalg.inv(full + 0.5 * np.eye(len(full)))
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert (np.abs(second_moments(jax.random.key(0)) - covariance) < 6 * error).all()


# -- calibration and evaluation ----------------------------------------------------------------


def test_grid_search_runs_with_our_type():
    posterior_fn, curv = fit(REGRESSION, "kfac")
    prior, set_predictive = laplax.calibration(
        posterior_fn, linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_estimate=curv,
        curv_type="kfac", grid_size=3,
    )  # fmt: skip
    assert set(prior) == {"prior_prec"}
    predictions = set_predictive(prior_arguments=prior)(X[0])
    assert np.isfinite(predictions["pred_std"]).all()


@pytest.mark.parametrize("case", [REGRESSION, CLASSES], ids=str)
def test_sampled_evaluation_agrees_with_full(case):
    # The two take different square roots of one covariance: their samples agree in distribution.
    data = {"input": normal(4, 3, seed=6), "target": case.data[1][:4]}
    found, full = (
        laplax.evaluation(
            fit(case, name)[0], linear, case.params, {"prior_prec": 0.3}, data,
            pushforward_type="nonlinear", num_samples=10_000,
            metrics=transfer_entry(["pred_mean", "pred_std"]),
        )[0]
        for name in ("kfac", "full")
    )  # fmt: skip
    np.testing.assert_allclose(found["pred_std"], full["pred_std"], rtol=0.05)
    error = np.abs(found["pred_mean"] - full["pred_mean"]) / full["pred_std"]
    assert error.max() < 6 * np.sqrt(2 / 10_000)


# -- forms of arguments ------------------------------------------------------------------------


def test_the_types_are_members_of_the_enumeration():
    assert CurvApprox.KFAC is CurvApprox("kfac")
    assert isinstance(CurvApprox("ekfac"), CurvApprox)
    assert CurvApprox("kfac") == "kfac"
    assert [member.name for member in CurvApprox].count("KFAC") == 1
    assert list(CurvApprox)[:4] == ["full", "diagonal", "lanczos", "lobpcg"]
    with pytest.raises(ValueError, match="'other' is not a valid CurvApprox"):
        CurvApprox("other")


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: {"input": x, "target": y},
        lambda x, y: (jnp.asarray(x), jnp.asarray(y)),
        Loader,
        lambda x, y: list(Loader(x, y)),
        lambda x, y: [{"input": x[:5], "target": y[:5]}, {"input": x[5:], "target": y[5:]}],
        lambda x, y: [(x, y)],
        lambda x, y: iter(Loader(x, y)),
    ],
    ids=["dict", "jax arrays", "loader", "list", "list of dicts", "list of one", "iterator"],
)
def test_data_may_come_in_any_form(make):
    data = make(*REGRESSION.data)
    curv = laplax.laplace(linear, TRAINED, data, loss_fn="mse", curv_type="kfac")[1]
    expected = fit(REGRESSION, "kfac")[1].to_dense()
    np.testing.assert_allclose(curv.to_dense(), expected, **tolerance(jnp.float64))


@pytest.mark.parametrize(("curv_type", "passes"), [("kfac", 1), ("ekfac", 2)])
def test_a_loader_is_read_no_more_often_than_needed(curv_type, passes):
    # Not even one batch is consumed to look at its form.
    loader = Loader(*REGRESSION.data)
    laplax.laplace(linear, TRAINED, loader, loss_fn="mse", curv_type=curv_type)
    assert (loader.passes, loader.batches) == (passes, 3 * passes)


@pytest.mark.parametrize("curv_type", OURS)
def test_numbers_of_samples_scale_as_for_full(curv_type):
    sizes: Any = {"num_curv_samples": 6, "num_total_samples": 60}
    found, full = (
        laplax.laplace(linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type=name, **sizes)[1]
        for name in (curv_type, "full")
    )
    np.testing.assert_allclose(found.to_dense(), full, **tolerance(jnp.float64))
    once = fit(REGRESSION, "full")[1]
    np.testing.assert_allclose(full, 0.1 * once, **tolerance(jnp.float64))


def test_options_reach_kfac():
    options: Any = {
        "fisher_type": "mc", "mc_samples": 2, "key": jax.random.key(3), "kfac_approx": "reduce",
        "separate_weight_and_bias": True,
    }  # fmt: skip
    found = laplax.laplace(
        linear,
        TRAINED,
        REGRESSION.data,
        loss_fn="mse",
        curv_type="kfac",
        curv_mv_jit=True,
        **options,
    )[1]
    expected = laplax_kfac.kfac(linear, TRAINED, REGRESSION.data, loss_fn="mse", **options)
    assert [layer.name for layer in found.layers] == ["b", "w"]
    np.testing.assert_array_equal(found.to_dense(), expected.to_dense())


def test_models_of_batches_are_accepted():
    found = laplax.laplace(
        linear, CONSTANT, CLASSES.data, loss_fn="cross_entropy", curv_type="kfac",
        vmap_over_data=False,
    )[1]  # fmt: skip
    expected = fit(CLASSES, "kfac")[1].to_dense()
    np.testing.assert_allclose(found.to_dense(), expected, **tolerance(jnp.float64))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'fisher'"):
        laplax.laplace(
            linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type="kfac", fisher="mc"
        )


# -- laplax's functions below `laplace` --------------------------------------------------------


@pytest.mark.parametrize("curv_type", OURS)
def test_estimate_curvature_needs_the_model_and_says_so(curv_type):
    message = (
        f"curv_type='{curv_type}' reads the layers off the model, which a matrix-vector product "
        r"does not show; missing: model_fn, data, loss_fn\. Call laplax\.laplace\(model_fn, params"
    )
    with pytest.raises(TypeError, match=message):
        estimate_curvature(curv_type, mv=lambda v: v, layout=TRAINED)
    with pytest.raises(TypeError, match="missing: layout"):
        estimate_curvature(
            curv_type, mv=lambda v: v, model_fn=linear, data=REGRESSION.data, loss_fn="mse"
        )


@pytest.mark.parametrize("curv_type", OURS)
def test_estimate_curvature_and_create_posterior_fn_take_the_model_as_options(curv_type):
    options: Any = {
        "mv": None, "layout": TRAINED, "model_fn": linear, "data": REGRESSION.data, "loss_fn": "mse"
    }  # fmt: skip
    posterior_fn, expected = fit(REGRESSION, curv_type)
    found = estimate_curvature(curv_type, **options)
    np.testing.assert_array_equal(found.to_dense(), expected.to_dense())
    posterior, other = (
        function({"prior_prec": 1.0})
        for function in (create_posterior_fn(curv_type, **options), posterior_fn)
    )
    for got, want in zip(*map(jax.tree.leaves, (posterior.state, other.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_states_of_posteriors_go_through_jit_and_vmap_over_the_prior():
    posterior_fn, curv = fit(REGRESSION, "kfac")
    priors = np.asarray([0.1, 3.0])

    def product(prior_prec):
        posterior = posterior_fn({"prior_prec": prior_prec})
        return ravel_pytree(posterior.cov_mv(posterior.state)(TRAINED))[0]

    found = jax.jit(jax.vmap(product))(priors)
    flat = np.asarray(ravel_pytree(TRAINED)[0])
    for got, prior_prec in zip(found, priors, strict=True):
        precision = np.asarray(curv.to_dense()) + prior_prec * np.eye(flat.size)
        np.testing.assert_allclose(got, np.linalg.solve(precision, flat), **tolerance(jnp.float64))


# -- registering -------------------------------------------------------------------------------

BEFORE_AND_AFTER = """
import inspect, json
import jax, jax.numpy as jnp, laplax, numpy as np
from laplax import calibration, evaluation, laplace  # references from before laplax_kfac
from laplax.curv.lanczos import lanczos_lowrank
from laplax.eval.pushforward import lin_pred_mean, lin_pred_std, lin_setup
from loguru import logger

logger.remove()
try:  # laplax turns x64 on for lanczos, and not off again if there is an error
    lanczos_lowrank(jnp.eye(3), rank=2)
except ValueError as e:
    failed_with_x64 = [str(e), jax.config.jax_enable_x64]
jax.config.update("jax_enable_x64", True)  # laplax's lanczos does so anyway
rng = np.random.default_rng(0)
params = {"v": jnp.asarray(rng.normal(size=(4, 2))), "w": jnp.asarray(rng.normal(size=(3, 4)))}
data = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 2)))

def model_fn(input, params):
    return jnp.tanh(input @ params["w"]) @ params["v"]

def outcome(function, curv_type, **options):
    posterior_fn, curv = function(
        model_fn, params, data, loss_fn="mse", curv_type=curv_type, **options
    )
    posterior = posterior_fn({"prior_prec": 0.7})
    product = posterior.cov_mv(posterior.state)(params)
    return [np.asarray(x) for x in jax.tree.leaves((curv, posterior.state, product))]

def error(function, **arguments):
    try:
        function(model_fn, params, data, **arguments)
    except Exception as e:
        return [type(e).__name__, str(e)]

OPTIONS = {
    "FULL": {"curv_mv_jit": True, "num_curv_samples": 2, "num_total_samples": 3},
    "diagonal": {},
    "lanczos": {"rank": 5, "key": jax.random.key(1)},
    "lobpcg": {"rank": 3, "key": jax.random.key(1)},
}

def predictions(curv_type):
    posterior_fn, curv = laplace(model_fn, params, data, loss_fn="mse", curv_type=curv_type)
    prior, set_predictive = calibration(
        posterior_fn, model_fn, params, data, loss_fn="mse", curv_estimate=curv,
        curv_type=curv_type, grid_size=2, pushforward_fns=[lin_setup, lin_pred_mean, lin_pred_std],
    )
    results = evaluation(posterior_fn, model_fn, params, prior, data)[0]
    return [np.asarray(x) for x in jax.tree.leaves((prior, results))]

def observe(function):
    return {
        "predictions": {"full": predictions("full")},
        "fits": {name: outcome(function, name, **options) for name, options in OPTIONS.items()},
        "errors": [
            error(function, loss_fn="mse", curv_type="ggn"),
            error(function, loss_fn="mse", curv_type=None),
            error(function, loss_fn="mse"),
            error(function, curv_type="full"),
            error(function, loss_fn="l1", curv_type="full"),
        ],
        "signature": str(inspect.signature(function)),
        "parameters": list(inspect.signature(function).parameters),
        "doc": function.__doc__,
        "name": [function.__module__, function.__qualname__],
    }

before = observe(laplace)
unknown = error(laplace, loss_fn="mse", curv_type="kfac")
import laplax_kfac
after = observe(laplax.laplace)
same = {
    what: {
        name: len(a) == len(after[what][name]) > 2
        and all(np.array_equal(x, y) for x, y in zip(a, after[what][name]))
        for name, a in before.pop(what).items()
    }
    for what in ("fits", "predictions")
}
del after["fits"], after["predictions"]
print(json.dumps({
    "same": same,
    "before": before,
    "after": after,
    "unknown before": unknown,
    "one function": laplace is laplax.laplace is laplax.api.laplace
    and calibration is laplax.api.calibration
    and evaluation is laplax.evaluation
    and lin_setup is laplax.api.lin_setup is laplax.eval.pushforward.lin_setup,
    "early reference": len(outcome(laplace, "kfac")),
    "early predictions": len(predictions("kfac")),
    "failed with x64": failed_with_x64,
}))
"""


@pytest.fixture(scope="module")
def observed():
    """laplax in a fresh process, before and after `import laplax_kfac`."""
    run = subprocess.run(
        [sys.executable, "-c", BEFORE_AND_AFTER],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("curv_type", ["FULL", "diagonal", "lanczos", "lobpcg"])
def test_other_curvature_types_give_bitwise_the_same(observed, curv_type):
    assert observed["same"]["fits"][curv_type]


def test_predictions_with_other_curvature_types_are_bitwise_the_same(observed):
    assert observed["same"]["predictions"] == {"full": True}


def test_errors_signature_and_documentation_of_laplace_stay(observed):
    assert observed["after"] == observed["before"]
    kinds = [error and error[0] for error in observed["before"]["errors"]]
    assert kinds == ["ValueError", "AttributeError", "TypeError", "TypeError", "ValueError"]
    assert observed["before"]["parameters"][:3] == ["model_fn", "params", "data"]


def test_a_reference_to_laplace_from_before_the_import_dispatches_too(observed):
    assert observed["one function"]
    assert observed["unknown before"] == ["ValueError", "'kfac' is not a valid CurvApprox"]
    assert observed["early reference"] > 2
    assert observed["early predictions"] == 5


ROUTED = [laplax.laplace, laplax.calibration, laplax.evaluation, pushforward.lin_setup]


def test_defect_x64_stays_on_where_lanczos_fails(observed):
    assert observed["failed with x64"] == ["Either key or b must be provided", True]


def test_reloading_and_registering_again_is_harmless():
    originals = [laplax_kfac.laplax_adapter.plugin._original_of(function) for function in ROUTED]
    importlib.reload(laplax_kfac.laplax_adapter.plugin)
    laplax_kfac.laplax_adapter.plugin.register()
    laplax_kfac.laplax_adapter.plugin.register()
    now = [laplax.laplace, laplax.calibration, laplax.evaluation, pushforward.lin_setup]
    assert all(function is routed for function, routed in zip(now, ROUTED, strict=True))
    for function, original in zip(ROUTED, originals, strict=True):
        assert laplax_kfac.laplax_adapter.plugin._original_of(function) is original
        assert original is not function
    assert len(CurvApprox) == 4 + len(OURS)
    for curv_type in ("full", "kfac"):
        found, expected = fit.__wrapped__(REGRESSION, curv_type), fit(REGRESSION, curv_type)
        for got, want in zip(*(jax.tree.leaves(f[1]) for f in (found, expected)), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("path", "change", "lacks"),
    [
        ("register.register_curvature_method", None, r"register\.register_curvature_method"),
        ("curv.cov.CURVATURE_METHODS", None, r"laplax\.curv\.cov\.CURVATURE_METHODS"),
        ("api.laplace", lambda model_fn, params: (model_fn, params), r"laplace\(data, loss_fn, "),
        ("api.laplace", functools.partial(print), r"laplace\(model_fn, params, data, loss_fn, cur"),
        ("__version__", "0.0.1", r"laplax 0\.0\.1, which lacks much that 0\.0\.2 has"),
    ],
    ids=["register", "a dictionary", "parameters", "no function", "version"],
)  # fmt: skip
def test_a_laplax_that_cannot_be_registered_with_is_refused(path, change, lacks, monkeypatch):
    replace(monkeypatch, path, change)
    with pytest.raises(ImportError, match=f"{lacks}.*; install laplax 0\\.0\\.2, or a later"):
        laplax_kfac.laplax_adapter.plugin.register()


@pytest.mark.parametrize(
    ("path", "change", "lacks"),
    [
        ("eval.pushforward.lin_setup", None, r"laplax\.eval\.pushforward\.lin_setup"),
        ("api.evaluation", lambda **given: given, r"laplax\.api\.evaluation\(posterior_fn, "),
        ("util.mv.diagonal", lambda mv: mv, r"laplax\.util\.mv\.diagonal\(layout\)"),
    ],
    ids=["a function", "parameters", "parameter"],
)  # fmt: skip
def test_a_laplax_without_its_pushforward_is_slow_and_a_warning_says_so(
    path, change, lacks, monkeypatch
):
    replace(monkeypatch, path, change)
    with pytest.warns(UserWarning, match=f"lacks {lacks}.*: .* are right but slow"):
        laplax_kfac.laplax_adapter.plugin.register()


def test_a_function_with_variables_of_its_surroundings_is_not_routed():
    def surrounding(variable):
        return lambda *args: (variable, args)

    laplax.api._wrapped = surrounding(1)
    try:
        assert laplax_kfac.laplax_adapter.plugin._not_plain(["laplax.api._wrapped"]) == [
            "laplax.api._wrapped as a plain function"
        ]
    finally:
        del laplax.api._wrapped
    assert (
        laplax_kfac.laplax_adapter.plugin._not_plain(laplax_kfac.laplax_adapter.plugin.ROUTES) == []
    )


def replace(monkeypatch, path, change):
    *modules, name = path.split(".")
    module = functools.reduce(getattr, modules, laplax)
    if change is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, change)


@pytest.mark.parametrize("curv_type", ["full", "diagonal"])
def test_the_original_is_what_runs_for_other_types(curv_type):
    options: Any = {"loss_fn": "mse", "curv_type": curv_type}
    found = laplax.laplace(linear, TRAINED, REGRESSION.data, **options)
    original = laplax_kfac.laplax_adapter.plugin._original_of(laplax.laplace)
    expected = original(linear, TRAINED, REGRESSION.data, **options)
    np.testing.assert_array_equal(found[1], expected[1])
