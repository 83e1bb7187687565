"""Losses as likelihoods: which vectors are pulled back from the model's output."""

from laplax_kfac.likelihood.losses import (
    Likelihood,
    bernoulli,
    categorical,
    gaussian,
    heteroscedastic_gaussian,
    poisson,
    resolve_likelihood,
    weighted,
)

__all__ = [
    "Likelihood", "bernoulli", "categorical", "gaussian", "heteroscedastic_gaussian", "poisson",
    "resolve_likelihood", "weighted",
]  # fmt: skip
