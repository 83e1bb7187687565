"""Sums and products of parameters: known terms and factors leave a view, others end it."""

from dataclasses import replace

import numpy as np

from laplax_kfac import jaxprs
from laplax_kfac.parsing.biases import add
from laplax_kfac.parsing.products import REASON, is_product, note, scaled
from laplax_kfac.parsing.pullbacks import rearranged
from laplax_kfac.parsing.steps import Rule, Step
from laplax_kfac.parsing.values import Known, Numbers, Scaled, Symbolic, Value, of_parameters


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


def signed_sum(step: Step) -> list[Value]:
    """``add`` and ``sub``, with their operands broadcast and signed."""
    first, second = _broadcast(step)
    if step.eqn.primitive.name == "sub" and isinstance(second, Symbolic):
        second = second.scaled(-1.0)
    return add(step, [first, second])


def scatter_add(step: Step) -> list[Value]:
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


def product(step: Step) -> list[Value]:
    """``mul`` and ``div``: a constant scales a symbolic array, anything else ends it."""
    terms = _broadcast(step)
    arrays = [v for v in terms if isinstance(v, Symbolic)]
    parameters = sum(map(of_parameters, terms))
    divides = step.eqn.primitive.name == "div"
    for known in terms:
        if isinstance(known, Known) and not (divides and known is terms[0]):
            ndim = jaxprs.ndim(step.eqn.outvars[0])
            factor = known.factor(ndim, arrays[0].index.ndim - ndim)
            with np.errstate(divide="ignore"):
                return [arrays[0].scaled(1.0 / factor if divides else factor)]
    if parameters == 2:
        step.mark("other", "multiplied by another parameter")
    elif parameters and not divides and not all(map(step.findings.is_fixed, terms)):
        found = next((k, t) for k, t in enumerate(terms) if of_parameters(t))
        return [note(step, *found)]
    else:
        step.mark("scale", REASON)
    if parameters or divides:
        return [Scaled() if parameters else None]
    left = [scaled(t, step.findings) for t in terms if is_product(t, step.findings)]
    return [left[0] if len(left) == 1 else Scaled() if left else None]


def negative(step: Step) -> list[Value]:
    """``neg``."""
    (value,) = step.values
    return [value.scaled(-1.0) if isinstance(value, Symbolic) else None]


RULES: dict[str, Rule] = {
    "add": signed_sum,
    "add_any": signed_sum,
    "sub": signed_sum,
    "scatter-add": scatter_add,
    "mul": product,
    "div": product,
    "neg": negative,
}
