"""kfac-jax: its curvature estimator, without its optimizer."""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import models_jax
import workloads
from jax import Array
from worker import Task

MODES = {"type2": "fisher_exact", "mc": "fisher_gradients", "empirical": "fisher_empirical"}


def versions() -> dict[str, str]:
    """Those of an environment of its own, whose jax is not that of the others."""
    of = importlib.metadata.version
    return {"kfac-jax": of("kfac-jax"), "jax under kfac-jax": of("jax")}


class Estimator:
    """The estimator, its batches, and its compiled update."""

    def __init__(self, case: dict[str, Any], mode: str):
        workload = workloads.from_description(case["workload"])
        forward = models_jax.forward(workload)

        def loss(params: models_jax.Params, batch: tuple[Array, Array]) -> Array:
            logits = forward(params, batch[0])
            kfac_jax.register_softmax_cross_entropy_loss(logits, batch[1])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1)
            return -jnp.mean(picked)

        self.params = {name: jnp.asarray(w) for name, w in workloads.weights(workload).items()}
        x, y = (jnp.asarray(a) for a in workloads.data(workload))
        size = workload.batch_size
        self.batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
        self.fraction = workload.fraction
        estimator = kfac_jax.BlockDiagonalCurvature(loss)
        arguments = (self.params, self.batches[0])
        estimator.finalize(arguments)

        def init(key: Array) -> Any:
            return estimator.init(key, arguments, (-1,), None, cache_eigenvalues=True)

        def update(state: Any, key: Array, params: Any, batch: Any) -> Any:
            return estimator.update_curvature_matrix_estimate(
                state, ema_old=1.0, ema_new=1.0, identity_weight=0.0, batch_size=size,
                rng=key, func_args=(params, batch), estimation_mode=mode,
            )  # fmt: skip

        def decompose(state: Any) -> Any:
            return estimator.update_cache(
                state, identity_weight=1e-3, exact_powers=(-1,), approx_powers=None,
                eigenvalues=True, pmap_axis_name=None,
            )  # fmt: skip

        self.estimator = estimator
        self.init, self.update = jax.jit(init), jax.jit(update)
        self.decompose = jax.jit(decompose)

    def factors(self) -> Any:
        state = self.init(jax.random.key(0))
        for i, batch in enumerate(self.batches):
            state = self.update(state, jax.random.key(i), self.params, batch)
        return jax.block_until_ready(state)


def factors(_: str, case: dict[str, Any]) -> Task:
    estimator = Estimator(case, MODES[case["variant"]])
    return Task(estimator.factors, fraction=estimator.fraction)


def eigen(_: str, case: dict[str, Any]) -> Task:
    estimator = Estimator(case, MODES["mc"])
    state = estimator.factors()
    return Task(lambda: jax.block_until_ready(estimator.decompose(state)))


def cold(_: str, case: dict[str, Any]) -> Task:
    """From the loss function to factors, eigenvalues and inverses."""

    def run() -> Any:
        estimator = Estimator(case, MODES["type2"])
        return jax.block_until_ready(estimator.decompose(estimator.factors()))

    return Task(run)


QUESTIONS = {"factors": factors, "eigen": eigen, "cold": cold}
