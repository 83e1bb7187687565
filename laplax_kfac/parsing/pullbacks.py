"""Views that are found by their pullback, not by the rule of their primitive."""

from typing import Any

import jax
import numpy as np

from laplax_kfac import jaxprs
from laplax_kfac.parsing.steps import Scope, Step
from laplax_kfac.parsing.supports import everywhere, of_constant, supports
from laplax_kfac.parsing.uses import Findings
from laplax_kfac.parsing.values import (
    COTANGENT,
    FOREIGN,
    Known,
    Symbolic,
    constant,
    of_parameters,
)


def rearranged(step: Step) -> Symbolic | None:
    """A function of one parameter alone whose pullback only rearranges and scales cotangents.

    The pullback of ``y = f(w)`` is walked with a symbolic cotangent g. If it finds that entry i of
    the result is ``scale[i] * g[index[i]]``, then, as far as any gradient can tell,
    ``y[index[i]]`` is ``scale[i] * w[i]`` plus a constant. So a straight-through estimator is a
    view of its parameter, whatever its forward rule computes.
    """
    eqn, values = step.eqn, step.values
    mine = [k for k, v in enumerate(values) if isinstance(v, Symbolic)]
    varying = any(isinstance(v, Known) and v.scan_axes for v in values)
    others = [v for v in values if not isinstance(v, Symbolic | Known)]
    if len(mine) != 1 or len(eqn.outvars) != 1 or eqn.effects or varying or others:
        return None
    parameter, out = values[mine[0]], eqn.outvars[0]
    if not of_parameters(parameter):
        return None

    def pullback(w: Any, cotangent: Any) -> Any:
        def forward(w: Any) -> Any:
            operands = [v.value() if isinstance(v, Known) else w for v in values]
            return jaxprs.evaluate(step.jaxpr, eqn, operands)[0]

        return jax.vjp(forward, w)[1](cotangent)

    try:
        specs = map(jaxprs.spec, (eqn.invars[mine[0]], out))
        rule, consts, _ = jaxprs.trace(pullback, *specs)
    except (TypeError, ValueError, NotImplementedError):
        return None  # no derivative: whoever differentiates the model will be told
    cotangent = Symbolic(COTANGENT, jaxprs.numbered(out))
    (found,) = step.walk(rule, [*map(constant, consts), None, cotangent], Scope(Findings()))
    if not isinstance(found, Symbolic):
        return None
    # No place of the output twice: else the pullback sums over its places.
    inside = found.index != FOREIGN
    places = found.index[inside]
    if np.unique(places).size != places.size:
        return None
    if not inside.all():  # what is no entry of the cotangent must be zero, not a product with it
        known = [*map(of_constant, consts), *map(everywhere, rule.invars[len(consts) :])]
        if (supports(rule, known)[0] & ~inside).any():
            return None
    return parameter.put(found, jaxprs.shape(out))
