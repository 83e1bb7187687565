"""laplax's calibration and evaluation with our curvature types; what laplax refuses is its own."""

import functools
from typing import Any

import jax.numpy as jnp
import laplax
from laplax.eval import metrics

from bad_inputs.fitted import CLASSES, LABELS, PARAMS, X, model
from bad_inputs.rows import Row

DATA = {"input": jnp.asarray(X, jnp.float32), "target": jnp.asarray(LABELS)}
FEATURES = {"input": jnp.ones((8, 4)), "target": DATA["target"]}
RENAMED = {"frist": PARAMS["first"], "last": PARAMS["last"]}
FAILS = "`model_fn` fails on one example"


def swapped(params, inputs):
    return model(inputs, params)


@functools.cache
def fit():
    return laplax.laplace(**CLASSES, curv_type="kfac")


def calibrate(model_fn=model, params=PARAMS, data=DATA, **options: Any):
    posterior_fn, curvature = fit()
    return laplax.calibration(
        posterior_fn, model_fn, params, data, loss_fn="cross_entropy", curv_estimate=curvature,
        curv_type="kfac", **options,
    )  # fmt: skip


def evaluate(model_fn=model, params=PARAMS, prior: Any = None, data=DATA):
    return laplax.evaluation(
        fit()[0], model_fn, params, {"prior_prec": 1.0} if prior is None else prior, data,
        metrics=[metrics.estimate_rmse], predictive_type="none",
    )  # fmt: skip


calibrate_by_grid = functools.partial(calibrate, grid_size=3)
tune = functools.partial(calibrate, calibration_method="tune")

ROWS: list[Row] = [
    *[
        Row(f"{name} {what}", functools.partial(call, **changes), TypeError, text, "model_fn")
        for name, call in (("calibration", calibrate_by_grid), ("evaluation", evaluate))
        for what, changes, text in (
            ("with 4 features", {"data": FEATURES}, FAILS),
            ("with other parameters", {"params": RENAMED}, FAILS),
            ("with other names", {"model_fn": swapped}, "`lambda input, params: swapped(params"),
        )
    ],
    *[
        Row(f"evaluation at {prior}", functools.partial(evaluate, prior=prior), error, text, named)
        for prior, error, text, named in (
            ({"prior": 1.0}, ValueError, "Did you mean 'prior_prec'?", "prior_arguments"),
            ({"prior_prec": -1.0}, ValueError, "positive and finite", "prior_prec"),
            ({"prior_prec": "1"}, TypeError, "real numbers", "prior_prec"),
            ({"prior_prec": 1.0, "sigma_squared": 0.0}, ValueError, "positive", "sigma_squared"),
        )
    ],
    *[
        Row(
            f"calibration by tune {name}={value!r}",
            functools.partial(tune, **{name: value}),
            error,
            text,
            name,
        )
        for name, value, error, text in (
            ("steps", 0, ValueError, "must be a positive integer"),
            ("steps", "8", ValueError, "must be a positive integer"),
            ("bounds", (2.0, 1.0), ValueError, "must be two positive numbers"),
            ("tolerance", -1.0, ValueError, "must be positive"),
            ("tolerance", "1", TypeError, "must be a real number"),
            ("grid_size", 3, TypeError, "is no option of calibration method 'tune'"),
            ("tolerence", 0.1, TypeError, "Did you mean 'tolerance'?"),
        )
    ],
]
