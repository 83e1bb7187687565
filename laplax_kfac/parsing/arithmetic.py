"""Sums and products of parameters: known terms and factors leave a view, others end it."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from laplax_kfac import jaxprs
from laplax_kfac.parsing.biases import add
from laplax_kfac.parsing.pullbacks import rearranged
from laplax_kfac.parsing.steps import Rule, Step
from laplax_kfac.parsing.values import PARAMETERS, Known, Numbers, Scaled, Symbolic, Value


def _broadcast(step: Step) -> list[Value]:
    """The operands broadcast to the shape of the equation's output (size-1 axes, scalars)."""
    shape = jaxprs.shape(step.eqn.outvars[0])

    def to_output(value: Value, own: int) -> Value:
        if not isinstance(value, Symbolic):
            return value

        def broadcast(x: Numbers) -> Numbers:
            padded = x.reshape((1,) * (len(shape) - own) + x.shape)
            return np.broadcast_to(padded, shape + x.shape[own:])

        return value.map(broadcast)

    pairs = zip(step.values, step.eqn.invars, strict=True)
    return [to_output(value, jaxprs.ndim(atom)) for value, atom in pairs]


def _sum(step: Step) -> list[Value]:
    """``add`` and ``sub``, with their operands broadcast and signed."""
    first, second = _broadcast(step)
    if step.eqn.primitive.name == "sub" and isinstance(second, Symbolic):
        second = second.scaled(-1.0)
    return add(step, [first, second])


def _scatter_add(step: Step) -> list[Value]:
    """Parameters added at known places: a sum with what they are elsewhere, nothing."""
    onto, places, updates = step.values
    if isinstance(updates, Symbolic):
        like = jaxprs.spec(step.eqn.invars[0])
        zeros = Known(lambda: np.zeros(like.shape, like.dtype))
        alone = replace(step, values=[zeros, places, updates])
        updates = rearranged(alone) if isinstance(places, Known) else None
        if updates is None:
            reason = "scattered to places that data decide, or several times to one"
            return step.mark("other", reason)
    if not step.findings.is_fixed(places):
        updates = None  # constants that are added to places that data decide are data
    return add(step, [onto, updates])


def _product(step: Step) -> list[Value]:
    """``mul`` and ``div``: a constant scales a symbolic array, anything else ends it."""
    terms = _broadcast(step)
    arrays = [v for v in terms if isinstance(v, Symbolic)]
    parameters = sum(v.source == PARAMETERS for v in arrays)
    divides = step.eqn.primitive.name == "div"
    for known in terms:
        if isinstance(known, Known) and not (divides and known is terms[0]):
            factor = _factor(known, step, arrays[0])
            with np.errstate(divide="ignore"):
                return [arrays[0].scaled(1.0 / factor if divides else factor)]
    if parameters == 2:
        step.mark("other", "multiplied by another parameter")
    else:
        step.mark("scale", "multiplies other values elementwise, which has no Kronecker form")
    return [Scaled() if parameters else None]


def _factor(known: Known, step: Step, array: Symbolic) -> Float[np.ndarray, "..."]:
    """A known factor in the axes of the product: its own, then one scan axis a scan."""
    value, ndim = np.asarray(known.value(), np.float64), jaxprs.ndim(step.eqn.outvars[0])
    own = value.ndim - known.scan_axes
    scans = value.shape[own:] or (1,) * (array.index.ndim - ndim)
    return value.reshape((1,) * (ndim - own) + value.shape[:own] + scans)


def _negative(step: Step) -> list[Value]:
    (value,) = step.values
    return [value.scaled(-1.0) if isinstance(value, Symbolic) else None]


RULES: dict[str, Rule] = {
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "scatter-add": _scatter_add,
    "mul": _product,
    "div": _product,
    "neg": _negative,
}
