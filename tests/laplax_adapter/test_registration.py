"""Registering with laplax: its functions stay its own, however they are referred to or wrapped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("x64")

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

def sources_of_laplax():
    functions = (
        laplax.laplace, laplax.calibration, laplax.evaluation, laplax.eval.pushforward.lin_setup,
        laplax.api.GGN, laplax.api.set_lin_pushforward,
    )
    return {f.__name__: inspect.getsource(f) for f in functions}

FUNCTIONS = [laplace, calibration, evaluation, lin_setup]
sources = sources_of_laplax()
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
    "sources": {"before": sources, "after": sources_of_laplax()},
    "untouched": [vars(f) for f in FUNCTIONS] == [{}] * 4 and all(
        f.__module__.startswith("laplax.") and type(f) is type(observe) for f in FUNCTIONS
    ),
}))
"""


@pytest.fixture(scope="module")
def observed():
    """laplax in a fresh process, before and after `import laplax_kfac`."""
    return run(BEFORE_AND_AFTER)


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


def test_defect_x64_stays_on_where_lanczos_fails(observed):
    assert observed["failed with x64"] == ["Either key or b must be provided", True]


# -- laplax stays its own ----------------------------------------------------------------------


def test_functions_of_laplax_are_its_own(observed):
    assert observed["sources"]["before"] == observed["sources"]["after"]
    assert list(observed["sources"]["after"]) == [
        "laplace", "calibration", "evaluation", "lin_setup", "GGN", "set_lin_pushforward",
    ]  # fmt: skip
    for name, source in observed["sources"]["after"].items():
        assert source.startswith(f"def {name}(")
    assert observed["untouched"]


def run(code: str, *args: str) -> Any:
    """What a script prints as JSON, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PROBLEM = """
import functools, importlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from loguru import logger
from jaxtyping import install_import_hook

logger.remove()

def problem():
    rng = np.random.default_rng(0)
    params = {"v": rng.normal(size=(4, 2)), "w": rng.normal(size=(3, 4))}
    data = {"input": rng.normal(size=(5, 3)), "target": rng.normal(size=(5, 2))}
    return jax.tree.map(jnp.asarray, (params, data))

def model_fn(input, params):
    return jnp.tanh(input @ params["w"]) @ params["v"]

def error():
    # Of laplax with "kfac", relative to what this package computes by itself.
    import laplax, laplax_kfac
    params, data = problem()
    posterior_fn, curv = laplax.laplace(model_fn, params, data, loss_fn="mse", curv_type="kfac")
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    prior, _ = laplax.calibration(
        posterior_fn, model_fn, params, data, loss_fn="mse", curv_estimate=curv, curv_type="kfac",
        grid_size=2,
    )
    keep = laplax.eval.transfer_entry(["pred_std"])
    found, _ = laplax.evaluation(posterior_fn, model_fn, params, prior, data, metrics=keep)
    exact = laplax_kfac.predictive_variance(
        curvature, model_fn, params, data["input"], prior_prec=prior["prior_prec"]
    )
    return [
        float(jnp.abs(curv.to_dense() - curvature.to_dense()).max()),
        float(jnp.abs(found["pred_std"] ** 2 / exact.variance - 1).max()),
        len(laplax.laplace(model_fn, params, data, loss_fn="mse", curv_type="full")[1]),
    ]
"""

WRAPPED = {
    "decorated": """
import laplax, laplax.api

def timed(f):
    @functools.wraps(f)
    def g(*a, **k):
        return f(*a, **k)
    return g

for name in ("laplace", "GGN", "calibration", "evaluation", "set_lin_pushforward"):
    setattr(laplax.api, name, timed(getattr(laplax.api, name)))
laplax.laplace = laplax.api.laplace
""",
    "decorated without its signature": """
import laplax, laplax.api

def timed(f):
    return lambda *a, **k: f(*a, **k)

laplax.laplace = laplax.api.laplace = timed(laplax.api.laplace)
laplax.api.GGN = timed(laplax.api.GGN)
""",
    "checked by an import hook": """
with install_import_hook("laplax", None):
    import laplax
assert laplax.api.laplace.__closure__ is not None
""",
    "decorated after us": """
import laplax, laplax.api, laplax_kfac

def timed(f):
    @functools.wraps(f)
    def g(*a, **k):
        return f(*a, **k)
    return g

for name in ("laplace", "GGN", "set_lin_pushforward", "evaluate_metrics_on_dataset"):
    setattr(laplax.api, name, timed(getattr(laplax.api, name)))
laplax.laplace = laplax.api.laplace
laplax_kfac.laplax_adapter.register()
""",
    "reloaded": """
import laplax_kfac

ADAPTER = [name for name in sys.modules if name.startswith("laplax_kfac.laplax_adapter.")]
assert len(ADAPTER) > 5
for again in range(2):
    for name in ADAPTER:  # in the order in which they were imported
        importlib.reload(sys.modules[name])
    laplax_kfac.laplax_adapter.registration.register()
    laplax_kfac.laplax_adapter.registration.register()
from laplax.enums import CurvApprox
assert CurvApprox.KFAC is CurvApprox("KFAC")
""",
    "with us checked by an import hook": """
with install_import_hook("laplax_kfac.laplax_adapter", "beartype.beartype"):
    import laplax_kfac
""",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_laplax_that_others_have_wrapped_fits_calibrates_and_evaluates(how):
    curvature, variance, size = run(PROBLEM + WRAPPED[how] + "print(json.dumps(error()))")
    assert curvature == 0
    assert variance < 1e-4
    assert size == 20
