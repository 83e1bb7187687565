"""Losses as likelihoods.

In goes a loss; out comes a `Likelihood`, a record of plain functions for one example: its terms, a
root of their Hessian, sampled gradients. A new likelihood is one more record, beside the others.

The loss of a dataset is a *sum* over examples (laplax's convention), and the loss of an example a
sum over its *terms*: tokens, pixels, labels, each a function of its own slice of the output. A loss
is the negative log-likelihood; only ``mse`` leaves out a constant: it is ``||f - y||^2``, hence a
Gaussian of variance 1/2 with Hessian 2 I.

Two terms of one example share the model's parameters, and the three estimates of curvature differ
in what they make of it. ``type2``: the Hessian H of the loss is block-diagonal over terms, so no
column touches two of them, and nothing is left out. ``mc``: the targets of all terms are drawn
together and independently; cross terms are zero in expectation, not in a single draw.
``empirical``: the gradient of the *summed* loss, so the outer product keeps all cross terms.
"""

from laplax_kfac.likelihood.classes import bernoulli, categorical
from laplax_kfac.likelihood.counts import poisson
from laplax_kfac.likelihood.gaussian import gaussian, heteroscedastic_gaussian
from laplax_kfac.likelihood.named import resolve_likelihood
from laplax_kfac.likelihood.record import Likelihood
from laplax_kfac.likelihood.weighted import weighted

__all__ = [
    "Likelihood", "bernoulli", "categorical", "gaussian", "heteroscedastic_gaussian", "poisson",
    "resolve_likelihood", "weighted",
]  # fmt: skip
