"""From a model's jaxpr to the uses of its parameters.

The walk follows every parameter forward through structural equations by *index tracing* (the
equations are evaluated on the ids of the parameters, see `index_rules`), until an equation uses it:

* as the weight of a registered pattern: a Kronecker use;
* added to the output of such a use, or to data: a bias (see `biases`);
* in any other way: a fallback parameter, whose own gradient is exact whatever the use.

The outputs of uses are followed by the same means, so that a bias is recognised through any
relayout between the product and the sum. `grouping` then turns uses into layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal

from laplax_kfac import jaxprs, patterns
from laplax_kfac.parsing import arithmetic, control_flow, made_weights
from laplax_kfac.parsing.custom_rules import opaque
from laplax_kfac.parsing.index_rules import INDEX_RULES, SELECTIONS, moved, selected
from laplax_kfac.parsing.products import carried, is_product, scaled
from laplax_kfac.parsing.pullbacks import rearranged
from laplax_kfac.parsing.steps import Rule, Scope, Step
from laplax_kfac.parsing.uses import Weight
from laplax_kfac.parsing.values import (
    Fixed,
    Known,
    Symbolic,
    Value,
    known_outputs,
    of_parameters,
)

_RULES: dict[str, Rule] = arithmetic.RULES | control_flow.RULES


def walk(jaxpr: Jaxpr, inputs: Sequence[Value], scope: Scope) -> list[Value]:
    """Follow values through a jaxpr, noting uses; returns those of its outputs."""
    findings = scope.findings
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    differentiated = jaxprs.with_derivative(jaxpr)
    counts = jaxprs.consumers(differentiated.values(), jaxpr.outvars)

    def without_derivative(value: Value) -> Value:
        """What is left of a value where its cotangent is another one, or none."""
        if not isinstance(value, Symbolic):
            return value
        if is_product(value, findings):
            return scaled(value, findings)
        return Fixed() if findings.is_fixed(value) else None

    def read(atom: Any) -> Value:
        if isinstance(atom, Literal):
            return Known(lambda: np.asarray(atom.val))
        value = env.get(atom)
        # A use's output that is read twice has a cotangent that its bias does not see.
        if counts.get(atom, 0) > 1 and isinstance(value, Symbolic) and not of_parameters(value):
            return Fixed(value.endings) if findings.is_fixed(value) else None
        return value

    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(a) for a in eqn.invars]
        if number not in differentiated:
            values = [without_derivative(v) for v in values]
        fixed = not eqn.effects and all(map(findings.is_fixed, values))
        step = Step(jaxpr, number, eqn, values, scope, walk)
        outputs = made_weights.outputs(step, _outputs, fixed=fixed)
        for var, value in zip(eqn.outvars, outputs, strict=True):
            if fixed and not isinstance(value, Symbolic | Known | Fixed):
                value = Fixed()
            empty = isinstance(value, Symbolic) and value.index.size == 0
            kept = isinstance(value, Known | Fixed) or (jaxprs.is_inexact(var) and not empty)
            env[var] = value if kept else None
    return [read(a) for a in jaxpr.outvars]


def _outputs(step: Step) -> list[Value]:
    """Values of an equation's outputs, given those of its operands."""
    eqn, values, name = step.eqn, step.values, step.eqn.primitive.name
    if not any(isinstance(v, Symbolic) for v in values):
        known = [v for v in values if isinstance(v, Known)]
        if len(known) == len(values):
            return step.nothing if eqn.effects else [*known_outputs(step.jaxpr, eqn, known)]
        return carried(step)
    if not jaxprs.has_body(eqn) and any(jaxprs.is_complex(v) for v in eqn.outvars):
        reason = "used as a complex number by an equation that is no product with data and no sum"
        return step.mark("complex", reason)
    if name in INDEX_RULES:
        return moved(eqn, values)
    selection = selected(eqn, values) if name in SELECTIONS else None
    if selection is not None:
        return [selection]
    if patterns.find(eqn) is not None:
        return _weights(step)
    if name in _RULES:
        return _RULES[name](step)
    called = jaxprs.called_jaxpr(eqn)
    if called is not None:
        return step.enter(called, values)
    view = rearranged(step)
    return [view] if view else opaque(step)


def _weights(step: Step) -> list[Value]:
    """A registered primitive: note a use for every operand that is a weight."""
    eqn, findings, pattern = step.eqn, step.findings, patterns.find(step.eqn)
    assert pattern is not None
    outputs, name = step.nothing, eqn.primitive.name
    fixed = all(map(findings.is_fixed, step.values))
    for operand, value in enumerate(step.values):
        if not of_parameters(value):
            continue
        if operand not in pattern.operands(eqn):
            reason = f"operand {operand} of `{name}` is no weight of {pattern.name}"
            findings.mark(value, "other", reason)
            continue
        matrices = functools.partial(pattern.weight, eqn, operand)
        view = value.map_iterations(matrices, jaxprs.ndim(eqn.invars[operand]))
        use = step.add_use(Weight(pattern, operand, view, f"weight of `{name}`"))
        index = jaxprs.numbered(eqn.outvars[0])
        outputs[0] = Symbolic(use, index[(..., *[None] * len(step.scope.scans))])
        if fixed:
            findings.of_parameters.add(use)
    return outputs
