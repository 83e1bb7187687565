"""Jaxprs without the explicit axes that they were traced with.

A model that names explicit axes has them in its equations: in parameters such as ``out_sharding``,
in the types of its variables, in the context of each equation. Here the same equations are put
together without them, so that they compute the same with the axes of the moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

AnyMesh = TypeVar("AnyMesh", bound=Mesh | AbstractMesh)

MOVES = ("reshard", "mesh_cast")
"""Equations that change nothing but where an array lies."""


def evaluate(jaxpr: Jaxpr, consts: Sequence[ArrayLike], values: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr that was traced with explicit axes at arrays without them."""
    trivial = jax.make_jaxpr(jnp.negative)(0.0).jaxpr.eqns[0]
    return list(eval_jaxpr(Renewed(trivial.ctx).jaxpr(jaxpr), consts, *values))


@dataclass(frozen=True)
class Renewed:
    """What becomes of the parts of a jaxpr.

    Attributes:
        context: The context that equations get.
        variables: Old variables -> new ones, or what stands in their place.
    """

    context: Any
    variables: dict[Var, Var | Literal] = field(default_factory=dict)

    def jaxpr(self, old: Jaxpr) -> Jaxpr:
        """The jaxpr without explicit axes."""
        inside = Renewed(self.context)
        constvars = [inside.new(v) for v in old.constvars]
        invars = [inside.new(v) for v in old.invars]
        equations = [new for eqn in old.eqns for new in inside.equations(old, eqn)]
        outvars = [inside.read(v) for v in old.outvars]
        return old.replace(constvars=constvars, invars=invars, eqns=equations, outvars=outvars)

    def equations(self, jaxpr: Jaxpr, eqn: JaxprEqn) -> list[JaxprEqn]:
        """The equations that stand for one; none if it does nothing else than to move."""
        if eqn.primitive.name in MOVES:
            self.variables[eqn.outvars[0]] = self.read(eqn.invars[0])
            return []
        if not has_explicit_axes(eqn.ctx.cur_abstract_mesh):
            context = eqn.ctx
        elif eqn.primitive.name.startswith("custom_"):
            return self.with_rule(jaxpr, eqn)
        else:
            context = self.context
        new = eqn.replace(
            invars=[self.read(v) for v in eqn.invars],
            outvars=[self.new(v) for v in eqn.outvars],
            params={name: self.parameter(name, x) for name, x in eqn.params.items()},
            ctx=context,
        )
        return [new]

    def with_rule(self, jaxpr: Jaxpr, eqn: JaxprEqn) -> list[JaxprEqn]:
        """The equations that stand for one with a derivative rule, which is kept."""
        rule = Rule.of(jaxpr, eqn)
        (body,) = (v for v in eqn.params.values() if isinstance(v, ClosedJaxpr))
        renewed = self.jaxpr(body.jaxpr)

        def function(*values: ArrayLike) -> list[ArrayLike]:
            return list(eval_jaxpr(renewed, body.consts, *values))

        kept = rule.forward if eqn.primitive.name.startswith("custom_jvp") else rule.backward
        operands = [self.read(v) for v in eqn.invars]
        closed = jax.make_jaxpr(kept(function))(*[shape_of(v) for v in operands])
        consts = [Literal(x, jax.typeof(x)) for x in closed.consts]
        known = dict(zip(closed.jaxpr.constvars, consts, strict=True))
        known |= dict(zip(closed.jaxpr.invars, operands, strict=True))
        outvars = [v if isinstance(v, Literal) else known.get(v, v) for v in closed.jaxpr.outvars]
        self.variables.update(zip(eqn.outvars, outvars, strict=True))
        return [
            new.replace(
                invars=[v if isinstance(v, Literal) else known.get(v, v) for v in new.invars]
            )
            for new in closed.jaxpr.eqns
        ]

    def read(self, atom: Var | Literal) -> Var | Literal:
        """What stands for a variable or literal."""
        return atom if isinstance(atom, Literal) else self.variables[atom]

    def new(self, var: Var) -> Var:
        """A variable of the same shape and dtype, which stands for it from now on."""
        sharding = getattr(var.aval, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not has_explicit_axes(sharding.mesh):
            self.variables[var] = var
            return var
        mesh = automatic_mesh(sharding.mesh)
        spec = PartitionSpec(*[None] * shape_of(var).ndim)
        made = Var(var.aval.update(sharding=NamedSharding(mesh, spec)))
        self.variables[var] = made
        return made

    def parameter(self, name: str, value: Any) -> Any:
        """A parameter of an equation without explicit axes, at any depth."""
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(self.parameter("", x) for x in value)
        if isinstance(value, Jaxpr):
            return self.jaxpr(value)
        if isinstance(value, ClosedJaxpr):
            return value.replace(jaxpr=self.jaxpr(value.jaxpr))
        if isinstance(value, NamedSharding) and has_explicit_axes(value.mesh):
            if name.endswith("sharding"):  # what the axes of the outputs are
                return None
            return NamedSharding(automatic_mesh(value.mesh), value.spec)
        return automatic_mesh(value) if has_explicit_axes(value) else value


@dataclass(frozen=True)
class Rule:
    """A derivative rule that somebody wrote, in an equation with explicit axes.

    JAX traces such a rule when it is needed, with the types that the equation had. So the rule is
    applied as a whole, with these axes, and what it did is taken over (`evaluate`).

    Attributes:
        jaxpr: The equation alone, as a function of all its operands.
        mesh: The mesh that it was traced with.
    """

    jaxpr: Jaxpr
    mesh: AbstractMesh

    @classmethod
    def of(cls, jaxpr: Jaxpr, eqn: JaxprEqn) -> "Rule":
        """The rule of an equation of a jaxpr."""
        operands, outputs = ([Var(v.aval) for v in vs] for vs in (eqn.invars, eqn.outvars))
        alone = eqn.replace(invars=[*operands], outvars=outputs)
        single = jaxpr.replace(constvars=[], invars=operands, outvars=outputs, eqns=[alone])
        return cls(single, eqn.ctx.cur_abstract_mesh)

    @property
    def moved(self) -> list[int]:
        """The operands that have a derivative."""
        invars = enumerate(self.jaxpr.invars)
        return [k for k, v in invars if jnp.issubdtype(shape_of(v).dtype, jnp.inexact)]

    def of_moved(self, values: Sequence[Any]) -> Any:
        """The equation as a function of the operands that have a derivative."""

        def function(*some: Any) -> list[Any]:
            everything = list(values)
            for k, x in zip(self.moved, some, strict=True):
                everything[k] = x
            return list(eval_jaxpr(self.jaxpr, [], *everything))

        return function

    def taken_over(
        self, function: Any, more: Sequence[Var | Literal], values: Sequence[Any]
    ) -> list[Any]:
        """A function of the operands, and of more, traced with the axes, evaluated without."""
        with jax.sharding.use_abstract_mesh(self.mesh):
            closed = jax.make_jaxpr(function)(*map(shape_of, [*self.jaxpr.invars, *more]))
        return evaluate(closed.jaxpr, closed.consts, values)

    def forward(self, function: Any) -> Any:
        """The function with this rule, of `jax.custom_jvp`."""
        call, n = jax.custom_jvp(function), len(self.jaxpr.invars)

        def both(*values: Any) -> Any:
            some = [values[k] for k in self.moved]
            return jax.jvp(self.of_moved(values[:n]), some, list(values[n:]))

        def rule(primals: Any, tangents: Any) -> Any:
            more = [self.jaxpr.invars[k] for k in self.moved]
            values = [*primals, *(tangents[k] for k in self.moved)]
            found = self.taken_over(both, more, values)
            half = len(self.jaxpr.outvars)
            return found[:half], found[half:]

        call.defjvp(rule)
        return call

    def backward(self, function: Any) -> Any:
        """The function with this rule, of `jax.custom_vjp`."""
        call, n = jax.custom_vjp(function), len(self.jaxpr.invars)

        def pulled(*values: Any) -> Any:
            some = [values[k] for k in self.moved]
            return jax.vjp(self.of_moved(values[:n]), *some)[1](list(values[n:]))

        def rule(values: Any, cotangents: Any) -> Any:
            found = self.taken_over(pulled, self.jaxpr.outvars, [*values, *cotangents])
            pairs = dict(zip(self.moved, found, strict=True))
            return tuple(pairs.get(k) for k in range(n))

        call.defvjp(lambda *values: (function(*values), values), rule)
        return call


def shape_of(atom: Var | Literal) -> jax.ShapeDtypeStruct:
    """The type of a variable, with its axes."""
    aval: Any = atom.aval
    sharding = getattr(aval, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding if on_mesh else None)


def has_explicit_axes(mesh: Any) -> bool:
    """Whether this is a mesh, with explicit axes."""
    return AxisType.Explicit in (getattr(mesh, "axis_types", None) or ())


def automatic_mesh(mesh: AnyMesh) -> AnyMesh:
    """A mesh with its explicit axes automatic."""
    kinds = (AxisType.Auto if a == AxisType.Explicit else a for a in mesh.axis_types)
    return cast("AnyMesh", mesh.update(axis_types=tuple(kinds)))
