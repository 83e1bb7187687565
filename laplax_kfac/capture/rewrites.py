"""Equations evaluated in a form with the same value and derivative, and a cheaper pullback.

One forward pass serves R pullbacks, so what all columns share is better computed once. JAX pulls
back through max pooling by a search for the maximum of every window; here the forward pass marks
the maxima, and the pullback multiplies with the marks. Convolutions of few channels, which XLA
spends on copies on a CPU, become matrix products along whole rows of an image.
"""

from jax.extend.core import Jaxpr, JaxprEqn

from laplax_kfac import jaxprs
from laplax_kfac.capture.convolutions import convolution
from laplax_kfac.capture.max_pooling import max_pooling
from laplax_kfac.jaxprs import Evaluate


def rewrite(eqn: JaxprEqn, *, layer: bool = False) -> Evaluate | None:
    """How to evaluate an equation at the values of its operands, where there is a better way.

    Args:
        eqn: The equation.
        layer: Whether it is a layer's: then its weight is the same for all examples.
    """
    if eqn.primitive.name == "reduce_window_max":
        return max_pooling(eqn)
    if eqn.primitive.name == "conv_general_dilated":
        return convolution(eqn, layer=layer)
    return None


def has_rewrite(jaxpr: Jaxpr) -> bool:
    """Whether there is a better way for an equation here, or in a body that a walk enters."""
    return any(
        rewrite(eqn) is not None or any(has_rewrite(body) for body in jaxprs.bodies(eqn))
        for eqn in jaxpr.eqns
    )
