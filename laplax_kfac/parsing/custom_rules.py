"""Equations that no pattern covers and no walk enters: what their pullback says of their operands.

Solvers, implicit layers and functions with derivative rules of their own take whatever is handed to
them, often a whole tree of parameters. Its *pullback* is the rule that JAX applies, traced alone:

* an entry of an operand whose cotangent is zero by the structure of the pullback (`supports`) plays
  no part in the equation, so its other uses decide;
* an output whose cotangent is handed on to one operand alone is a view of that operand;
* where the rule is the derivative of what the equation computes (`agreement`), the computation is
  walked in the place of the equation;
* what is left has no Kronecker form.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike

from laplax_kfac import jaxprs
from laplax_kfac.parsing.agreement import agree
from laplax_kfac.parsing.steps import Scope, Step
from laplax_kfac.parsing.support_rules import Support
from laplax_kfac.parsing.supports import everywhere, nowhere, supports
from laplax_kfac.parsing.uses import Fallback, Findings
from laplax_kfac.parsing.values import (
    COTANGENT,
    FOREIGN,
    Known,
    Symbolic,
    Value,
    constant,
    of_parameters,
)

SOLVES = ("custom_linear_solve", "linear_solve")
WAY_OUT = (
    "for a Kronecker block, differentiate through its steps (diffrax: `DirectAdjoint`, jaxopt: "
    "`implicit_diff=False`), or close over these parameters"
)


def opaque(step: Step) -> list[Value]:
    """An equation that no pattern covers."""
    name = step.eqn.primitive.name
    if not any(map(of_parameters, step.values)):
        return step.nothing
    # A function without a body reads all that it is given: nothing is to be found out.
    plain = step.eqn.effects or not jaxprs.held(step.eqn)
    pullback = None if plain else Pullback.of(step)
    if pullback is None:
        return step.mark("other", f"used by `{name}`, which no pattern covers")
    outputs, used = pullback.outputs(step)
    marked = [ids for ids in used if ids.size]
    forward = jaxprs.ruled_jaxpr(step.eqn)
    if marked and forward is not None and pullback.is_of(step, forward):
        return step.enter(forward, step.values)
    reason = f"used by `{name}`, which no pattern covers"
    of_data = not all(map(step.findings.is_fixed, step.values))
    if of_data and (forward is not None or name in SOLVES):
        reason = f"used inside a `{name}` with a derivative of its own; {WAY_OUT}"
    step.findings.fallbacks.extend(Fallback.of(ids, "other", reason) for ids in marked)
    return outputs


@dataclass(frozen=True)
class Pullback:
    """The pullback of an equation.

    Attributes:
        jaxpr: Its inputs are the constants, the operands, and the cotangents of differentiable
            outputs; its outputs the cotangents of the differentiable operands.
        consts: The constants.
        operands: Which operands are differentiable.
        results: Which outputs are, of those that are read.
    """

    jaxpr: Jaxpr
    consts: list[ArrayLike]
    operands: list[int]
    results: list[int]

    @classmethod
    def of(
        cls, step: Step, forward: tuple[Jaxpr, list[ArrayLike]] | None = None
    ) -> "Pullback | None":
        """The pullback of an equation, or of what it computes; None if there is none."""
        eqn = step.eqn
        # Leading operands that the function closes over have no derivative under such a rule.
        ruled = eqn.primitive.name.startswith("custom_vjp")
        closed = int(eqn.params.get("num_consts", 0)) if ruled else 0
        operands = [
            k for k, v in enumerate(eqn.invars)
            if jaxprs.is_inexact(v)
            and (k >= closed or of_parameters(step.values[k]))
        ]  # fmt: skip
        results = [k for k, v in enumerate(eqn.outvars)
                   if jaxprs.is_inexact(v) and not jaxprs.is_dropped(v)]  # fmt: skip

        def pullback(values: list[ArrayLike], cotangents: list[ArrayLike]) -> list[ArrayLike]:
            def function(*moved: ArrayLike) -> list[ArrayLike]:
                full = list(values)
                for k, x in zip(operands, moved, strict=True):
                    full[k] = x
                if forward is None:
                    outputs = jaxprs.evaluate(step.jaxpr, eqn, full)
                else:
                    outputs = list(eval_jaxpr(forward[0], forward[1], *full))
                return [outputs[k] for k in results]

            found: list[ArrayLike] = list(
                jax.vjp(function, *[values[k] for k in operands])[1](cotangents)
            )
            return found

        specs = list(map(jaxprs.spec, eqn.invars))
        along = [jaxprs.spec(eqn.outvars[k]) for k in results]
        try:
            jaxpr, consts, _ = jaxprs.trace(pullback, specs, along)
        except Exception:  # a rule may raise anything; whoever differentiates the model is told
            return None
        return cls(jaxpr, consts, operands, results)

    def outputs(self, step: Step) -> tuple[list[Value], list[np.ndarray]]:
        """The equation's outputs, and the ids of parameters that it uses."""
        eqn, values = step.eqn, step.nothing
        used: list[np.ndarray] = []
        for place, result in enumerate(self.results):
            found = self.supports_of(step, place)
            mine = [k for k, support in zip(self.operands, found, strict=True) if support.any()]
            view = self.view(step, place, mine[0]) if len(mine) == 1 else None
            if view is not None:
                values[result] = view
                continue
            for k, support in zip(self.operands, found, strict=True):
                value = step.values[k]
                if of_parameters(value):
                    used.append(np.unique(value.index[np.asarray(support)]))
        fixed = all(map(step.findings.is_fixed, step.values))
        own = [v if not isinstance(v, Symbolic) or fixed else self.joined(v) for v in values]
        assert len(own) == len(eqn.outvars)
        return own, used

    @staticmethod
    def joined(value: Symbolic) -> Symbolic:
        """A view with which data may have been joined, as terms that have no derivative."""
        return Symbolic(value.source, value.index, value.scale, mixed=True)

    def supports_of(self, step: Step, place: int) -> list[Support]:
        """For every differentiable operand, where the cotangent of one output may move it."""
        jaxpr = self.jaxpr
        before = len(self.consts) + len(step.eqn.invars)
        inputs = [*map(everywhere, jaxpr.invars[:before])]
        for k, atom in enumerate(jaxpr.invars[before:]):
            inputs.append(everywhere(atom) if k == place else nowhere(atom))
        return supports(jaxpr, inputs)

    def view(self, step: Step, place: int, operand: int) -> Symbolic | None:
        """An output as a view of the parameter that alone its cotangent is handed on to."""
        value, eqn = step.values[operand], step.eqn
        if not of_parameters(value):
            return None
        out = eqn.outvars[self.results[place]]
        along: list[Value] = [
            Symbolic(COTANGENT, jaxprs.numbered(out)) if k == place else self.zero(result)
            for k, result in enumerate(eqn.outvars[k] for k in self.results)
        ]
        known = [v if isinstance(v, Known) and not v.scan_axes else None for v in step.values]
        inputs: list[Value] = [*map(constant, self.consts), *known, *along]
        found = step.walk(self.jaxpr, inputs, Scope(Findings()))[self.operands.index(operand)]
        if not isinstance(found, Symbolic) or found.source != COTANGENT:
            return None
        (support,) = (
            s for k, s in zip(self.operands, self.supports_of(step, place), strict=True)
            if k == operand
        )  # fmt: skip
        inside = found.index != FOREIGN
        places = found.index[inside]
        if np.unique(places).size != places.size or (support & ~inside).any():
            return None
        return value.put(found, jaxprs.shape(out))

    @staticmethod
    def zero(atom: jaxprs.Atom) -> Known:
        """The cotangent of an output that is left out."""
        spec = jaxprs.spec(atom)
        return Known(lambda: np.zeros(spec.shape, spec.dtype))

    def is_of(self, step: Step, forward: tuple[Jaxpr, list[ArrayLike]]) -> bool:
        """Whether this is the pullback of what the equation computes."""
        own = Pullback.of(step, forward)
        if own is None:
            return False
        atoms = [*step.eqn.invars, *(step.eqn.outvars[k] for k in self.results)]
        values = [*step.values, *[None] * len(self.results)]
        return agree((self.jaxpr, self.consts), (own.jaxpr, own.consts), atoms, values)
