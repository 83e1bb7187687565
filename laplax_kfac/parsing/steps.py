"""One step of the walk: an equation with what is known of its operands, and where it sits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike

from laplax_kfac import jaxprs
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.uses import Findings, Role, Site, Use
from laplax_kfac.parsing.values import Value, constant


@dataclass(frozen=True)
class Given:
    """How the inputs of a jaxpr are computed of a program's, as far as no data enter.

    Attributes:
        space: The parameters.
        consts: Arrays that the program closes over.
        types: Those of the program's inputs: of these arrays, then of the leaves.
        read: Takes the program's inputs, without those that are data, to those of the jaxpr.
    """

    space: ParameterSpace
    consts: Sequence[ArrayLike]
    types: Sequence[jax.ShapeDtypeStruct]
    read: Callable[[Sequence[jaxprs.Value]], Sequence[jaxprs.Value]]

    def value(self, jaxpr: Jaxpr, atom: jaxprs.Atom, inputs: Sequence[jaxprs.Value]) -> ArrayLike:
        """The value of a variable that no data enter, given the program's inputs."""
        alone = jaxpr.replace(outvars=[atom])
        live, used = dce_jaxpr(alone, [True])
        # Data come last, and may be left out.
        pairs = zip(self.read(inputs), used, strict=False)
        (found,) = eval_jaxpr(live, [], *(x for x, needed in pairs if needed))
        return found


@dataclass(frozen=True)
class Scope:
    """Where the walk is.

    Attributes:
        findings: What it has found so far.
        site: The enclosing equations.
        scans: Lengths of the enclosing scans.
        given: How what no data enter is computed; None inside loops and branches.
    """

    findings: Findings
    site: Site = ()
    scans: tuple[int, ...] = ()
    given: Given | None = None


Walk = Callable[[Jaxpr, Sequence[Value], Scope], list[Value]]


@dataclass(frozen=True)
class Step:
    """One equation on the walk.

    Attributes:
        jaxpr: The jaxpr it is an equation of.
        number: Its number there.
        eqn: The equation.
        values: Its operands.
        scope: Where the walk is.
        walk: What follows the values through a sub-jaxpr.
    """

    jaxpr: Jaxpr
    number: int
    eqn: JaxprEqn
    values: list[Value]
    scope: Scope
    walk: Walk

    @property
    def findings(self) -> Findings:
        """What the walk has found so far."""
        return self.scope.findings

    @property
    def site(self) -> Site:
        """Where the equation sits."""
        return (*self.scope.site, self.number)

    @property
    def nothing(self) -> list[Value]:
        """Outputs of which nothing is known."""
        return [None] * len(self.eqn.outvars)

    def add_use(self, role: Role) -> int:
        """Note that the equation uses a parameter; returns the number of the use."""
        self.findings.uses.append(Use(self.eqn, self.site, self.scope.scans, role))
        return len(self.findings.uses) - 1

    def mark(self, pattern: str, reason: str) -> list[Value]:
        """Note that the parameters in the operands have no Kronecker form here."""
        for value in self.values:
            self.findings.mark(value, pattern, reason)
        return self.nothing

    def enter(
        self,
        body: tuple[Jaxpr, list[ArrayLike]],
        values: Sequence[Value],
        branch: int = 0,
        scans: tuple[int, ...] = (),
    ) -> list[Value]:
        """Walk a sub-jaxpr of the equation."""
        jaxpr, consts = body
        inside = replace(
            self.scope,
            site=(*self.site, branch),
            scans=self.scope.scans + scans,
            given=self._given_inside(consts),
        )
        return self.walk(jaxprs.with_consts(jaxpr), [*map(constant, consts), *values], inside)

    def _given_inside(self, consts: Sequence[ArrayLike]) -> Given | None:
        """How the inputs of a body are computed, if the equation does nothing but evaluate it."""
        given = self.scope.given
        if given is None or jaxprs.called_jaxpr(self.eqn) is None:
            return None
        outer = given

        def read(inputs: Sequence[jaxprs.Value]) -> list[jaxprs.Value]:
            pairs = zip(self.eqn.invars, self.values, strict=True)
            return [*consts, *(
                outer.value(self.jaxpr, atom, inputs) if self.findings.is_fixed(value) else None
                for atom, value in pairs
            )]  # fmt: skip

        return replace(given, read=read)


Rule = Callable[[Step], list[Value]]
"""Notes the uses of an equation, and returns the values of its outputs."""
