"""Where zeros are added: at the output of every use, and to every fallback parameter.

Cotangents at these *zero perturbations* are all that is wanted of a pullback. A `Plan` says which
equations of a jaxpr, and of those inside it, are evaluated in another way than as they stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jaxtyping import Array

from laplax_kfac import jaxprs
from laplax_kfac.capture.rewrites import has_rewrite
from laplax_kfac.parsing.grouping import Member, Resolved
from laplax_kfac.parsing.program import Program
from laplax_kfac.parsing.uses import Use

Perturbations = dict[int, Array]
"""Number of a use, or of a layer without uses -> zeros, or cotangents at them."""


@dataclass(frozen=True)
class Plan:
    """The equations of one jaxpr that need more than plain evaluation.

    Attributes:
        uses: Equation number -> (number, use) of the uses of that equation.
        perturbations: Equation number -> number of the perturbation at its output.
        inside: Equation number -> sub-jaxpr number -> plan of the sub-jaxpr.
    """

    uses: dict[int, list[tuple[int, Use]]]
    perturbations: dict[int, int]
    inside: dict[int, dict[int, "Plan"]]

    def all_perturbations(self) -> list[int]:
        """Numbers of the perturbations here and inside."""
        nested = [
            p
            for plans in self.inside.values()
            for q in plans.values()
            for p in q.all_perturbations()
        ]
        return [*self.perturbations.values(), *nested]


def plan_of(program: Program) -> Plan:
    """The plan of a program: its uses by where they are, and bodies with rewrites inside."""
    root = Plan({}, {}, {})
    perturbed_uses = {m.claim.use for m in members_of(program)}
    for number in sorted({k for m in members_of(program) for k in m.claim.used}):
        use, plan = program.uses[number], root
        *path, last = use.site
        for equation, branch in zip(path[::2], path[1::2], strict=True):
            plans = plan.inside.setdefault(equation, {})
            plan = plans.setdefault(branch, Plan({}, {}, {}))
        plan.uses.setdefault(last, []).append((number, use))
        if number in perturbed_uses:
            plan.perturbations[last] = perturbation_of(program, number)
    _enter_rewrites(program.jaxpr, root)
    return root


def _enter_rewrites(jaxpr: Jaxpr, plan: Plan) -> None:
    """Plan to enter bodies without uses, too, where a better way to evaluate them is inside."""
    for number, eqn in enumerate(jaxpr.eqns):
        for branch, body in enumerate(jaxprs.bodies(eqn)):
            if has_rewrite(body):
                inside = plan.inside.setdefault(number, {}).setdefault(branch, Plan({}, {}, {}))
                _enter_rewrites(body, inside)


def perturbation_of(program: Program, use: int) -> int:
    """Uses of one equation (a product of two parameters) share the perturbation at its output."""
    site = program.uses[use].site
    return min(number for number, use in program.uses.items() if use.site == site)


def members_of(program: Program) -> list[Member]:
    """Uses of all layers."""
    return [m for r in program.resolved for m in r.members]


def perturbations_of_uses(program: Program) -> Perturbations:
    """Zeros like the outputs of uses, with the axes of the scans that they are in."""
    perturbations = {}
    for member in members_of(program):
        use = program.uses[member.claim.use]
        output = jaxprs.spec(use.eqn.outvars[0])
        number = perturbation_of(program, member.claim.use)
        perturbations[number] = jnp.zeros((*use.scans, *output.shape), output.dtype)
    return perturbations


def is_fallback(resolved: Resolved) -> bool:
    """Whether a layer's parameters are perturbed themselves."""
    return resolved.layer.block != "none" and not resolved.members


def perturbations_of_parameters(program: Program) -> Perturbations:
    """Zeros like the fallback parameters, by number of the layer."""
    space = program.space
    real = [jnp.finfo(d).dtype if jnp.issubdtype(d, jnp.inexact) else d for d in space.dtypes]
    dtype = dict(zip(space.paths, real, strict=True))
    return {
        number: jnp.zeros(
            resolved.layer.size, jnp.result_type(*(dtype[p] for p in resolved.layer.params))
        )
        for number, resolved in enumerate(program.resolved)
        if is_fallback(resolved)
    }


def perturbed(
    program: Program, leaves: Sequence[Array], perturbations: Perturbations
) -> list[Array]:
    """Leaves of the parameters with the perturbations of fallback parameters added."""
    space, moved = program.space, list(leaves)
    for number, perturbation in perturbations.items():
        rest = perturbation
        for segment in program.layers[number].segments:
            ids = space.ids(segment).ravel()
            mine, rest = rest[: ids.size], rest[ids.size :]
            for leaf in space.leaves_of(ids):  # one, but for a block of all
                first, last = space.offsets[leaf : leaf + 2]
                inside = np.flatnonzero((ids >= first) & (ids < last))
                zeros = mine if inside.size == ids.size else mine[inside]
                zeros = zeros.astype(moved[leaf].dtype)
                if np.array_equal(ids[inside], space.leaf_ids(leaf).ravel()):
                    moved[leaf] = moved[leaf] + zeros.reshape(moved[leaf].shape)
                    continue
                flat = moved[leaf].reshape(-1).at[ids[inside] - first].add(zeros)
                moved[leaf] = flat.reshape(moved[leaf].shape)
    return moved
