"""Class probabilities from a Gaussian over logits: the integral of the softmax, approximated.

The mean-field formulas are laplax's own; they are made to sum to one, which laplax leaves out. The
Laplace bridge is ours, for laplax's cannot be called on the outputs of one example.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_choice,
    require_key,
)
from laplax_kfac.bases import eigh
from laplax_kfac.laplax_adapter import predictives
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.predictive.gaussians import Marginals, Predictive, require_predictive

Link = Literal[
    "mc", "probit", "mean_field_0", "mean_field_1", "mean_field_2", "laplace_bridge",
    "laplace_bridge_norm",
]  # fmt: skip
_INPUTS_TOGETHER = 64


@no_type_check
@on_automatic_axes
def class_probabilities(
    predictive: Predictive | Marginals,
    link: Link = "probit",
    *,
    num_classes: int | None = None,
    key: Key[Array, ""] | None = None,
    num_samples: int = 1000,
) -> Float[Array, "N *outputs"]:
    """Probabilities of classes under a Gaussian over their logits.

    A single logit is one of two classes, and the probability is that of the sigmoid.

    Args:
        predictive: What `predictive_covariance` returned for a classifier; for the links that
            need no correlations between logits also what `predictive_variance` returned.
        link: How the softmax is averaged.

            - ``"probit"``, or ``"mean_field_0"``: logits divided by ``sqrt(1 + pi/8 variance)``
              (MacKay 1992; Lu et al. 2020, arXiv 2006.07584, mf0).
            - ``"mean_field_1"``: the same for differences of logits, taken as independent.
            - ``"mean_field_2"``: with their correlations, so that what all logits share does not
              count. For some posteriors nearer to ``"mc"`` than ``"probit"``, for others farther;
              no link without samples is the nearest everywhere (the page "Does it help?").
            - ``"laplace_bridge"``: the mean of the Dirichlet whose Laplace approximation in the
              softmax basis has these logits without their common part (Hobbhahn et al. 2022, arXiv
              2003.01227). Rough, and not the softmax even where the variance vanishes.
            - ``"laplace_bridge_norm"``: the same for logits that are scaled to a mean variance of
              ``sqrt(K / 2)``, as laplace-torch's ``"bridge_norm"``: nearer to samples as a rule.
            - ``"mc"``: an average over samples of the logits; needs ``key``.
        num_classes: Number K of outputs of one softmax, for models with several an input (tokens,
            pixels); by default each is over the last axis of the model's output.
        key: For ``"mc"``; all inputs get the same random numbers.
        num_samples: For ``"mc"``.

    Returns:
        The shape of the mean, (N, K) for one softmax; with ``num_classes`` given (N, terms, K).

    Raises:
        ValueError: If the link is unknown or needs what is not given, or if ``num_classes`` does
            not divide the number of outputs.
        TypeError: If ``predictive`` is something else, or ``key`` is no key.
    """
    require_predictive(predictive)
    require_choice("link", link, ["mc", *_LINKS])
    num_samples = positive_integer("num_samples", num_samples)
    if key is not None:
        require_key("key", key)
    if link in ("mc", "mean_field_2") and isinstance(predictive, Marginals):
        msg = (
            f"`link={link!r}` needs the correlations between logits, which `predictive_variance` "
            "leaves out; use `predictive_covariance`, or link='probit'."
        )
        raise ValueError(msg)
    if link == "mc" and key is None:
        msg = "`link='mc'` draws samples: pass `key`."
        raise ValueError(msg)
    mean, covariance = _terms(predictive, num_classes)
    classes = mean.shape[-1]
    if classes == 1:  # a logit of 0 for the other class
        mean, covariance = (_zero_beside(x, axes) for x, axes in ((mean, 1), (covariance, 2)))
    flat = mean.reshape(-1, mean.shape[-1]), covariance.reshape(-1, *covariance.shape[-2:])
    if link == "mc":
        assert key is not None
        probabilities = _sampled(*flat, key, num_samples)
    else:
        probabilities = jax.vmap(_LINKS[link])(*flat)
        probabilities = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
    probabilities = probabilities.reshape(mean.shape)[..., :classes]
    return probabilities.reshape(predictive.mean.shape) if num_classes is None else probabilities


@no_type_check
def _terms(
    predictive: Predictive | Marginals, num_classes: int | None
) -> tuple[Float[Array, "N terms K"], Float[Array, "N terms K K"]]:
    """Mean and covariance of every softmax."""
    count, *shape = predictive.mean.shape
    outputs, last = math.prod(shape), (shape or [1])[-1]
    classes = last if num_classes is None else positive_integer("num_classes", num_classes)
    if outputs % classes:
        msg = f"`num_classes` is {num_classes}, which does not divide the {outputs} outputs."
        raise ValueError(msg)
    terms = outputs // classes
    mean = predictive.mean.reshape(count, terms, classes)
    if isinstance(predictive, Marginals):
        return mean, jax.vmap(jax.vmap(jnp.diag))(predictive.variance.reshape(mean.shape))
    covariance = predictive.covariance.reshape(count, terms, classes, terms, classes)
    return mean, jnp.einsum("ntktl->ntkl", covariance)


def _zero_beside(x: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """Append a zero to each of the last axes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - axes) + [(0, 1)] * axes)


def _mean_field_0(mean: Float[Array, " K"], covariance: Float[Array, "K K"]) -> Array:
    return predictives.mean_field_0_predictive(mean, jnp.diagonal(covariance))


def _mean_field_1(mean: Float[Array, " K"], covariance: Float[Array, "K K"]) -> Array:
    return predictives.mean_field_1_predictive(mean, jnp.diagonal(covariance))


def _laplace_bridge(mean: Float[Array, " K"], covariance: Float[Array, "K K"]) -> Array:
    """Concentrations of the Dirichlet (Hobbhahn et al. 2022).

    The softmax does not see what all logits share, and logits of the softmax basis sum to zero;
    so the common part is projected out, which leaves the integral as it is.
    """
    classes = mean.shape[0]
    projection = jnp.eye(classes) - 1.0 / classes
    mean = mean - jnp.mean(mean)
    variance = jnp.diagonal(projection @ covariance @ projection)
    spread = jnp.exp(jax.nn.logsumexp(-mean) + mean)  # e^mean sum e^-mean
    return (1.0 - 2.0 / classes + spread / classes**2) / variance


def _laplace_bridge_norm(mean: Float[Array, " K"], covariance: Float[Array, "K K"]) -> Array:
    """The same with logits scaled so that their mean variance is that of a bridge that is near.

    Far from it, at large variances, the plain bridge is too sure (Daxberger et al. 2021, Laplace
    Redux, arXiv 2106.14806, of laplace-torch's ``"bridge_norm"``): c = mean variance / sqrt(K/2).
    """
    classes = mean.shape[0]
    projection = jnp.eye(classes) - 1.0 / classes
    variance = jnp.mean(jnp.diagonal(projection @ covariance @ projection))
    scale = variance / math.sqrt(classes / 2)
    return _laplace_bridge(mean / jnp.sqrt(scale), covariance / scale)


_LINKS: dict[str, Callable[[Array, Array], Array]] = {
    "probit": _mean_field_0,
    "mean_field_0": _mean_field_0,
    "mean_field_1": _mean_field_1,
    "mean_field_2": predictives.mean_field_2_predictive,
    "laplace_bridge": _laplace_bridge,
    "laplace_bridge_norm": _laplace_bridge_norm,
}


def _sampled(
    mean: Float[Array, "N K"],
    covariance: Float[Array, "N K K"],
    key: Key[Array, ""],
    num_samples: int,
) -> Float[Array, "N K"]:
    noise = jax.random.normal(key, (num_samples, mean.shape[-1]), mean.dtype)

    def one(example: tuple[Array, Array]) -> Float[Array, " K"]:
        mean, covariance = example
        eigenvalues, vectors = eigh(covariance)  # a covariance may be singular
        root = vectors * jnp.sqrt(eigenvalues)
        logits = mean + jnp.matmul(noise, root.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.mean(jax.nn.softmax(logits), axis=0)

    return jax.lax.map(one, (mean, covariance), batch_size=_INPUTS_TOGETHER)
