"""Weights that are made of parameters: what becomes of these when no data enter an equation.

An equation of parameters alone ends their views, unless its output is one. What it says of them (an
`Ending`: a product of two parameters, a function that no rule follows) is put off, and goes with
its output, till that is used. As the weight of a registered pattern, the output says more: the
parameters are a layer's weight themselves if the derivative separates (`separable_maps`). In any
other use, the endings are what there is to say.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Int

from laplax_kfac import jaxprs, machine, patterns
from laplax_kfac.caches import Cache
from laplax_kfac.parsing.agreement import is_analytic_in
from laplax_kfac.parsing.biases import Bias
from laplax_kfac.parsing.claims import constant_along
from laplax_kfac.parsing.separable_maps import MadeWeight, SeparableMap, separable
from laplax_kfac.parsing.steps import Given, Step
from laplax_kfac.parsing.structure import Structure, of_value
from laplax_kfac.parsing.uses import Weight
from laplax_kfac.parsing.values import (
    FOREIGN,
    PARAMETERS,
    Ending,
    Fixed,
    Known,
    Symbolic,
    Value,
    of_parameters,
)

_FOUND: Cache[SeparableMap | None] = Cache(16 * machine.MACHINE.passes_kept)
"""What is known of functions that make weights of parameters, by their structure."""

REASON = "made into the weight of `{}` by a function that acts on inputs and outputs apart"


def outputs(step: Step, evaluated: Callable[[Step], list[Value]], *, fixed: bool) -> list[Value]:
    """The outputs of an equation, with the endings of the parameters that they are made of.

    Args:
        step: The equation.
        evaluated: Gives its outputs without them.
        fixed: Whether no data enter it.
    """
    called = jaxprs.called_jaxpr(step.eqn)
    if called is not None:  # entered even if no view is left: what is put off goes on inside
        return step.enter(called, step.values) if endings_of(step.values) else evaluated(step)
    if fixed and not jaxprs.has_body(step.eqn):
        return of_parameters_alone(step, evaluated)
    uses, rest = weights(step)
    found = [with_endings(v, ()) for v in evaluated(rest)]
    if uses and not any(isinstance(v, Symbolic) for v in found):
        found[0] = Symbolic(uses[0], jaxprs.numbered(step.eqn.outvars[0]))
    return found


def endings_of(values: Iterable[Value]) -> tuple[Ending, ...]:
    """All endings in some values, each once."""
    found = [e for v in values if isinstance(v, Symbolic | Fixed) for e in v.endings]
    return tuple({id(e): e for e in found}.values())


def with_endings(value: Value, endings: tuple[Ending, ...]) -> Value:
    """A value with other endings; a number that depends on no parameter has none."""
    return replace(value, endings=endings) if isinstance(value, Symbolic | Fixed) else value


def of_parameters_alone(step: Step, evaluated: Callable[[Step], list[Value]]) -> list[Value]:
    """The outputs of an equation that no data enter; what it says of parameters is put off."""
    findings = step.findings
    uses, fallbacks = len(findings.uses), len(findings.fallbacks)
    found, endings = evaluated(step), endings_of(step.values)
    if step.scope.given is not None:
        for entry in findings.fallbacks[fallbacks:]:
            views = [
                v for v in step.values if of_parameters(v) and np.array_equal(v.ids, entry.ids)
            ]
            view = views[0] if views else Symbolic(PARAMETERS, entry.ids)
            endings += (Ending(view, entry.pattern, entry.reason),)
        del findings.fallbacks[fallbacks:]
        for number, use in enumerate(findings.uses[uses:], start=uses):
            view = use.role.weight if isinstance(use.role, Bias) else use.role.view
            endings += (Ending(view, use.pattern.name, use.role.reason, number),)
    known = [v if isinstance(v, Symbolic | Known) else Fixed() for v in found]
    return [with_endings(v, endings) for v in known]


def weights(step: Step) -> tuple[list[int], Step]:
    """Note uses of the parameters that weights of an equation are made of; end all others.

    Returns:
        The numbers of the uses; first that of one that a bias may be joint with. And the equation
        without the operands whose parameters these are.
    """
    pattern, findings = patterns.find(step.eqn), step.findings
    noted: dict[int, bool] = {}
    rest = list(step.values)
    for operand, value in enumerate(step.values):
        endings = endings_of([value])
        if not endings:
            continue
        is_weight = pattern is not None and operand in pattern.operands(step.eqn)
        making = Making.of(step, operand) if is_weight and findings.is_fixed(value) else None
        for group in by_parameters(endings):
            # What the operand is a view of may be among what it is made of, as in `w - mean(w)`.
            whole = of_parameters(value) and np.array_equal(value.ids, group[0].view.ids)
            mixed = overlaps(group, endings, value if not whole else None)
            found = making.map_of(group[0].view) if making and not mixed else None
            if found is None or pattern is None or making is None:
                for ending in group:
                    findings.end(ending, makes_weight=making is not None)
                continue
            if whole:
                rest[operand] = Fixed()
            findings.passed_on.update(e.use for e in group if e.use is not None)
            view = Symbolic(PARAMETERS, making.ids_at(found)[None])
            reason = REASON.format(step.eqn.primitive.name)
            use = step.add_use(Weight(pattern, operand, view, reason, map=found))
            noted[use] = found.keeps_outputs
    return sorted(noted, key=lambda use: not noted[use]), replace(step, values=rest)


def by_parameters(endings: tuple[Ending, ...]) -> list[list[Ending]]:
    """Endings of the same parameters together."""
    groups: dict[bytes, list[Ending]] = {}
    for ending in endings:
        groups.setdefault(ending.view.ids.tobytes(), []).append(ending)
    return list(groups.values())


def overlaps(group: list[Ending], endings: tuple[Ending, ...], value: Value) -> bool:
    """Whether some parameters of a group are among those of other endings, or that it views."""
    others = [e.view for e in endings if not any(e is mine for mine in group)]
    others += [value] if of_parameters(value) else []
    return any(np.isin(view.ids, group[0].view.ids).any() for view in others)


@dataclass(frozen=True)
class Making:
    """How an equation's weight is made, in a program.

    Attributes:
        made: The weight as a function of parameters.
        given: How what no data enter is computed.
        leaves: The numbers of the leaves among the inputs of the function.
    """

    made: MadeWeight
    given: Given
    leaves: tuple[int, ...]

    @classmethod
    def of(cls, step: Step, operand: int) -> "Making | None":
        """How an operand is made; None where the equation has not one matrix, or in a loop."""
        given, eqn, pattern = step.scope.given, step.eqn, patterns.find(step.eqn)
        if given is None or pattern is None:
            return None
        consts, inputs = given.consts, given.types

        def weight(*inputs: jaxprs.Value) -> jaxprs.Value:
            made = given.value(step.jaxpr, eqn.invars[operand], inputs)
            stacked = pattern.weight(eqn, operand, jnp.asarray(made))
            return stacked[0] if len(stacked) == 1 else stacked

        traced, own, output = jaxprs.trace(weight, *inputs)
        if len(output.shape) != 2:
            return None
        jaxpr, used = dce_jaxpr(
            traced, [True], instantiate=[True] * len(own) + [False] * len(inputs)
        )
        numbers = tuple(int(k) for k in np.flatnonzero(used[len(own) :]))
        leaves = tuple(k - len(consts) for k in numbers if k >= len(consts))
        made = MadeWeight(jaxpr, tuple(own), numbers, len(numbers) - len(leaves))
        return cls(made, given, leaves)

    def map_of(self, view: Symbolic) -> SeparableMap | None:
        """How gradients in the weight are pulled back to parameters, if by acting on two sides."""
        index = view.index
        for axis in range(index.ndim):  # what is broadcast is one
            index = index.take([0], axis) if constant_along(index, axis) else index
        index = index if index.size == view.ids.size and index.min() != FOREIGN else view.ids
        touched = self.given.space.leaves_of(index)
        if not set(touched) <= set(self.leaves):
            return None
        # A complex leaf has its two parts as parameters.
        if any(self.given.space.is_complex(leaf) for leaf in touched):
            return None
        order = self._ids_of(touched)
        places = np.searchsorted(order, index)
        varied = tuple(self.made.num_consts + self.leaves.index(leaf) for leaf in touched)
        # Of an analytic function, what holds at drawn values holds at all.
        if not is_analytic_in(self.made.jaxpr, [len(self.made.own) + k for k in varied]):
            return None
        consts = [self.given.consts[k] for k in self.made.inputs[: self.made.num_consts]]
        key = Structure().of(self.made.jaxpr), of_value((self.made.own, consts, varied, places))

        def found() -> SeparableMap | None:
            with jax.ensure_compile_time_eval():
                try:
                    return separable(self.made, consts, varied, places)
                except (TypeError, ValueError, NotImplementedError):
                    return None  # no derivative: whoever differentiates the model will be told

        same = _FOUND.get(key, found)
        return same and replace(same, made=self.made)

    def ids_at(self, found: SeparableMap) -> Int[np.ndarray, "rows columns"]:
        """The parameters of a map."""
        touched = [self.leaves[k - self.made.num_consts] for k in found.varied]
        return self._ids_of(touched)[found.places]

    def _ids_of(self, leaves: list[int]) -> Int[np.ndarray, " ids"]:
        """All parameters in some leaves, in order."""
        return np.concatenate([self.given.space.leaf_ids(leaf).ravel() for leaf in leaves])
