"""Kronecker-factored curvature for laplax, for any JAX model."""

__version__ = "0.1.0"

from laplax_kfac import patterns
from laplax_kfac.capture import LayerRecord, intermediates_and_gradients
from laplax_kfac.curvature import Accumulator, Curvature, accumulator, kfac
from laplax_kfac.layers import Layer
from laplax_kfac.plugin import register as _register
from laplax_kfac.report import LayerReport, find_layers

_register()

__all__ = [
    "Accumulator",
    "Curvature",
    "Layer",
    "LayerRecord",
    "LayerReport",
    "accumulator",
    "find_layers",
    "intermediates_and_gradients",
    "kfac",
    "patterns",
]
