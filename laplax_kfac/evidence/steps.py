"""One step of training: of the parameters on a batch, of the hyperparameters on the evidence."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from laplax_kfac.capture.batches import WeightedBatch
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.evidence.evidence import Evidence
from laplax_kfac.evidence.fit import FitOfBatch
from laplax_kfac.evidence.problem import PriorFunction, Problem
from laplax_kfac.parsing.layout import as_pairs, of_pairs
from laplax_kfac.posterior.posterior import as_prior, prior_mean_of
from laplax_kfac.posterior.prior import Scalar, prior_distance


def trainable(params: PyTree) -> PyTree:
    """The parameters as the optimizer moves them: without integers, complex numbers as pairs.

    JAX's gradient in a complex number is the conjugate of the direction in which a function grows.
    """

    def moved(p: ArrayLike) -> ArrayLike | None:
        if jnp.iscomplexobj(p):
            return as_pairs(p)
        return p if jnp.issubdtype(jnp.result_type(p), jnp.inexact) else None

    return jax.tree.map(moved, params)


def completed(moving: PyTree, params: PyTree) -> PyTree:
    """The parameters with their leaves of integers and of complex numbers again."""

    def pick(new: ArrayLike | None, old: ArrayLike) -> ArrayLike:
        if new is None:
            return old
        return of_pairs(jnp.asarray(new)) if jnp.iscomplexobj(old) else new

    return jax.tree.map(pick, moving, params, is_leaf=lambda x: x is None)


class Target(NamedTuple):
    """What the parameters are trained for, besides the data.

    Attributes:
        values: The hyperparameters, and the noise variance where the likelihood has one.
        curvature: A curvature of the model, for its layers.
        prior_mean: Mean of the prior.
        num_examples: Number of examples of all data.
    """

    values: PyTree
    curvature: Curvature
    prior_mean: PyTree | None
    num_examples: Scalar


def training_step(
    optimizer: optax.GradientTransformation,
    of_batch: FitOfBatch,
    function: PriorFunction,
) -> Callable[..., tuple[PyTree, PyTree, Array]]:
    """One step of the optimizer on a batch."""

    def objective(
        moving: PyTree, params: PyTree, part: WeightedBatch, target: Target
    ) -> Float[Array, ""]:
        params, (batch, weights) = completed(moving, params), part
        fit, _ = of_batch(params, batch, weights, jnp.uint32(0))
        likelihood = fit.log_likelihood(target.values.get("noise_variance"))
        prior = function(target.values["hyperparameters"])
        mean = prior_mean_of(prior, target.prior_mean)
        distance = prior_distance(as_prior(prior), target.curvature, params, mean)
        return -likelihood / jnp.sum(weights) + 0.5 * distance / target.num_examples

    with_extras = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(
        params: PyTree, inner: PyTree, part: WeightedBatch, target: Target
    ) -> tuple[PyTree, PyTree, Array]:
        moving = trainable(params)
        loss, gradient = jax.value_and_grad(objective)(moving, params, part, target)
        updates, inner = with_extras.update(  # line searches evaluate the objective again
            gradient,
            inner,
            moving,
            value=loss,
            grad=gradient,
            value_fn=lambda moving: objective(moving, params, part, target),
        )
        return completed(optax.apply_updates(moving, updates), params), inner, loss

    return step


def evidence_step(
    optimizer: optax.GradientTransformation,
    function: PriorFunction,
    steps: int,
    limits: Float[Array, "2"],
) -> Callable[[Problem, PyTree, PyTree], tuple[PyTree, PyTree, Evidence]]:
    """Some steps up the evidence, and the evidence after them."""

    @jax.jit
    def climb(problem: Problem, logs: PyTree, inner: PyTree) -> tuple[PyTree, PyTree, Evidence]:
        def evidence(logs: PyTree) -> Evidence:
            return problem.evidence(function, jax.tree.map(jnp.exp, logs))

        def one(state: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            logs, inner = state
            gradient = jax.grad(lambda logs: -evidence(logs).value)(logs)
            updates, inner = optimizer.update(gradient, inner, logs)
            moved = optax.apply_updates(logs, updates)
            return (jax.tree.map(lambda x: jnp.clip(x, *limits), moved), inner), None

        (logs, inner), _ = jax.lax.scan(one, (logs, inner), length=steps)
        return logs, inner, evidence(logs)

    return climb
