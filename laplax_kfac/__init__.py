"""Kronecker-factored curvature for laplax, for any JAX model."""

__version__ = "0.1.0"

from laplax_kfac import patterns
from laplax_kfac.capture import LayerRecord, intermediates_and_gradients
from laplax_kfac.checkpoint import load, save
from laplax_kfac.curvature import Accumulator, Curvature, accumulator, ekfac, kfac
from laplax_kfac.layers import Layer
from laplax_kfac.likelihood import Likelihood
from laplax_kfac.links import class_probabilities
from laplax_kfac.marglik import DataFit, Evidence, Tuned, data_fit, log_marginal_likelihood, tune
from laplax_kfac.plugin import register as _register
from laplax_kfac.posterior import Posterior, make_posterior
from laplax_kfac.predictive import (
    Marginals,
    Predictive,
    joint_covariance,
    predictive_covariance,
    predictive_samples,
    predictive_variance,
)
from laplax_kfac.report import LayerReport, find_layers

_register()

__all__ = [
    "Accumulator",
    "Curvature",
    "DataFit",
    "Evidence",
    "Layer",
    "LayerRecord",
    "LayerReport",
    "Likelihood",
    "Marginals",
    "Posterior",
    "Predictive",
    "Tuned",
    "accumulator",
    "class_probabilities",
    "data_fit",
    "ekfac",
    "find_layers",
    "intermediates_and_gradients",
    "joint_covariance",
    "kfac",
    "load",
    "log_marginal_likelihood",
    "make_posterior",
    "patterns",
    "predictive_covariance",
    "predictive_samples",
    "predictive_variance",
    "save",
    "tune",
]
