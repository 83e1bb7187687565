"""laplax_kfac, laplax's own curvatures, and the machine's rate of matrix products."""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laplax
import models_jax
import workloads
from jax import Array
from laplax.curv.cov import Posterior, set_posterior_fn
from laplax.eval.pushforward import (
    lin_pred_cov,
    lin_pred_mean,
    lin_setup,
    set_get_weight_sample,
    set_lin_pushforward,
)
from loguru import logger
from worker import Task

import laplax_kfac

logger.remove()  # laplax logs every step

LOSS = "cross_entropy"
PRIOR = 1.0


class Setting(NamedTuple):
    """A workload in JAX."""

    workload: workloads.Workload
    model_fn: Callable[..., Array]
    params: models_jax.Params
    x: Array
    y: Array

    @property
    def batches(self) -> list[tuple[Array, Array]]:
        """The data in batches."""
        size = self.workload.batch_size
        starts = range(0, len(self.x), size)
        return [(self.x[i : i + size], self.y[i : i + size]) for i in starts]


def setting(case: dict[str, Any]) -> Setting:
    workload = workloads.from_description(case["workload"])
    forward = models_jax.forward(workload)

    def model_fn(input: Array, params: models_jax.Params) -> Array:
        return forward(params, input)

    params = {name: jnp.asarray(w) for name, w in workloads.weights(workload).items()}
    x, y = (jnp.asarray(a) for a in workloads.data(workload))
    return Setting(workload, model_fn, params, x, y)


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "laplax", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    device = jax.devices()[0]
    kind = {} if device.platform == "cpu" else {"device": device.device_kind}
    return {**found, "laplax_kfac": laplax_kfac.__version__, **kind}


# -- laplax_kfac -------------------------------------------------------------------------------


def factors(_: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    accumulator = laplax_kfac.accumulator(
        s.model_fn, s.params, loss_fn=LOSS, fisher_type=case["variant"]
    )
    batches, size = s.batches, s.workload.batch_size

    def run() -> Any:
        """What `kfac` does before the eigendecompositions."""
        return jax.block_until_ready(accumulator.collect(accumulator.parts(batches, size)))

    return Task(run, trace, s.workload.fraction)


def trace(state: Any) -> float:
    """Trace of the curvature, without the eigendecompositions that `finalize` does."""
    total = 0.0
    for sums in state.sums:
        inputs, outputs = (jnp.einsum("ukii->uk", x) for x in (sums.inputs, sums.outputs))
        total += float(jnp.sum(inputs * outputs / sums.count))
    return total


def ekfac(_: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    options: dict[str, Any] = {
        "loss_fn": LOSS,
        "fisher_type": case["variant"],
        "batch_size": s.workload.batch_size,
    }
    batches = s.batches

    def run() -> Any:
        return jax.block_until_ready(laplax_kfac.ekfac(s.model_fn, s.params, batches, **options))

    return Task(run, lambda curv: float(curv.trace()))


def eigen(_: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    accumulator = laplax_kfac.accumulator(s.model_fn, s.params, loss_fn=LOSS, fisher_type="mc")
    state = accumulator.collect(accumulator.parts(s.batches, s.workload.batch_size))
    jax.block_until_ready(state)
    return Task(lambda: jax.block_until_ready(accumulator.finalize(state)))


def fitted(s: Setting) -> laplax_kfac.Curvature:
    """A posterior to predict with; ``mc`` is the quickest to get."""
    curv = laplax_kfac.kfac(
        s.model_fn, s.params, s.batches, loss_fn=LOSS, fisher_type="mc",
        batch_size=s.workload.batch_size,
    )  # fmt: skip
    return jax.block_until_ready(curv)


def evidence(_: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    curv = fitted(s)
    fit = laplax_kfac.data_fit(s.model_fn, s.params, s.batches, loss_fn=LOSS)

    def value(prior_prec: Array, curv: Any, params: Any, fit: Any) -> Array:
        return laplax_kfac.log_marginal_likelihood(
            curv, params, log_likelihood=fit, prior_prec=prior_prec
        ).value

    both = jax.jit(jax.value_and_grad(value))
    prior_prec = jnp.asarray(PRIOR)
    return Task(lambda: jax.block_until_ready(both(prior_prec, curv, s.params, fit)))


def predictive(contender: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    if contender == "laplax":
        return predictive_of_laplax(s, case)
    curv = fitted(s)
    inputs = jnp.asarray(workloads.data(s.workload.sized(case["variant"], 1))[0])

    def run() -> Any:
        found = laplax_kfac.predictive_covariance(
            curv, s.model_fn, s.params, inputs, prior_prec=PRIOR
        )
        return jax.block_until_ready(found)

    return Task(run, lambda out: mean_variance(out.covariance))


def mean_variance(covariance: Array) -> float:
    """Of the outputs at the first two inputs, which all contenders predict."""
    return float(jnp.mean(jnp.trace(covariance[:2], axis1=1, axis2=2)))


def samples(contender: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    curv, number = fitted(s), case["variant"]
    key = jax.random.key(0)
    if contender == "laplax_kfac":

        @jax.jit
        def draw(curv: Any, params: Any) -> Any:
            return curv.sample(key, number, params, prior_prec=PRIOR)

        return Task(lambda: jax.block_until_ready(draw(curv, s.params)))

    @jax.jit
    def draw_by_laplax(curv: Any, params: Any) -> Any:
        posterior = set_posterior_fn("kfac", curv, layout=params)({"prior_prec": PRIOR})
        sample = set_get_weight_sample(
            key,
            params,
            posterior.scale_mv(posterior.state),
            number,
            set_get_weight_sample_precompute=False,
        )
        return jax.lax.map(sample, jnp.arange(number))

    return Task(lambda: jax.block_until_ready(draw_by_laplax(curv, s.params)))


def cold(contender: str, case: dict[str, Any]) -> Task:
    """A whole call of `laplax.laplace`; options of laplax's own types as it has them."""
    s = setting(case)
    _, _, own_type = contender.partition(" ")
    data: Any = {"input": s.x, "target": s.y}
    options: dict[str, Any] = {"curv_type": own_type or "kfac"}
    if not own_type:
        options["batch_size"] = s.workload.batch_size
    if own_type == "lanczos":
        options["key"] = jax.random.key(0)

    def run() -> Any:
        _, curv = laplax.laplace(s.model_fn, s.params, data, loss_fn=LOSS, **options)
        return jax.block_until_ready(curv)

    return Task(run)


# -- laplax ------------------------------------------------------------------------------------


def predictive_of_laplax(s: Setting, case: dict[str, Any]) -> Task:
    """The linear pushforward of laplax with our posterior: one product with it an output."""
    curv, number = fitted(s), case["few"]

    @jax.jit
    def covariance(curv: Any, params: Any, inputs: Array) -> Array:
        posterior_fn = set_posterior_fn("kfac", curv, layout=params)

        def unknown(*arguments: Any, **named: Any) -> Posterior:
            # With its state in a list a posterior is not known as ours: laplax's own code runs.
            ours = posterior_fn(*arguments, **named)
            return Posterior(
                [ours.state], lambda s: ours.cov_mv(s[0]), lambda s: ours.scale_mv(s[0])
            )

        predict = set_lin_pushforward(
            model_fn=s.model_fn, mean_params=params, posterior_fn=unknown,
            prior_arguments={"prior_prec": PRIOR},
            pushforward_fns=[lin_setup, lin_pred_mean, lin_pred_cov],
        )  # fmt: skip
        return jax.lax.map(lambda x: predict(x)["pred_cov"], inputs)

    run = lambda: jax.block_until_ready(covariance(curv, s.params, s.x[:number]))  # noqa: E731
    return Task(run, mean_variance, fraction=number / case["variant"])


# -- the machine -------------------------------------------------------------------------------


def rate(_: str, __: dict[str, Any]) -> Task:
    """Products of square float32 matrices, `workloads.RATE_OPERATIONS` operations in all."""
    size = workloads.RATE_SIZE
    x, y = (jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))
    product = jax.jit(jnp.matmul)
    return Task(lambda: [product(x, y).block_until_ready() for _ in range(workloads.RATE_REPEATS)])


# -- parts of a pass, for the profile ----------------------------------------------------------


def breakdown(_: str, case: dict[str, Any]) -> Task:
    """Forward passes, pullbacks by plain `jax.vjp`, the factor pass, the eigendecompositions."""
    s = setting(case)
    part, _, fisher_type = case["variant"].partition(" ")
    if part == "factors":
        return factors("", case | {"variant": fisher_type})
    if part == "eigendecompositions":
        return eigen("", case)
    forward = models_jax.forward(s.workload)
    vectors = jnp.eye(s.workload.classes)[: workloads.columns(s.workload, fisher_type)]

    def pulled(params: models_jax.Params, x: Array) -> Any:
        """Cotangents of one example's biases: those of the layers' outputs, over positions."""
        biases = {name: b for name, b in params.items() if name.endswith("_b")}
        _, pullback = jax.vjp(lambda biases: forward({**params, **biases}, x), biases)
        return jax.vmap(pullback)(vectors)

    step = jax.jit(jax.vmap(forward if part == "forward" else pulled, in_axes=(None, 0)))
    run = lambda: [jax.block_until_ready(step(s.params, x)) for x, _ in s.batches]  # noqa: E731
    return Task(run, fraction=s.workload.fraction)


QUESTIONS = {
    "factors": factors,
    "ekfac": ekfac,
    "eigen": eigen,
    "evidence": evidence,
    "predictive": predictive,
    "samples": samples,
    "cold": cold,
    "growth": factors,
    "rate": rate,
    "breakdown": breakdown,
}
