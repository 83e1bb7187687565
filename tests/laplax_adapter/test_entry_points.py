"""The whole table: "kfac" and "full" agree through every entry point of laplax, in both precisions.

The models are linear with a bias that is joint with the weight, so that KFAC is the exact matrix.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import laplax.register
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from laplax.curv.cov import create_posterior_fn, estimate_curvature, set_posterior_fn
from laplax.curv.ggn import create_ggn_mv
from laplax.enums import CurvApprox
from laplax.eval.calibrate import optimize_prior_prec
from laplax.eval.likelihood import marginal_log_likelihood
from laplax.eval.pushforward import (
    lin_pred_cov,
    lin_pred_mean,
    lin_pred_std,
    lin_pred_var,
    lin_setup,
    set_lin_pushforward,
    set_posterior_gp_kernel,
)
from laplax.eval.utils import transfer_entry
from support.matrices import normal

from laplax_kfac import laplax_adapter

RELATIVE = {"float32": 1e-5, "float64": 1e-10}
PRIOR = {"prior_prec": 0.3}


def linear(input, params):
    return input @ params["w"] + params["b"]


@dataclass(frozen=True, eq=False)
class Task:
    """A linear model with data."""

    loss_fn: str
    params: Any
    data: dict[str, Any]

    def of(self, dtype: str) -> "Task":
        """The task in one precision."""

        def cast(x: Any) -> Any:
            return jnp.asarray(x, None if x.dtype == int else dtype)

        return Task(self.loss_fn, *jax.tree.map(cast, (self.params, self.data)))


X, MORE = normal(6, 3, seed=1), normal(4, 3, seed=6)
REGRESSION = Task(
    "mse",
    {"b": normal(2, seed=2), "w": normal(3, 2, seed=3)},
    {"input": X, "target": normal(6, 2, seed=4)},
)
# Weights of zero: one output for all inputs, and so one output Hessian for all examples.
CLASSES = Task(
    "cross_entropy",
    {"b": normal(3, seed=2), "w": np.zeros((3, 3))},
    {"input": X, "target": np.asarray([0, 1, 2, 2, 1, 0])},
)


@functools.cache
def in_precision(task: Task, dtype: str) -> Task:
    return task.of(dtype)


@functools.cache
def fit(task: Task, curv_type: str) -> Any:
    """laplax's posterior function and curvature; the task is one of `in_precision`."""
    return laplax.laplace(linear, task.params, task.data, loss_fn=task.loss_fn, curv_type=curv_type)


def dense(curvature: Any) -> Any:
    return curvature if isinstance(curvature, jax.Array) else curvature.to_dense()


def covariance(posterior_fn: Any, task: Task) -> Any:
    """The covariance, and the one that laplax's products with its square root have."""
    posterior = posterior_fn(PRIOR)
    flat, unravel = ravel_pytree(task.params)

    def matrix(mv: Any) -> Any:
        columns = jax.vmap(lambda v: ravel_pytree(mv(unravel(v)))[0])
        return jax.jit(columns)(jnp.eye(flat.size, dtype=flat.dtype)).T

    scale = matrix(posterior.scale_mv(posterior.state))
    return {"cov": matrix(posterior.cov_mv(posterior.state)), "scale": scale @ scale.T}


# -- the entry points ----------------------------------------------------------------------------


def by_laplace(task: Task, curv_type: str) -> Any:
    posterior_fn, curvature = fit(task, curv_type)
    return {"curvature": dense(curvature), **covariance(posterior_fn, task)}


def by_estimate_curvature(task: Task, curv_type: str) -> Any:
    return dense(estimate_curvature(curv_type, layout=task.params, **source(task, curv_type)))


def by_set_posterior_fn(task: Task, curv_type: str) -> Any:
    posterior_fn = set_posterior_fn(curv_type, fit(task, curv_type)[1], layout=task.params)
    return covariance(posterior_fn, task)


def by_create_posterior_fn(task: Task, curv_type: str) -> Any:
    options = source(task, curv_type)
    return covariance(create_posterior_fn(curv_type, layout=task.params, **options), task)


def source(task: Task, curv_type: str) -> dict[str, Any]:
    """What the curvature is estimated from."""
    if curv_type == "full":
        mv = create_ggn_mv(
            linear, task.params, task.data, task.loss_fn, num_curv_samples=1, num_total_samples=1
        )
        return {"mv": mv}
    return {"mv": None, "model_fn": linear, "data": task.data, "loss_fn": task.loss_fn}


def by_registered_method(task: Task, curv_type: str) -> Any:
    name = f"mine_{curv_type}"
    laplax.register.register_curvature_method(name, default=curv_type)
    options = source(task, curv_type)
    curvature = estimate_curvature(name, layout=task.params, **options)
    posterior_fn = set_posterior_fn(name, curvature, layout=task.params)
    return {"evidence": evidence(task, name, curvature), **covariance(posterior_fn, task)}


def by_marginal_log_likelihood(task: Task, curv_type: str) -> Any:
    return evidence(task, curv_type, fit(task, curv_type)[1])


def evidence(task: Task, curv_type: str, curvature: Any) -> Any:
    return marginal_log_likelihood(
        curvature, PRIOR, task.data, linear, task.params, task.loss_fn, curv_type,
        vmap_over_data=True,
    )  # fmt: skip


def by_pushforward(task: Task, curv_type: str) -> Any:
    predict = set_lin_pushforward(
        linear, task.params, fit(task, curv_type)[0], PRIOR,
        pushforward_fns=[lin_setup, lin_pred_mean, lin_pred_cov, lin_pred_var, lin_pred_std],
    )  # fmt: skip
    return jax.jit(jax.vmap(predict))(MORE.astype(task.params["w"].dtype))


def by_kernel(task: Task, curv_type: str) -> Any:
    outputs = task.params["b"].size
    kernel, _ = set_posterior_gp_kernel(
        linear, task.params, fit(task, curv_type)[0], PRIOR, dense=True, output_layout=outputs
    )
    return jax.jit(kernel)(*MORE.astype(task.params["w"].dtype)[:2])


def calibration(method: str, objective: str, predictive_type: str = "none") -> Any:
    """Calibrate, and return what the objective was at every prior precision."""

    def calibrate(task: Task, curv_type: str) -> Any:
        posterior_fn, curvature = fit(task, curv_type)
        seen: list[Any] = []

        def search(objective: Any, data: Any = None, **options: Any) -> Any:
            if data is not None:
                precisions = jnp.asarray([0.1, 1.0, 20.0], task.params["w"].dtype)
                seen.extend(objective({"prior_prec": p}, data) for p in precisions)
                return {"prior_prec": precisions[0]}

            def seeing(prior: Any) -> Any:
                seen.append(objective(prior))
                return seen[-1]

            return optimize_prior_prec(seeing, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(laplax.api.calibration_options, method, search)
            prior, _ = laplax.calibration(
                posterior_fn, linear, task.params, task.data, loss_fn=task.loss_fn,
                curv_estimate=curvature, curv_type=curv_type, calibration_objective=objective,
                predictive_type=predictive_type, calibration_method=method,
                **({"grid_size": 3} if method == "grid_search" else {}),
            )  # fmt: skip
        assert len(seen) == 3
        return {"seen": jnp.stack(seen), **prior}

    calibrate.__name__ = f"calibration-{method}-{objective}-{predictive_type}"
    return calibrate


class Loader:
    """Batches of two."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        for a in range(0, len(self.data["input"]), 2):
            yield {name: values[a : a + 2] for name, values in self.data.items()}


def evaluation(predictive_type: str = "none", loader: bool = False, **options: Any) -> Any:
    """Evaluate on new inputs."""

    def evaluate(task: Task, curv_type: str) -> Any:
        data = {"input": MORE.astype(task.params["w"].dtype), "target": task.data["target"][:4]}
        given = {"metrics": "regression", "num_samples": 0, **options}
        results, predict = laplax.evaluation(
            fit(task, curv_type)[0], linear, task.params, PRIOR,
            Loader(data) if loader else data, predictive_type=predictive_type, **given,
        )  # fmt: skip
        if predictive_type == "none" and not loader:  # it takes inputs, as laplax's own does
            return {**results, "one": predict(data["input"][0])}
        return results

    evaluate.__name__ = f"evaluation-{predictive_type}{'-loader' * loader}"
    return evaluate


PREDICTIONS = transfer_entry(["map", "pred_act", "pred_mean", "pred_std"])
ENTRIES: list[tuple[Callable[[Task, str], Any], Task]] = [
    (by_laplace, REGRESSION),
    (by_laplace, CLASSES),
    (by_estimate_curvature, REGRESSION),
    (by_set_posterior_fn, REGRESSION),
    (by_create_posterior_fn, REGRESSION),
    (by_registered_method, REGRESSION),
    (by_marginal_log_likelihood, REGRESSION),
    (by_pushforward, REGRESSION),
    (by_pushforward, CLASSES),
    (by_kernel, REGRESSION),
    (calibration("grid_search", "nll"), REGRESSION),
    (calibration("grid_search", "chi_squared"), REGRESSION),
    (calibration("grid_search", "marginal_log_likelihood"), REGRESSION),
    (calibration("grid_search", "nll", "mean_field_0"), CLASSES),
    (calibration("grid_search", "ece", "mean_field_1"), CLASSES),
    (calibration("grid_search", "ece", "mean_field_2"), CLASSES),
    (calibration("of my own", "nll"), REGRESSION),
    (evaluation(), REGRESSION),
    (evaluation(loader=True), REGRESSION),
    (evaluation("mean_field_0", metrics=PREDICTIONS), CLASSES),
    (evaluation("mean_field_1", metrics=PREDICTIONS), CLASSES),
    (evaluation("mean_field_2", metrics=PREDICTIONS), CLASSES),
    (evaluation("mean_field_2", metrics=PREDICTIONS, loader=True), CLASSES),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("entry", "task"), ENTRIES, ids=[f"{entry.__name__}-{task.loss_fn}" for entry, task in ENTRIES]
)
def test_kfac_agrees_with_full(entry, task, dtype):
    with jax.enable_x64(dtype == "float64"):
        here = in_precision(task, dtype)
        found, full = (jax.tree.leaves_with_path(entry(here, name)) for name in ("kfac", "full"))
        assert len(found) == len(full) > 0
        for (path, got), (expected_path, expected) in zip(found, full, strict=True):
            assert path == expected_path
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            error, size = np.abs(got - expected).max(), np.abs(expected).max()
            assert error <= RELATIVE[dtype] * size, (jax.tree_util.keystr(path), error, size)
            assert np.isfinite(size)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", list(laplax_adapter.CURVATURE_TYPES))
def test_names_are_accepted_in_any_case_and_as_members(name, monkeypatch):
    task = in_precision(REGRESSION, "float64")
    curvature = fit(task, "kfac")[1]
    # Only the way to the function matters here.
    monkeypatch.setitem(laplax_adapter.CURVATURE_TYPES, name, lambda *_, **__: curvature)
    member = getattr(CurvApprox, name.upper())
    assert member is CurvApprox(name)
    assert member == name
    data = {"loss_fn": "mse", "data": task.data, "model_fn": linear}
    for spelling in (name, name.upper(), name.capitalize(), name[:-1] + name[-1].upper(), member):
        laplax.register.register_curvature_method("mine", default=spelling)
        for registered in (spelling, "mine"):
            options = {"mv": None, "layout": task.params, **data}
            assert estimate_curvature(registered, **options).trace() == curvature.trace()
            for posterior_fn in (
                laplax.laplace(params=task.params, curv_type=registered, **data)[0],
                set_posterior_fn(registered, curvature, layout=task.params),
                create_posterior_fn(registered, **options),
            ):
                posterior = posterior_fn(PRIOR).state
                assert posterior.log_determinant() == pytest.approx(log_determinant(task))
            assert evidence(task, registered, curvature) == evidence(task, "kfac", curvature)


def log_determinant(task):
    precision = np.asarray(fit(task, "full")[1])
    return np.linalg.slogdet(precision + PRIOR["prior_prec"] * np.eye(len(precision)))[1]


@pytest.mark.usefixtures("x64")
def test_calibration_takes_names_in_any_case():
    task = in_precision(REGRESSION, "float64")
    entry = calibration("of my own", "nll")
    for spelling in ("KFAC", CurvApprox.KFAC):
        np.testing.assert_array_equal(entry(task, spelling)["seen"], entry(task, "kfac")["seen"])
