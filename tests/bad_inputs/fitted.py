"""A small classifier and a small regression, fitted once, and calls that succeed as they stand."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
from support.matrices import normal

import laplax_kfac as lk
from laplax_kfac.evidence.minimisation import minimise

X = normal(8, 3)
LABELS = np.arange(8) % 2
Y = normal(8, 2, seed=1)
PARAMS = {
    "first": {"w": normal(3, 4, seed=2), "b": np.zeros(4, np.float32)},
    "last": {"w": normal(4, 2, seed=3), "b": np.zeros(2, np.float32)},
}
KEY = jax.random.key(0)


def model(input, params):
    hidden = jnp.tanh(input @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["last"]["w"] + params["last"]["b"]


CLASSES: dict[str, Any] = {
    "model_fn": model, "params": PARAMS, "data": (X, LABELS), "loss_fn": "cross_entropy",
}  # fmt: skip
REGRESSION: dict[str, Any] = CLASSES | {"data": (X, Y), "loss_fn": "mse"}


@functools.cache
def fitted() -> SimpleNamespace:
    """What rows share: curvatures, the posterior, the fits, a predictive."""
    accumulator = lk.accumulator(model, PARAMS, loss_fn="mse")
    state = accumulator.update(accumulator.init(), (X, Y))
    curvature = lk.kfac(**CLASSES)
    return SimpleNamespace(
        curvature=curvature,
        of_regression=accumulator.finalize(state),
        posterior=lk.make_posterior(curvature, 1.0),
        fit=lk.data_fit(**CLASSES),
        regression_fit=lk.data_fit(**REGRESSION),
        predictive=lk.Predictive(jnp.zeros((2, 2)), jnp.stack([jnp.eye(2)] * 2)),
        marginals=lk.Marginals(jnp.zeros((2, 2)), jnp.ones((2, 2))),
        accumulator=accumulator,
        state=state,
    )


def of_curvature(**changes: Any) -> dict[str, Any]:
    """Arguments of a predictive."""
    good = {"curvature": fitted().curvature, "model_fn": model, "params": PARAMS, "inputs": X[:2]}
    return good | {"prior_prec": 1.0} | changes


def of_evidence(**changes: Any) -> dict[str, Any]:
    """Arguments of the evidence of the regression."""
    good = {"curvature": fitted().of_regression, "params": PARAMS, "prior_prec": 1.0}
    return good | {"log_likelihood": fitted().regression_fit} | changes


def posterior_by_laplax(**prior_arguments: Any) -> object:
    """The posterior that laplax makes of a curvature of ours."""
    posterior_fn, _ = laplax.laplace(**CLASSES, curv_type="kfac")
    return posterior_fn({"prior_prec": 1.0} | prior_arguments)


CALLS: dict[str, Any] = {
    "kfac": lambda **c: lk.kfac(**CLASSES | c),
    "ekfac": lambda **c: lk.ekfac(**CLASSES | c),
    "kfoc": lambda **c: lk.kfoc(**CLASSES | c),
    "laplace": lambda **c: laplax.laplace(**CLASSES | {"curv_type": "kfac"} | c),
    "posterior_fn": posterior_by_laplax,
    "Options": lk.Options,
    "accumulator": lambda **c: lk.accumulator(
        **{"model_fn": model, "params": PARAMS, "loss_fn": "cross_entropy"} | c
    ),
    "update": lambda **c: fitted().accumulator.update(
        **{"state": fitted().state, "batch": (X, Y)} | c
    ),
    "optimise": lambda **c: fitted().accumulator.optimise(
        **{"state": fitted().state, "passes": lambda: []} | c
    ),
    "find_layers": lambda **c: lk.find_layers(
        **{"model_fn": model, "params": PARAMS, "example_input": X[0]} | c
    ),
    "intermediates_and_gradients": lambda **c: lk.intermediates_and_gradients(**CLASSES | c),
    "relative_error": lambda **c: lk.relative_error(
        **CLASSES | {"curvature": fitted().curvature} | c
    ),
    "data_fit": lambda **c: lk.data_fit(**REGRESSION | c),
    "marglik_training": lambda **c: lk.marglik_training(**REGRESSION | {"epochs": 1} | c),
    "log_marginal_likelihood": lambda **c: lk.log_marginal_likelihood(**of_evidence(**c)),
    "tune": lambda **c: lk.tune(**of_evidence(**c)),
    "minimise": lambda **c: minimise(**{"objective": lambda x: (x - 1) ** 2, "start": 2.0} | c),
    "make_posterior": lambda **c: lk.make_posterior(
        **{"curvature": fitted().curvature, "prior_prec": 1.0} | c
    ),
    "sample": lambda **c: fitted().posterior.sample(
        **{"key": KEY, "num_samples": 1, "mean": PARAMS} | c
    ),
    "Curvature.sample": lambda **c: fitted().curvature.sample(
        **{"key": KEY, "n": 1, "params": PARAMS, "prior_prec": 1.0} | c
    ),
    "logdet": lambda **c: fitted().curvature.logdet(**{"prior_prec": 1.0} | c),
    "inverse_mv": lambda **c: fitted().curvature.inverse_mv(**{"v": PARAMS, "prior_prec": 1.0} | c),
    "predictive_covariance": lambda **c: lk.predictive_covariance(**of_curvature(**c)),
    "predictive_variance": lambda **c: lk.predictive_variance(**of_curvature(**c)),
    "joint_covariance": lambda **c: lk.joint_covariance(**of_curvature(**c)),
    "predictive_samples": lambda **c: lk.predictive_samples(
        **of_curvature(**{"key": KEY, "num_samples": 1} | c)
    ),
    "class_probabilities": lambda **c: lk.class_probabilities(
        **{"predictive": fitted().predictive} | c
    ),
    "with_noise": lambda **c: fitted().predictive.with_noise(**c),
    "Marginals.with_noise": lambda **c: fitted().marginals.with_noise(**c),
    "merge": lambda **c: lk.merge(
        **{"first": fitted().curvature, "second": fitted().curvature} | c
    ),
    "save": lambda **c: lk.save(**{"path": "never written", "x": fitted().curvature} | c),
}
"""Public functions with good arguments, some of which may be changed."""
