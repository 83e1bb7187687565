"""Methods of one network: a curvature, and how its prior is chosen."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import laplax_kfac as lk
from study.data import Data, Split
from study.networks import Flat, Network

PRIORS = {
    "evidence": "evidence",
    "layers": "evidence, one a layer",
    "validation": "validation",
}


@dataclass(frozen=True)
class Approximation:
    """A kind of curvature.

    Attributes:
        title: What tables call it.
        fit: What computes it.
        options: Its keywords.
        priors: How its prior is chosen: names of `PRIORS`.
        whole: Whether it is one dense matrix of all parameters.
    """

    title: str
    fit: Callable[..., lk.Curvature] = lk.kfac
    options: Mapping[str, Any] = field(default_factory=dict)
    priors: tuple[str, ...] = ("evidence", "validation")
    whole: bool = False


LAST = {"params_filter": "last_layer"}
APPROXIMATIONS = {
    "last_full": Approximation("last layer, full", options=LAST | {"curvature": "block"}),
    "last_kfac": Approximation("last layer, KFAC", options=LAST),
    "diagonal": Approximation("diagonal", options={"curvature": "diagonal"}),
    "kfac": Approximation("KFAC", priors=("evidence", "layers", "validation")),
    "kfac_mc": Approximation("KFAC, `mc`", options={"fisher_type": "mc"}),
    "kfac_empirical": Approximation("KFAC, `empirical`", options={"fisher_type": "empirical"}),
    "kfac_reduce": Approximation("KFAC, `reduce`", options={"kfac_approx": "reduce"}),
    "ekfac": Approximation("EKFAC", fit=lk.ekfac),
    "kfoc": Approximation("KFOC", fit=lk.kfoc),
    "full": Approximation("full GGN", whole=True),
}


@dataclass(frozen=True)
class Fitted:
    """A curvature at trained parameters, ready for priors.

    Attributes:
        model: The model, as the curvature knows it.
        params: Its parameters.
        curvature: The curvature of the training data.
        fit: How well the parameters fit these.
        loss: The loss.
        seconds: What the fit took.
    """

    model: Network | Flat
    params: PyTree
    curvature: lk.Curvature
    fit: lk.DataFit
    loss: str
    seconds: float

    def tuned(self, prior: str, validation: Split) -> lk.Tuned:
        """The prior, and the noise of a regression, chosen as `PRIORS` says."""
        layers = sum(layer.block != "none" for layer in self.curvature.layers)
        return lk.tune(
            self.curvature, self.params, log_likelihood=self.fit,
            prior_prec=jnp.ones(layers) if prior == "layers" else 1.0,
            noise_variance=0.5 if self.loss == "mse" else None,
            validation=lk.Validation(self.model, (validation.x, validation.y), loss_fn=self.loss)
            if prior == "validation" else None,
        )  # fmt: skip

    def predictive(self, inputs: jax.Array, tuned: PyTree) -> lk.Predictive:
        """Gaussians over the outputs."""
        return lk.predictive_covariance(
            self.curvature, self.model, self.params, inputs, prior_prec=tuned
        )


def fitted(
    approximation: Approximation, network: Network, params: PyTree, data: Data, loss: str
) -> Fitted:
    """The curvature of the training data."""
    model: Network | Flat = network
    options = dict(approximation.options)
    if approximation.whole:
        model = Flat(network)
        params = model.flatten(params)
        options["dense_limit"] = params["theta"].size
    train = (data.train.x, data.train.y)
    start = time.process_time()
    curvature = approximation.fit(model, params, train, loss_fn=loss, **options)
    jax.block_until_ready(curvature)
    seconds = time.process_time() - start
    fit = lk.data_fit(model, params, train, loss_fn=loss)
    return Fitted(model, params, curvature, fit, loss, seconds)


def hyperparameters(tuned: Any) -> dict[str, Any]:
    """What was chosen, as numbers."""
    found: dict[str, Any] = {
        "prior_prec": jax.tree.map(float, jnp.ravel(jnp.asarray(tuned.prior_prec)).tolist()),
        "evidence": float(tuned.evidence.value),
    }
    if tuned.noise_variance is not None:
        found["noise_variance"] = float(tuned.noise_variance)
    return found
