"""The evaluator: a jaxpr with zeros added to the outputs of uses, and the uses' inputs kept.

Equations without a use inside are evaluated by JAX as they stand, or by a rewrite with a cheaper
pullback. Perturbations of a loop's body go in as scanned inputs, inputs come out stacked; branches
of a cond that are not taken have inputs of zero.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.typing import ArrayLike
from jaxtyping import Array

from laplax_kfac import jaxprs
from laplax_kfac.capture.plan import Perturbations, Plan
from laplax_kfac.capture.rewrites import rewrite
from laplax_kfac.jaxprs import Value

Inputs = dict[int, tuple[ArrayLike, Array, tuple[ArrayLike, ...]]]
"""Use -> its inputs, 1 where its equation ran, and what sums of inputs are formed from, if so."""


def run(
    jaxpr: Jaxpr, arguments: Sequence[Value], plan: Plan, perturbations: Perturbations
) -> tuple[list[Value], Inputs]:
    """Evaluate a jaxpr, with perturbations of the uses' outputs, and keep the uses' inputs."""
    env: dict[Value, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    inputs: Inputs = {}

    def read(atom: Value) -> Value:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(a) for a in eqn.invars]
        if number in plan.inside:
            outputs, found = _run_nested(eqn, values, plan.inside[number], perturbations)
            inputs |= found
        else:
            better = rewrite(eqn, layer=number in plan.uses)
            outputs = better(values) if better else jaxprs.evaluate(jaxpr, eqn, values)
        for key, use in plan.uses.get(number, []):
            others = tuple(v for k, v in enumerate(values) if k != use.operand)
            active = use.pattern.active
            inputs[key] = (
                use.pattern.inputs(eqn, use.operand, others),
                active(eqn, use.operand, others) if active else jnp.ones((1, 1)),
                others if use.moments else (),
            )
        if number in plan.perturbations:
            outputs[0] = outputs[0] + perturbations[plan.perturbations[number]]
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(a) for a in jaxpr.outvars], inputs


def _run_nested(
    eqn: JaxprEqn, values: list[Value], plans: dict[int, Plan], perturbations: Perturbations
) -> tuple[list[Value], Inputs]:
    """Evaluate an equation with uses in its sub-jaxprs."""
    name = eqn.primitive.name
    if name == "scan":
        return _run_scan(eqn, values, plans[0], perturbations)
    if name == "cond":
        return _run_cond(eqn, values, plans, perturbations)
    # A rule that the walk has found to be the derivative of its body needs none of its own.
    called = jaxprs.called_jaxpr(eqn) or jaxprs.ruled_jaxpr(eqn)
    assert called is not None
    body, consts = called
    mine = {p: perturbations[p] for p in plans[0].all_perturbations()}

    def call(values: list[Value], perturbations: Perturbations) -> tuple[list[Value], Inputs]:
        return run(jaxprs.with_consts(body), [*consts, *values], plans[0], perturbations)

    if name in jaxprs.REMAT:
        options = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
        return jax.checkpoint(call, **options)(values, mine)
    return call(values, mine)


def _run_scan(
    eqn: JaxprEqn, values: list[Value], plan: Plan, perturbations: Perturbations
) -> tuple[list[Value], Inputs]:
    """Perturbations go in as scanned inputs, the uses' inputs come out stacked."""
    scan = jaxprs.scan_parts(eqn)
    body = jaxprs.with_consts(scan.body)
    first_x = scan.num_consts + scan.num_carry
    fixed = [*scan.consts, *values[: scan.num_consts]]

    def step(
        carry: list[Value], xs: tuple[list[Value], Perturbations]
    ) -> tuple[list[Value], Value]:
        outs, inputs = run(body, [*fixed, *carry, *xs[0]], plan, xs[1])
        return outs[: scan.num_carry], (outs[scan.num_carry :], inputs)

    mine = {p: perturbations[p] for p in plan.all_perturbations()}
    carry, (ys, inputs) = lax.scan(
        step,
        values[scan.num_consts : first_x],
        (values[first_x:], mine),
        length=scan.length,
        reverse=scan.reverse,
        unroll=eqn.params.get("unroll", 1),
    )
    return [*carry, *ys], inputs


def _run_cond(
    eqn: JaxprEqn, values: list[Value], plans: dict[int, Plan], perturbations: Perturbations
) -> tuple[list[Value], Inputs]:
    """Uses in branches that are not taken have zero inputs and are not active."""
    index, *operands = values
    branches = jaxprs.cond_branches(eqn)

    def branch(k: int) -> Callable[..., tuple[list[Value], Inputs]]:
        body, consts = branches[k]
        plan = plans.get(k, Plan({}, {}, {}))
        return lambda ops, perturbations: run(
            jaxprs.with_consts(body), [*consts, *ops], plan, perturbations
        )

    mine = {p: perturbations[p] for plan in plans.values() for p in plan.all_perturbations()}
    calls = [branch(k) for k in range(len(branches))]
    found = [jax.eval_shape(call, operands, mine)[1] for call in calls]
    everything = {use: shape for shapes in found for use, shape in shapes.items()}

    def padded(call: Callable[..., tuple[list[Value], Inputs]]) -> Callable[..., Value]:
        def evaluate(ops: list[Value], perturbations: Perturbations) -> tuple[list[Value], Inputs]:
            outs, inputs = call(ops, perturbations)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), everything)
            return outs, {**zeros, **inputs}

        return evaluate

    return lax.switch(index, [padded(c) for c in calls], operands, mine)
