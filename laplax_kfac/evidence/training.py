"""Training alternated with steps on the evidence: parameters and hyperparameters in one run.

Immer et al. (2021), "Scalable marginal likelihood estimation for model selection in deep learning",
arXiv 2104.04975, Algorithm 1. No validation data: of all epochs, the one with the best evidence on
the training data wins.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from tqdm import tqdm

from laplax_kfac import pytrees
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_bounds,
    require_flags,
    require_positive,
)
from laplax_kfac.capture.batches import (
    Transform,
    require_several_passes,
    require_transform,
)
from laplax_kfac.curvature.accumulator import accumulator
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.evidence.evidence import Evidence
from laplax_kfac.evidence.fit import fit_of_batch, require_fit
from laplax_kfac.evidence.hill import DEFAULT_TOLERANCE
from laplax_kfac.evidence.notices import warn_of_frozen
from laplax_kfac.evidence.passes import Passes, Schedule
from laplax_kfac.evidence.problem import (
    DEFAULT_BOUNDS,
    PriorFunction,
    Problem,
    check_start,
    start_of,
)
from laplax_kfac.evidence.steps import Target, evidence_step, trainable, training_step
from laplax_kfac.likelihood.named import Loss
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.program import ModelFn
from laplax_kfac.posterior.posterior import as_prior
from laplax_kfac.posterior.prior import (
    Hyperparameters,
    PriorPrecision,
    Scalar,
    log_prior_determinant,
)


@pytrees.register
@dataclass(frozen=True)
class Trained(Hyperparameters):
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


@no_type_check
@on_automatic_axes
def marglik_training(
    model_fn: ModelFn,
    params: PyTree,
    data: object,
    *,
    loss_fn: Loss,
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
    transform: Transform | None = None,
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
        patience: Stop after so many steps on the evidence without a better one, by more than the
            1e-5 nats that `tune` leaves; None never stops.
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
    schedule = Schedule(epochs, burn_in, every, hyper_steps, patience)
    schedule.check()
    batch_size = positive_integer("batch_size", batch_size)
    require_flags(eigenvalue_correction=eigenvalue_correction, progress=progress)
    require_bounds(bounds)
    require_positive("hyper_learning_rate", hyper_learning_rate, shape=())
    require_transform(transform)
    if optimizer is not None and not hasattr(optimizer, "update"):
        msg = f"`optimizer` must be one of optax, such as optax.adam(1e-3); found {optimizer!r}."
        raise TypeError(msg)
    require_several_passes(data, "`marglik_training`")
    function, start = start_of(prior_prec, hyperparameters, noise_variance)
    check_start(start, bounds, "hyperparameters" if callable(prior_prec) else "prior_prec")
    key = jax.random.key(0) if key is None else key
    accumulate = accumulator(
        model_fn, params, loss_fn=loss_fn, key=key, vmap_over_data=vmap_over_data, **options
    )
    of_batch = fit_of_batch(model_fn, loss_fn, vmap_over_data=vmap_over_data)
    passes = Passes(data, transform, batch_size, accumulate, of_batch, eigenvalue_correction)

    noise_variance = start.get("noise_variance")
    # Before any training: it says which layers there are, and what is wrong with the data.
    curvature = passes.curvature_at(params, accumulate.settings.nonfinite)
    require_fit(passes.fit_at(params, accumulate.settings.nonfinite), noise_variance)
    warn_of_frozen(curvature, noise_variance if hyper_steps else None)
    log_prior_determinant(as_prior(function(start["hyperparameters"])), curvature)
    num_examples = sum(float(jnp.sum(weights)) for _, weights in passes.stream())
    logs = jax.tree.map(lambda v: jnp.log(jnp.asarray(v, jnp.result_type(float))), start)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    step = training_step(optimizer, of_batch, function)
    inner = optimizer.init(trainable(params))
    hyper = optax.adam(hyper_learning_rate)
    climb = evidence_step(hyper, function, hyper_steps, jnp.log(jnp.asarray(bounds)))
    hyper_inner = hyper.init(logs)

    best: Trained | None = None
    trace: list[float] = []
    losses: list[float] = []
    worse = 0
    for epoch in tqdm(range(1, epochs + 1), desc="training", unit="epoch", disable=not progress):
        target = Target(jax.tree.map(jnp.exp, logs), curvature, prior_mean, num_examples)
        found = []
        for part in passes.shuffled(jax.random.fold_in(key, epoch)):
            params, inner, loss = step(params, inner, part, target)
            found.append(loss)
        losses.append(float(jnp.mean(jnp.stack(found))))
        if not schedule.has_evidence(epoch):
            continue
        curvature = passes.curvature_at(params)
        problem = Problem(curvature, params, passes.fit_at(params), prior_mean)
        logs, hyper_inner, evidence = climb(problem, logs, hyper_inner)
        trace.append(float(evidence.value))
        if np.isfinite(trace[-1]) and (best is None or trace[-1] > best.evidence.value):
            values = jax.tree.map(jnp.exp, logs)
            gained = np.inf if best is None else trace[-1] - float(best.evidence.value)
            worse = 0 if gained > DEFAULT_TOLERANCE else worse + 1
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
