"""Choosing a prior by predictions for data that were held out: what `tune` takes as `validation`.

The evidence of a trained network may choose a prior with which its predictions are poor: their
likelihood, on data that were not trained on, is what one wants of it. With the Jacobians in the
eigenbases worked out once it is a function of the prior that costs one contraction with them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import no_type_check, require_callable, require_choice
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import as_batch, batch_size, to_arrays
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.evidence.held_out import Validated
from laplax_kfac.parsing.program import ModelFn
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.posterior.prior import Scalar
from laplax_kfac.predictive.gaussians import Marginals, Predictive
from laplax_kfac.predictive.jacobians import (
    Expansion,
    Linearised,
    in_chunks,
    most_inputs,
)
from laplax_kfac.predictive.linear_model import LinearModel, linearised_once, spreads_at
from laplax_kfac.summaries import summarised

Objective = str | Callable[[Predictive, PyTree], Any]


class Family(NamedTuple):
    """A loss as the likelihood of a target, given a Gaussian over the output.

    Attributes:
        log_prob: (mean, variance, targets, noise) -> log-likelihood of every example.
        confidence: (mean, variance) -> probability of the most probable class of every term.
    """

    log_prob: Callable[[Array, Array, Array, Scalar | None], Array]
    confidence: Callable[[Array, Array], Array]


def moderated(mean: Float[Array, "*n"], variance: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Logits whose probabilities are about the mean ones: ``"probit"`` of `class_probabilities`."""
    return mean / jnp.sqrt(1.0 + jnp.pi / 8.0 * variance)


def categorical(
    mean: Float[Array, "N *C"], variance: Float[Array, "N *C"], y: Num[Array, "N *D"], _: Any
) -> Float[Array, " N"]:
    """Of labels or probabilities of classes, on the last axis of the output."""
    logs = jax.nn.log_softmax(moderated(mean, variance))
    if y.ndim == logs.ndim - 1:
        y = jax.nn.one_hot(y, logs.shape[-1])
    return jnp.sum((y * logs).reshape(len(logs), -1), axis=1)


def bernoulli(
    mean: Float[Array, "N *C"], variance: Float[Array, "N *C"], y: Num[Array, "N *D"], _: Any
) -> Float[Array, " N"]:
    """Of labels 0 and 1, one a logit."""
    logits = moderated(mean, variance)
    y = y.reshape(logits.shape)
    terms = y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits)
    return jnp.sum(terms.reshape(len(terms), -1), axis=1)


def gaussian(
    mean: Float[Array, "N *C"],
    variance: Float[Array, "N *C"],
    y: Num[Array, "N *D"],
    noise_variance: Scalar | None,
) -> Float[Array, " N"]:
    """Of numbers: exact, with the noise added; of variance 1/2 where none is given, as `mse`."""
    total = variance + (0.5 if noise_variance is None else noise_variance)
    terms = jax.scipy.stats.norm.logpdf(y.reshape(mean.shape), mean, jnp.sqrt(total))
    return jnp.sum(terms.reshape(len(terms), -1), axis=1)


FAMILIES = {
    "cross_entropy": Family(
        categorical, lambda m, v: jnp.max(jax.nn.softmax(moderated(m, v)), axis=-1)
    ),
    "binary_cross_entropy": Family(
        bernoulli, lambda m, v: jax.nn.sigmoid(jnp.abs(moderated(m, v)))
    ),
    "mse": Family(gaussian, lambda m, _: jnp.full(len(m), jnp.nan)),
}


@pytrees.register
@summarised
@dataclass(frozen=True)
class HeldOutData:
    """Predictions for data that were held out, for any posterior in the bases of one curvature.

    Attributes:
        kept: Jacobians at all inputs; the inputs themselves where these take too much memory.
        targets: The targets.
        expansion: What the model is linearised with.
        linearise: Linearises it at some inputs.
        at_once: Most inputs that are worked on at once.
        family: The loss.
        objective: ``"nll"``, or a function of a predictive and the targets.
        shape: Shape of the output for one input.
    """

    kept: PyTree
    targets: PyTree
    expansion: Expansion
    linearise: Callable[[Expansion, PyTree], Linearised] = field(metadata={"static": True})
    at_once: int = field(metadata={"static": True})
    family: Family = field(metadata={"static": True})
    objective: Objective = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})

    def num_examples(self) -> int:
        """How many examples there are."""
        return batch_size({"input": self.targets})

    def spreads(self, posterior: Posterior, *, diagonal: bool) -> tuple[Array, Array]:
        """Outputs, and their variances or covariances."""
        variances = [1.0 / block.eigenvalues for block in posterior.precision.blocks]

        def of_part(part: PyTree) -> tuple[Array, Array]:
            at = functools.partial(self.linearise, self.expansion)
            return spreads_at(at, part, variances, diagonal=diagonal)

        return in_chunks(of_part, self.kept, self.at_once, traced=True)

    def score(self, posterior: Posterior, noise_variance: Scalar | None) -> Float[Array, ""]:
        """Minus the objective, summed over the examples."""
        if callable(self.objective):
            mean, covariance = self.spreads(posterior, diagonal=False)
            predictive = Predictive(mean.reshape(-1, *self.shape), covariance)
            return -self.num_examples() * jnp.mean(self.objective(predictive, self.targets))
        mean, variance = self._shaped(posterior)
        return jnp.sum(self.family.log_prob(mean, variance, self.targets, noise_variance))

    def validated(self, posterior: Posterior, noise_variance: Scalar | None) -> Validated:
        """What `tune` tells of the outcome."""
        mean, variance = self._shaped(posterior)
        confidence, of_map = (self.family.confidence(mean, v) for v in (variance, 0.0 * variance))
        loss = -self.score(posterior, noise_variance) / self.num_examples()
        return Validated(loss, jnp.mean(confidence), jnp.mean(of_map))

    def _shaped(self, posterior: Posterior) -> tuple[Array, Array]:
        """Outputs and variances in the shape of the model's output."""
        spreads = Marginals(*self.spreads(posterior, diagonal=True))
        shape = (-1, *self.shape)
        return spreads.mean.reshape(shape), spreads.variance.reshape(shape)


@summarised
@no_type_check
@dataclass(frozen=True)
class Validation:
    """Data that were held out from training, for `tune` to choose the prior and the noise by.

    Attributes:
        model_fn: ``model_fn(input=, params=)``, the model of the curvature.
        data: One batch ``(input, target)``.
        loss_fn: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"mse"``.
        objective: What is minimised: ``"nll"``, the mean negative log-likelihood of the targets
            under the predictive (of classes by probit, of numbers exactly, with the noise); or a
            differentiable function of a `Predictive` and the targets, of which the mean is taken,
            for other links and losses of one's own.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
    """

    model_fn: ModelFn
    data: Any
    loss_fn: str
    objective: Objective = "nll"
    vmap_over_data: bool = True

    @no_type_check
    def of(self, curvature: BlockDiagonal, params: PyTree, *, gaussian: bool) -> HeldOutData:
        """The predictions of a curvature's model.

        Args:
            curvature: The curvature.
            params: The trained parameters.
            gaussian: Whether the loss of the curvature is ``mse``.

        Raises:
            ValueError: If the curvature is of another model or loss, or an option is unknown.
            TypeError: If the data are no batch.
        """
        require_choice("loss_fn", self.loss_fn, FAMILIES)
        loss = str(self.loss_fn)
        if self.objective != "nll":
            require_callable("objective", self.objective, '"nll" or a function')
        if gaussian != (loss == "mse"):
            msg = (
                f"`validation` has `loss_fn={loss!r}`, but `log_likelihood` is of "
                f"{'mse' if gaussian else 'another loss'}: both are of one model and its loss."
            )
            raise ValueError(msg)
        batch = to_arrays(as_batch(self.data, "validation"), "validation")
        model = LinearModel.of(
            make_posterior(curvature, 1.0), self.model_fn, params, batch["input"],
            vmap_over_data=self.vmap_over_data,
        )  # fmt: skip
        batch_size(batch)  # targets of another number than inputs are refused
        at_once = most_inputs(model.program, DEFAULT_BATCH_SIZE, traced=True)
        kept = linearised_once(model.at, model.inputs, at_once)
        outputs = jax.tree.leaves(model.program.output)
        shape = outputs[0].shape if len(outputs) == 1 else (sum(o.size for o in outputs),)
        return HeldOutData(
            kept, batch["target"], model.expansion, model.linearise, at_once, FAMILIES[loss],
            self.objective, tuple(shape),
        )  # fmt: skip
