"""A calibration objective for classifiers: the likelihood of the targets under the predictive.

laplax's ``"nll"`` takes every loss for a Gaussian one: logits are to be near one-hot targets, with
no regard to the probabilities that they stand for. ``"class_nll"`` is the mean of -log p(y | x) at
the predicted probabilities, categorical or Bernoulli by the loss, for integer labels and for
probabilities as targets.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree
from laplax.eval.calibrate import evaluate_for_given_prior_arguments

from laplax_kfac.capture.batches import Batch
from laplax_kfac.laplax_adapter.curvature_types import PriorArguments

CLASS_NLL = "class_nll"


def categorical_nll(
    pred_mean: Float[Array, "N C"],
    target: Num[Array, "N *C"],
    pred_std: Float[Array, "N C"] | None = None,
    pred_act: Float[Array, "N C"] | None = None,
    **others: PyTree,
) -> Float[Array, ""]:
    """Mean of -log p of the labels; the probabilities are laplax's, or else by probit."""
    del others
    if pred_act is None:
        pred_act = jax.nn.softmax(moderated(pred_mean, pred_std))
    # laplax's mean-field probabilities do not sum to one.
    shares = pred_act / jnp.sum(pred_act, axis=-1, keepdims=True)
    logs = jnp.log(jnp.maximum(shares, jnp.finfo(shares.dtype).tiny))
    if target.ndim < logs.ndim:
        target = jax.nn.one_hot(target, logs.shape[-1])
    return -jnp.mean(jnp.sum(target * logs, axis=-1))


def bernoulli_nll(
    pred_mean: Float[Array, "N *C"],
    target: Num[Array, "N *D"],
    pred_std: Float[Array, "N *C"] | None = None,
    **others: PyTree,
) -> Float[Array, ""]:
    """Mean of -log p of the labels 0 and 1 of every logit, summed over an example; by probit."""
    del others
    logits = moderated(pred_mean, pred_std)
    y = target.reshape(logits.shape)
    terms = y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits)
    return -jnp.mean(jnp.sum(terms.reshape(len(terms), -1), axis=-1))


def moderated(mean: Array, std: Array | None) -> Array:
    """Logits of which the link is about the mean of the link (MacKay 1992)."""
    return mean if std is None else mean / jnp.sqrt(1.0 + jnp.pi / 8.0 * std**2)


METRICS = {"cross_entropy": categorical_nll, "binary_cross_entropy": bernoulli_nll}


def class_nll(
    *, set_prob_predictive: Callable[..., PyTree], loss_fn: object, **others: PyTree
) -> Callable[[PriorArguments, Batch], Float[Array, ""]]:
    """The objective ``"class_nll"``, as laplax's own are built.

    Args:
        set_prob_predictive: laplax's function of prior arguments that makes a predictive.
        loss_fn: The loss, which says what the targets are.
        **others: What laplax hands to all objectives, which this one does without.

    Raises:
        ValueError: If the loss is not one of a classifier.
    """
    del others
    metric = METRICS.get(str(loss_fn).lower())
    if metric is None:
        msg = (
            f'`calibration_objective="{CLASS_NLL}"` is for `loss_fn` "cross_entropy" and '
            f'"binary_cross_entropy", found {loss_fn!r}; for a regression, use "nll".'
        )
        raise ValueError(msg)

    @jax.jit
    def objective(prior_arguments: PriorArguments, data: Batch) -> Float[Array, ""]:
        return evaluate_for_given_prior_arguments(
            prior_arguments=prior_arguments,
            data=data,
            set_prob_predictive=set_prob_predictive,
            metric=metric,
        )

    return objective
