"""Training alternated with steps on the evidence: parameters and hyperparameters in one run.

Immer et al. (2021), "Scalable marginal likelihood estimation for model selection in deep learning",
arXiv 2104.04975, Algorithm 1. No validation data: of all epochs, the one with the best evidence on
the training data wins.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from tqdm import tqdm

from laplax_kfac import pytrees
from laplax_kfac.capture.batches import (
    Batch,
    WeightedBatch,
    batches,
    even_batches,
    require_several_passes,
    to_arrays,
)
from laplax_kfac.capture.batches import batch_size as size_of
from laplax_kfac.curvature.kfac import DEFAULT_BATCH_SIZE, Curvature, accumulator
from laplax_kfac.evidence.evidence import DataFit, Evidence, fit_of_batch, require_fit, summed_fit
from laplax_kfac.evidence.tuning import (
    DEFAULT_BOUNDS,
    PriorFunction,
    Problem,
    check_start,
    start_of,
)
from laplax_kfac.parsing.program import ModelFn
from laplax_kfac.posterior.posterior import as_prior
from laplax_kfac.posterior.prior import (
    PriorPrecision,
    Scalar,
    log_prior_determinant,
    prior_distance,
)


@pytrees.register
@dataclass(frozen=True)
class Trained:
    """The best model of a run, and how the run went.

    Attributes:
        params: The parameters with the best evidence.
        curvature: Curvature there.
        prior_prec: Prior precision there, as in `Tuned`.
        noise_variance: Noise variance there; None where the likelihood has none.
        evidence: The evidence there.
        epoch: After how many epochs that was.
        trace: Evidence whenever it was computed.
        losses: Mean over every epoch of what is minimised: minus the log joint density, over the
            number of examples.
        hyperparameters: The hyperparameters, where ``prior_prec`` is a function of them.
    """

    params: PyTree
    curvature: Curvature
    prior_prec: PyTree
    noise_variance: Float[Array, ""] | None
    evidence: Evidence
    epoch: int
    trace: Float[np.ndarray, " evidences"]
    losses: Float[np.ndarray, " epochs"]
    hyperparameters: PyTree = None


def marglik_training(
    model_fn: ModelFn,
    params: PyTree,
    data: Any,
    *,
    loss_fn: Any,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 100,
    prior_prec: PriorPrecision | PriorFunction = 1.0,
    hyperparameters: PyTree = None,
    prior_mean: PyTree | None = None,
    noise_variance: Scalar | None = None,
    burn_in: int = 0,
    every: int = 1,
    hyper_steps: int = 50,
    hyper_learning_rate: float = 0.1,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    patience: int | None = None,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    transform: Callable[[Any], Any] | None = None,
    key: Key[Array, ""] | None = None,
    eigenvalue_correction: bool = False,
    progress: bool = False,
    **options: Any,
) -> Trained:
    """Train a model and its hyperparameters by the evidence (Immer et al. 2021, Algorithm 1).

    Parameters follow ``optimizer`` on minus the log joint density; after some epochs the curvature
    is computed, in one streaming pass, and the hyperparameters follow Adam on their logarithms up
    the evidence, with no pass over the data. The model with the best evidence is returned.

    The joint density of all N examples is estimated from a batch of B: its log-likelihood times
    N / B, plus the log prior; and divided by N, so that learning rates mean what they mean for a
    mean loss. Parameters that ``params_filter`` leaves out are trained without a prior.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Where training starts; integer leaves stay as they are.
        data: One batch, which is shuffled anew for every epoch and split, or an iterable of batches
            that starts anew with every epoch (a list, a loader).
        loss_fn: As for `data_fit`.
        optimizer: Any of optax, for the parameters; Adam with learning rate 1e-3 by default.
        epochs: Most passes over the data.
        prior_prec: Where the prior precision starts, or a function of hyperparameters; see `tune`.
        hyperparameters: Where these start.
        prior_mean: Mean of the prior; zero by default.
        noise_variance: Where the noise variance of ``mse`` starts; None leaves it at 1/2.
        burn_in: Epochs before the first step on the evidence.
        every: Epochs between steps on the evidence.
        hyper_steps: Steps of Adam at each; 0 keeps the hyperparameters as they are.
        hyper_learning_rate: Their size, in natural logarithms.
        bounds: Smallest and largest value of every hyperparameter.
        patience: Stop after so many steps on the evidence without a better one; None never stops.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most examples of a batch; larger ones are split.
        transform: Applied to every batch first.
        key: Random key for the order of examples, and for ``fisher_type="mc"``.
        eigenvalue_correction: Whether the curvature is EKFAC; a second pass over the data.
        progress: Whether to show a progress bar over the epochs.
        **options: Other options of `kfac`.

    Raises:
        ValueError: If an option has no sense, if there is nothing to tune, or if the evidence was
            never finite.
        TypeError: If ``data`` or ``loss_fn`` is of an unsupported type.
    """
    _check(epochs=epochs, every=every, hyper_steps=hyper_steps, burn_in=burn_in)
    require_several_passes(data, "`marglik_training`")
    function, start = start_of(prior_prec, hyperparameters, noise_variance)
    check_start(start, bounds)
    key = jax.random.key(0) if key is None else key
    accumulate = accumulator(
        model_fn, params, loss_fn=loss_fn, key=key, vmap_over_data=vmap_over_data, **options
    )
    of_batch = fit_of_batch(model_fn, loss_fn, vmap_over_data=vmap_over_data)
    fit_here = jax.jit(of_batch)

    def stream() -> Iterable[WeightedBatch]:
        return even_batches(batches(data, transform), batch_size)

    def curvature_at(params: PyTree) -> Curvature:
        here = accumulate.at(params)
        state = here.init()
        for batch, weights in stream():
            state = here.update(state, batch, weights)
        curvature = here.finalize(state)
        return here.correct(curvature, stream()) if eigenvalue_correction else curvature

    def fit_at(params: PyTree) -> DataFit:
        return summed_fit(fit_here(params, *part) for part in stream())

    curvature = curvature_at(params)  # before any training: it says which layers there are
    require_fit(fit_at(params), noise_variance)
    log_prior_determinant(as_prior(function(start["hyperparameters"])), curvature)
    num_examples = sum(float(jnp.sum(weights)) for _, weights in stream())
    logs = jax.tree.map(lambda v: jnp.log(jnp.asarray(v, jnp.result_type(float))), start)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    step = _training_step(optimizer, of_batch, function)
    inner = optimizer.init(_trainable(params))
    hyper = optax.adam(hyper_learning_rate)
    climb = _evidence_step(hyper, function, hyper_steps, jnp.log(jnp.asarray(bounds)))
    hyper_inner = hyper.init(logs)

    best: Trained | None = None
    trace: list[float] = []
    losses: list[float] = []
    worse = 0
    for epoch in tqdm(range(1, epochs + 1), desc="training", unit="epoch", disable=not progress):
        values = jax.tree.map(jnp.exp, logs)
        found = []
        for batch, weights in even_batches(
            _shuffled(data, transform, jax.random.fold_in(key, epoch)), batch_size
        ):
            params, inner, loss = step(
                params, inner, batch, weights, values, curvature, prior_mean, num_examples
            )
            found.append(loss)
        losses.append(float(jnp.mean(jnp.stack(found))))
        if epoch <= burn_in or (epoch - burn_in) % every:
            continue
        curvature = curvature_at(params)
        problem = Problem(curvature, params, fit_at(params), prior_mean)
        logs, hyper_inner, evidence = climb(problem, logs, hyper_inner)
        trace.append(float(evidence.value))
        if np.isfinite(trace[-1]) and (best is None or trace[-1] > best.evidence.value):
            values, worse = jax.tree.map(jnp.exp, logs), 0
            tuned = values["hyperparameters"]
            best = Trained(
                params, curvature, function(tuned), values.get("noise_variance"), evidence, epoch,
                np.empty(0), np.empty(0), tuned if callable(prior_prec) else None,
            )  # fmt: skip
        else:
            worse += 1
        if patience is not None and worse >= patience:
            break
    if best is None:
        msg = (
            f"The evidence was never finite in {epochs} epochs ({len(trace)} values, burn_in="
            f"{burn_in}, every={every}): lower the learning rate, or train longer."
        )
        raise ValueError(msg)
    return replace(best, trace=np.asarray(trace), losses=np.asarray(losses))


def _check(*, epochs: int, every: int, hyper_steps: int, burn_in: int) -> None:
    for name, value, least in (
        ("epochs", epochs, 1),
        ("every", every, 1),
        ("hyper_steps", hyper_steps, 0),
        ("burn_in", burn_in, 0),
    ):
        if value < least:
            msg = f"`{name}` must be {least} or more; found {value}."
            raise ValueError(msg)
    if burn_in + every > epochs:
        msg = (
            f"No evidence is computed in {epochs} epochs with burn_in={burn_in} and every={every}: "
            "`burn_in` + `every` must not exceed `epochs`."
        )
        raise ValueError(msg)


def _shuffled(
    data: Any, transform: Callable[[Any], Any] | None, key: Key[Array, ""]
) -> Iterable[Batch]:
    """The batches of one epoch: a single one in a new order, those of an iterable as they come."""
    if not isinstance(data, tuple | Mapping):
        yield from batches(data, transform)
        return
    (batch,) = batches(data, transform)
    arrays = to_arrays(batch)
    order = np.asarray(jax.random.permutation(key, size_of(arrays)))
    yield jax.tree.map(lambda x: x[order], arrays)


def _trainable(params: PyTree) -> PyTree:
    """The parameters, without leaves of integers."""
    return jax.tree.map(
        lambda p: p if jnp.issubdtype(jnp.result_type(p), jnp.inexact) else None, params
    )


def _completed(moving: PyTree, params: PyTree) -> PyTree:
    """The parameters with their leaves of integers again."""

    def pick(new: Any, old: Any) -> Any:
        return old if new is None else new

    return jax.tree.map(pick, moving, params, is_leaf=lambda x: x is None)


def _training_step(
    optimizer: optax.GradientTransformation, of_batch: Callable[..., DataFit], function: Any
) -> Callable[..., Any]:
    """One step of the optimizer on a batch."""

    def objective(
        moving: PyTree,
        params: PyTree,
        batch: Batch,
        weights: Float[Array, " N"],
        values: PyTree,
        curvature: Curvature,
        prior_mean: PyTree | None,
        num_examples: Scalar,
    ) -> Float[Array, ""]:
        params = _completed(moving, params)
        fit = of_batch(params, batch, weights).log_likelihood(values.get("noise_variance"))
        prior = as_prior(function(values["hyperparameters"]))
        distance = prior_distance(prior, curvature, params, prior_mean)
        return -fit / jnp.sum(weights) + 0.5 * distance / num_examples

    with_extras = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params: PyTree, inner: Any, *arguments: Any) -> tuple[PyTree, Any, Array]:
        moving = _trainable(params)
        loss, gradient = jax.value_and_grad(objective)(moving, params, *arguments)
        updates, inner = with_extras.update(  # line searches evaluate the objective again
            gradient,
            inner,
            moving,
            value=loss,
            grad=gradient,
            value_fn=lambda moving: objective(moving, params, *arguments),
        )
        return _completed(optax.apply_updates(moving, updates), params), inner, loss

    return step


def _evidence_step(
    optimizer: optax.GradientTransformation,
    function: PriorFunction,
    steps: int,
    limits: Float[Array, "2"],
) -> Callable[[Problem, PyTree, Any], tuple[PyTree, Any, Evidence]]:
    """Some steps up the evidence, and the evidence after them."""

    @jax.jit
    def climb(problem: Problem, logs: PyTree, inner: Any) -> tuple[PyTree, Any, Evidence]:
        def evidence(logs: PyTree) -> Evidence:
            return problem.evidence(function, jax.tree.map(jnp.exp, logs))

        def one(state: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], None]:
            logs, inner = state
            gradient = jax.grad(lambda logs: -evidence(logs).value)(logs)
            updates, inner = optimizer.update(gradient, inner, logs)
            moved = optax.apply_updates(logs, updates)
            return (jax.tree.map(lambda x: jnp.clip(x, *limits), moved), inner), None

        (logs, inner), _ = jax.lax.scan(one, (logs, inner), length=steps)
        return logs, inner, evidence(logs)

    return climb
