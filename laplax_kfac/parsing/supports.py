"""Supports: the entries of an array that may differ from zero, whatever the inputs of a jaxpr are.

The jaxpr is followed on truth values in the place of numbers: what only moves entries moves them, a
product needs both factors, a sum one of its terms. A loop repeats until its carries gain nothing.
Where nothing is known of an equation, all of its outputs may differ from zero; so an entry that is
found to be zero is zero, up to 0 times infinity. The derivative of a rule that somebody wrote is
read with it: operands whose cotangent is zero play no part, in however deep a solver.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike

from laplax_kfac import jaxprs
from laplax_kfac.jaxprs import Atom
from laplax_kfac.parsing.support_rules import Support, of_plain

LARGE = 2**23
"""Entries of an array beyond which only whether all of them are zero is kept."""


def everywhere(atom: Atom) -> Support:
    """All entries."""
    return np.broadcast_to(np.True_, jaxprs.shape(atom))


def nowhere(atom: Atom) -> Support:
    """No entry."""
    return np.broadcast_to(np.False_, jaxprs.shape(atom))


def of_constant(value: ArrayLike) -> Support:
    """The entries of an array that differ from zero; all while it is being traced."""
    dtype = jnp.result_type(value)
    if isinstance(value, jax.core.Tracer) or jnp.issubdtype(dtype, jax.dtypes.extended):
        return np.broadcast_to(np.True_, np.shape(value))
    return np.asarray(np.asarray(value) != 0)


def supports(jaxpr: Jaxpr, inputs: Sequence[Support]) -> list[Support]:
    """The supports of a jaxpr's outputs.

    Args:
        jaxpr: A jaxpr without constants.
        inputs: The supports of its inputs.
    """
    env: dict[Var, Support] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Atom) -> Support:
        return of_constant(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        found = Supports(eqn, [read(a) for a in eqn.invars]).outputs()
        for var, support in zip(eqn.outvars, found, strict=True):
            large = support.size > LARGE
            env[var] = np.broadcast_to(support.any(), support.shape) if large else support
    return [read(a) for a in jaxpr.outvars]


@dataclass(frozen=True)
class Supports:
    """An equation, and the supports of its operands."""

    eqn: JaxprEqn
    values: list[Support]

    def outputs(self) -> list[Support]:
        """The supports of its outputs."""
        eqn, name = self.eqn, self.eqn.primitive.name
        everything = [
            everywhere(v) if hasattr(v.aval, "shape") else np.ones((), bool) for v in eqn.outvars
        ]
        if all(value.all() for value in self.values) or eqn.effects:
            return everything
        rule = RULES.get(name)
        if rule is not None:
            return rule(self)
        forward = jaxprs.called_jaxpr(eqn) or jaxprs.ruled_jaxpr(eqn)
        if forward is not None:
            return self.inside(forward, self.values)
        found = of_plain(eqn, self.values)
        return everything if found is None else found

    def inside(self, body: tuple[Jaxpr, jaxprs.Consts], values: Sequence[Support]) -> list[Support]:
        """The supports of a sub-jaxpr's outputs."""
        jaxpr, consts = body
        return supports(jaxprs.with_consts(jaxpr), [*map(of_constant, consts), *values])

    def repeated(
        self,
        body: tuple[Jaxpr, jaxprs.Consts],
        fixed: Sequence[Support],
        carry: Sequence[Support],
        scanned: Sequence[Support] = (),
    ) -> list[Support]:
        """The supports of a loop's outputs, in any iteration."""
        while True:
            outputs = self.inside(body, [*fixed, *carry, *scanned])
            grown = [np.asarray(a | b) for a, b in zip(carry, outputs, strict=False)]
            if all((a == b).all() for a, b in zip(carry, grown, strict=True)):
                return [*grown, *outputs[len(grown) :]]
            carry = grown


def scan(step: Supports) -> list[Support]:
    """Carries gain what any iteration adds to them; of scanned arrays all iterations are one."""
    parts = jaxprs.scan_parts(step.eqn)
    first = parts.num_consts + parts.num_carry
    outputs = step.repeated(
        (parts.body, parts.consts),
        step.values[: parts.num_consts],
        step.values[parts.num_consts : first],
        [np.asarray(value.any(axis=0)) for value in step.values[first:]],
    )
    stacked = zip(outputs[parts.num_carry :], step.eqn.outvars[parts.num_carry :], strict=True)
    ys = [np.broadcast_to(y, jaxprs.shape(v)) for y, v in stacked]
    return [*outputs[: parts.num_carry], *ys]


def while_loop(step: Supports) -> list[Support]:
    """Carries gain what any iteration adds to them, however many there are."""
    params = step.eqn.params
    first = params["cond_nconsts"]
    fixed = step.values[first : first + params["body_nconsts"]]
    carry = step.values[first + params["body_nconsts"] :]
    return step.repeated(jaxprs.open_jaxpr(params["body_jaxpr"]), fixed, carry)


def cond(step: Supports) -> list[Support]:
    """What any branch puts out."""
    branches = [step.inside(b, step.values[1:]) for b in jaxprs.cond_branches(step.eqn)]
    return [np.asarray(np.logical_or.reduce(outputs)) for outputs in zip(*branches, strict=True)]


RULES: dict[str, Callable[[Supports], list[Support]]] = {
    "scan": scan,
    "while": while_loop,
    "cond": cond,
}
