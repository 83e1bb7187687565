"""What `tune` may maximise in place of the evidence: how likely targets are that were held out.

The predictions are made a step further on, in `predictive.validation`; here is what is asked of
them, and what `tune` tells of the outcome.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree

from laplax_kfac import pytrees
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.posterior.posterior import Posterior
from laplax_kfac.posterior.prior import Scalar
from laplax_kfac.summaries import summarised


@pytrees.register
@summarised
@dataclass(frozen=True)
class Validated:
    """Predictions for data that were held out, at the hyperparameters that were found.

    Attributes:
        loss: Mean of the objective over the examples: for ``"nll"``, nats an example.
        confidence: Mean probability of the most probable class; NaN for a regression.
        confidence_of_map: The same at the parameters themselves, without a posterior. A confidence
            that is far below it means a prior that is too wide, whatever the evidence says of it.
    """

    loss: Float[Array, ""]
    confidence: Float[Array, ""]
    confidence_of_map: Float[Array, ""]


@runtime_checkable
class HeldOut(Protocol):
    """Predictions for data that were held out, for any posterior; a pytree."""

    def score(self, posterior: Posterior, noise_variance: Scalar | None) -> Float[Array, ""]:
        """What is maximised: minus the objective, summed over the examples."""

    def validated(self, posterior: Posterior, noise_variance: Scalar | None) -> Validated:
        """What is told of the outcome."""

    def num_examples(self) -> int:
        """How many examples there are."""


@runtime_checkable
class MakesHeldOut(Protocol):
    """What users pass as ``validation``."""

    def of(self, curvature: BlockDiagonal, params: PyTree, *, gaussian: bool) -> HeldOut:
        """The predictions of a curvature's model."""
