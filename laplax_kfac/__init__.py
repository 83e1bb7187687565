"""Kronecker-factored curvature for laplax, for any JAX model."""

__version__ = "0.1.0"

from laplax_kfac import likelihood, masks, patterns
from laplax_kfac.blocks.merging import merge
from laplax_kfac.caches import clear_caches
from laplax_kfac.capture.intermediates import LayerRecord, intermediates_and_gradients
from laplax_kfac.checkpoint import load, save
from laplax_kfac.curvature.accumulator import Accumulator, accumulator
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.curvature.kfac import ekfac, kfac, kfoc
from laplax_kfac.curvature.options import Options
from laplax_kfac.curvature.relative_error import RelativeError, relative_error
from laplax_kfac.evidence.evidence import Evidence, log_marginal_likelihood
from laplax_kfac.evidence.fit import DataFit, data_fit
from laplax_kfac.evidence.held_out import Validated
from laplax_kfac.evidence.notices import BoundaryWarning
from laplax_kfac.evidence.training import Trained, marglik_training
from laplax_kfac.evidence.tuning import Tuned, tune
from laplax_kfac.laplax_adapter import register as _register
from laplax_kfac.likelihood.record import Likelihood
from laplax_kfac.links import class_probabilities
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.predictive.gaussians import Marginals, Predictive
from laplax_kfac.predictive.predictive import (
    joint_covariance,
    predictive_covariance,
    predictive_variance,
)
from laplax_kfac.predictive.samples import predictive_samples
from laplax_kfac.predictive.validation import Validation
from laplax_kfac.report import LayerReport, find_layers

_register()

__all__ = [
    "Accumulator",
    "BoundaryWarning",
    "Curvature",
    "DataFit",
    "Evidence",
    "Layer",
    "LayerRecord",
    "LayerReport",
    "Likelihood",
    "Marginals",
    "Options",
    "Posterior",
    "Predictive",
    "RelativeError",
    "Trained",
    "Tuned",
    "Validated",
    "Validation",
    "accumulator",
    "class_probabilities",
    "clear_caches",
    "data_fit",
    "ekfac",
    "find_layers",
    "intermediates_and_gradients",
    "joint_covariance",
    "kfac",
    "kfoc",
    "likelihood",
    "load",
    "log_marginal_likelihood",
    "make_posterior",
    "marglik_training",
    "masks",
    "merge",
    "patterns",
    "predictive_covariance",
    "predictive_samples",
    "predictive_variance",
    "relative_error",
    "save",
    "tune",
]
