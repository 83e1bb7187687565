"""Equations that no pattern covers and no walk enters: what their pullback says of their operands.

Solvers, implicit layers and functions with derivative rules of their own take whatever is handed to
them, often a whole tree of parameters. Its *pullback* is the rule that JAX applies, traced alone:

* an entry of an operand whose cotangent is zero by the structure of the pullback (`supports`) plays
  no part in the equation, so its other uses decide;
* an output whose cotangent is handed on to one operand alone is a view of that operand;
* where the rule is the derivative of what the equation computes, the computation is walked in the
  place of the equation;
* what is left has no Kronecker form.

A rule is the derivative if both pullbacks are the same equations. Else both are evaluated at drawn
points, if they are made of analytic functions alone: the difference of two such functions is zero
everywhere, or different from zero at almost every point. Loops are left out, though these may be
analytic, too: an iteration that has converged has its implicit derivative up to rounding where it
contracts, and not elsewhere.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike

from laplax_kfac import jaxprs, machine
from laplax_kfac.caches import Cache
from laplax_kfac.parsing.index_rules import INDEX_RULES
from laplax_kfac.parsing.steps import Scope, Step
from laplax_kfac.parsing.structure import Structure, of_value
from laplax_kfac.parsing.supports import Support, everywhere, nowhere, supports
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

ANALYTIC = frozenset(INDEX_RULES) | frozenset(
    "add add_any sub mul div neg exp exp2 expm1 log log1p sin cos tan sinh cosh tanh asinh atan "
    "logistic erf erfc integer_pow square sqrt rsqrt pow reduce_sum cumsum cumprod dot_general "
    "conv_general_dilated pad iota mul_add".split()
)
"""Functions that are analytic wherever they are defined."""
SOLVES = ("custom_linear_solve", "linear_solve")
LARGEST = 2**22
"""Entries of operands beyond which pullbacks are not evaluated."""
MAGNITUDES = (0.5, 1.0, 2.0)

_VERDICTS: Cache[bool] = Cache(machine.MACHINE.passes_kept)

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
        key = self.key(), own.key(), tuple(isinstance(v, Known) for v in step.values)
        if key[0] == key[1]:
            return True
        if not (is_analytic(self.jaxpr) and is_analytic(own.jaxpr)):
            return False
        if jaxprs.is_traced([self.consts, own.consts]):
            return False
        return _VERDICTS.get(key, lambda: self.agrees(own, step))

    def key(self) -> object:
        """Equal for pullbacks of the same equations."""
        return Structure(rules=False).of(self.jaxpr), of_value(self.consts)

    def agrees(self, other: "Pullback", step: Step) -> bool:
        """Whether two pullbacks of analytic functions are the same at drawn points."""
        atoms = [*step.eqn.invars, *(step.eqn.outvars[k] for k in self.results)]
        drawn = [k for k, v in enumerate(step.values) if not isinstance(v, Known)]
        dtypes = {jaxprs.spec(a).dtype for a in atoms if jaxprs.is_inexact(a)}
        precise = all(jnp.finfo(d).eps < 1e-6 and d.kind == "f" for d in dtypes)
        small = sum(map(jaxprs.size, atoms)) <= LARGEST
        floating = all(jaxprs.is_inexact(step.eqn.invars[k]) for k in drawn)
        if not (precise and small and floating):
            return False
        tolerance = 100 * max(float(jnp.finfo(d).eps) for d in dtypes) ** 0.75
        rng = np.random.default_rng(0)

        @jax.jit
        def distance(points: list[ArrayLike]) -> list[jax.Array]:
            """Of the two, relative to their size, for every operand."""
            mine = eval_jaxpr(self.jaxpr, [], *self.consts, *points)
            theirs = eval_jaxpr(other.jaxpr, [], *other.consts, *points)
            return [
                jnp.linalg.norm((a - b).ravel())
                / (
                    jnp.linalg.norm(a.ravel())
                    + jnp.linalg.norm(b.ravel())
                    + jnp.finfo(a.dtype).tiny
                )
                for a, b in zip(mine, theirs, strict=True)
            ]

        with jax.ensure_compile_time_eval():
            for magnitude in MAGNITUDES:
                points = [
                    np.asarray(
                        magnitude
                        * rng.normal(size=jaxprs.shape(a))
                        / max(jaxprs.size(a), 1) ** 0.25,
                        jaxprs.spec(a).dtype,
                    )
                    for a in atoms
                ]
                for k, value in enumerate(step.values):
                    if isinstance(value, Known):
                        points[k] = np.asarray(value.value())
                if not all(float(d) < tolerance for d in distance(points)):  # also if it is NaN
                    return False
        return True


def is_analytic(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr is of analytic functions alone: no kinks, choices, rounding or loops."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ANALYTIC:
            narrowed = jaxprs.is_inexact(eqn.invars[0]) if eqn.invars else False
            if narrowed and not all(map(jaxprs.is_inexact, eqn.outvars)):
                return False
            continue
        body = jaxprs.ruled_jaxpr(eqn) or jaxprs.called_jaxpr(eqn)
        if body is None or not is_analytic(body[0]):
            return False
    return True
