"""Everything that is known of biases.

A bias is a use whose input is the constant 1: ``outputs[t] = 1 @ b`` is added to something, so that
the gradient in b is the sum over positions t of the cotangents of the sum. It is found where the
walk meets a sum of a parameter and anything else that depends on data (`add`). Then

* it *joins a weight* if the sum has the cotangent of a use's output: it is added to the whole of
  that output, which nothing else reads, through any relayout and uniform factor, and is the same at
  all positions. To that use the bias is one more input, d(output) / d(bias). Both are one layer if
  every use of the one is a use of the other (`join`).
* it *stands alone* otherwise, with the sum itself as its equation: a layer with one input whose
  positions are the places where every entry is added, equally often.
* it is a *fallback parameter* if it is the shift of a norm layer, or is added irregularly.

A parameter plus what no data enter is no bias: an affine function of it is a view of it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from laplax_kfac import jaxprs
from laplax_kfac.parsing.bias_pattern import bias_pattern
from laplax_kfac.parsing.claims import Claim, Group, constant_along
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.norms import pair
from laplax_kfac.parsing.products import Product, is_product, scaled, summed
from laplax_kfac.parsing.selection import DENSE_LIMIT
from laplax_kfac.parsing.steps import Step
from laplax_kfac.parsing.uses import Fallback, Findings, Role, Use
from laplax_kfac.parsing.values import (
    FOREIGN,
    PARAMETERS,
    Numbers,
    Scaled,
    Symbolic,
    Value,
    of_parameters,
)
from laplax_kfac.patterns import Pattern

SHIFT = "the shift of a scaled normalisation"

# -- the role ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bias(Role):
    """A parameter that is added. What takes a pass over the sum is found when it is asked for.

    Most biases join a weight, and are asked for nothing.

    Attributes:
        weight: The parameter, broadcast to the sum.
        ndim: Number of axes of the sum.
        output: The output of a use that it is added to, in the layout of the sum; None if it is
            added to anything else, or in part.
    """

    weight: Symbolic
    ndim: int
    output: Symbolic | None
    operand: int = -1
    reason: str = "added to data"
    added = True

    @functools.cached_property
    def _places(self) -> Int[np.ndarray, "positions features"]:
        """Where every entry is added, in the raveled sum; no positions if unequally often.

        The same parameter added in several places is shared over them: the n-th place of every
        parameter is position n.
        """
        first = self.weight.in_first_iteration(self.ndim)
        mine = np.flatnonzero(self.weight.present(self.ndim).any(axis=1))
        order = mine[np.argsort(first[mine], kind="stable")]
        distinct, counts = np.unique(first[mine], return_counts=True)
        if not counts.size or counts.min() != counts.max():
            return np.zeros((0, distinct.size), int)
        places = order.reshape(distinct.size, -1).T
        # These are the places in the first iteration; the others must repeat their ids alike.
        at_places = self._at(places, self.weight.index)
        alike = bool((at_places == at_places[..., :1, :]).all())
        return places if alike else places[:0]

    def _at(self, places: Int[np.ndarray, "..."], x: Numbers) -> Numbers:
        """(axes, scan axes) -> (scan axes, positions, features)."""
        return np.moveaxis(x.reshape(-1, *x.shape[self.ndim :])[places], (0, 1), (-2, -1))

    @functools.cached_property
    def view(self) -> Symbolic:  # type: ignore[override]
        """The parameter as one row; all its ids in a row if it is added unequally often."""
        if not len(self._places):
            return Symbolic(PARAMETERS, self.weight.ids[None, None])
        found = self.weight.map(functools.partial(self._at, self._places))
        return found.map(lambda x: x[..., None, :1, :])

    @functools.cached_property
    def pattern(self) -> Pattern:  # type: ignore[override]
        """One input; ``"shift"`` if the parameter varies along several axes of the sum."""
        index = self.weight.index
        axes = sum(bool((index != index.take([0], a)).any()) for a in range(self.ndim))
        return bias_pattern(self._places, axes)

    @property
    def refusal(self) -> str:  # type: ignore[override]
        """Why it is no row of distinct parameters."""
        scale = self.weight.scale
        if scale is not None and len(self._places):
            at_places = self._at(self._places, scale)
            uneven = bool((at_places != at_places[..., :1, :]).any())
        else:
            uneven = not len(self._places)
        if uneven:
            return "added to different places unequally often"
        if self.pattern.name == "shift" and self.view.index.shape[-1] > DENSE_LIMIT:
            return "added to data, differently at every position"
        one = self.view.ids.size == 1 and bool((self.view.index != FOREIGN).all())
        return "one number, added in several places" if one and self._places.size > 1 else ""

    @property
    def scans(self) -> tuple[int, ...]:
        """Lengths of its scan axes."""
        return self.weight.index.shape[self.ndim :]

    # -- where it is added to the output of a use ----------------------------------------------

    @functools.cached_property
    def _added(self) -> Bool[np.ndarray, "entries iterations"]:
        return self.weight.present(self.ndim)

    @property
    def meets_output(self) -> bool:
        """Whether it is added to entries of the output alone, the same in all iterations."""
        if self.output is None:
            return False
        first = self._added[:, 0]
        same = self._added.shape[1] == 1 or bool((self._added == first[:, None]).all())
        foreign = self.output.in_first_iteration(self.ndim) == FOREIGN
        return same and not (first & foreign).any()

    def _where_added(self, x: Int[np.ndarray, "entries *scans"]) -> Int[np.ndarray, "_ *scans"]:
        """Rows for entries that it is added to: nearly always all, without a copy."""
        first = self._added[:, 0]
        return x if first.all() else x[first]

    @property
    def entries(self) -> Int[np.ndarray, " added"]:
        """Places in the raveled output of the use that it is added to."""
        assert self.output is not None
        return self._where_added(self.output.in_first_iteration(self.ndim))

    @property
    def ids_at_entries(self) -> Int[np.ndarray, "added *scans"]:
        """Its ids at these places."""
        return self._where_added(self.weight.index.reshape(-1, *self.scans))

    @property
    def factor(self) -> float | None:
        """d(use's output) / d(parameter); None where it is not the same for all entries.

        The ratio of two scales, for what is added to ``s z`` adds its s-th part to z.
        """
        assert self.output is not None
        (low, high), (least, most) = (
            (1.0, 1.0) if s is None else (float(s.min()), float(s.max()))
            for s in (self.weight.scale, self.output.scale)
        )
        same = high - low <= 1e-6 * abs(high) and most - least <= 1e-6 * abs(most)
        return high / most if same and high and most else None


# -- on the walk -------------------------------------------------------------------------------


def add(step: Step, terms: list[Value]) -> list[Value]:
    """A sum of terms of one shape: a bias if a parameter meets the output of a use, or data."""
    eqn, findings = step.eqn, step.findings
    weights = [t for t in terms if of_parameters(t)]
    # An output that is broadcast by the sum has another cotangent than the sum.
    outputs = [
        t for t, a in zip(terms, eqn.invars, strict=False)
        if isinstance(t, Symbolic) and t.source >= 0
        and jaxprs.shape(a) == jaxprs.shape(eqn.outvars[0])
    ]  # fmt: skip
    if len(weights) == 2:
        for term in weights:
            entry = Fallback.of(term.index, "other", "added to another parameter before its use")
            with_data = any(t.mixed for t in weights)  # a class token beside the others
            findings.fallbacks.append(replace(entry, added=with_data))
        return step.nothing
    # The output of a use plus anything has the same cotangent: one bias serves two products. But
    # what is added may be data, and then data are in the sum.
    mixed = not all(map(findings.is_fixed, terms))
    outputs = summed(findings, [t for t in terms if not of_parameters(t)], outputs)
    output = replace(outputs[0], mixed=outputs[0].mixed or mixed) if outputs else None
    if not weights:
        return [output]
    (weight,) = weights
    norms = [t for t in terms if isinstance(t, Scaled)]
    if norms:
        pair(norms[0].by, weight, findings)
        return step.mark("shift", SHIFT)
    # A parameter in a part of an array is a view of it, whatever is in the other parts.
    affine = all(t is weight or findings.is_fixed(t) for t in terms)
    if affine and not (outputs and _is_broadcast(findings, weight, outputs[0])):
        return [weight]  # an affine function of the parameter has the same gradient
    bias = Bias(weight, jaxprs.ndim(eqn.outvars[0]), outputs[0] if outputs else None)
    meets = bias.meets_output
    if outputs and is_product(outputs[0], findings):
        before = [use.role for use in findings.uses if isinstance(use.role, Bias)]
        again = [b for b in before if b.output and b.output.source == outputs[0].source]
        if not meets or not any(np.isin(bias.entries, b.entries).any() for b in again):
            product = outputs[0].source if meets else -1
            entry = Fallback.of(weight.index, "shift", SHIFT, product)
            findings.fallbacks.append(entry)
            pair(scaled(outputs[0], findings).by, weight, findings)
            if not meets:
                return step.nothing
        else:
            meets = False
    step.add_use(bias if meets else replace(bias, output=None))
    return [output if meets else None]


def _is_broadcast(findings: Findings, weight: Symbolic, output: Symbolic) -> bool:
    """Whether a parameter is added to a use's output as a bias is: the same at all positions."""
    return (
        findings.uses[output.source].positions == 1
        or np.unique(weight.index).size < weight.index.size
    )


# -- as claims ---------------------------------------------------------------------------------


def on_outputs(findings: Findings, root_of: Mapping[int, tuple[int, float]]) -> list[Claim | int]:
    """Biases of whole layers, as claims of the use that they are added to; numbers of the others.

    A split output takes its bias in pieces, which are one bias together. What is added to a term
    of a sum of products is added to the sum.

    Args:
        findings: All uses.
        root_of: Product in a sum that is a layer -> the product that stands for the sum, and the
            factor of the latter's cotangent that is the former's.
    """
    biases_of: dict[int, dict[int, Bias]] = {}
    alone: list[int] = []
    for number, use in enumerate(findings.uses):
        if isinstance(use.role, Bias) and use.role.output is not None:
            met = use.role.output.source
            if not isinstance(findings.uses[met].role, Product):
                biases_of.setdefault(met, {})[number] = use.role
            elif met in root_of:
                root, factor = root_of[met]
                output = use.role.output.scaled(1.0 / factor)
                biases_of.setdefault(root, {})[number] = replace(use.role, output=output)
            else:
                alone.append(number)
        elif isinstance(use.role, Bias):
            alone.append(number)
    found: list[Claim | int] = []
    for met, pieces_of in biases_of.items():
        for pieces in _disjoint(pieces_of):
            claim = _claim(met, findings.uses[met], list(pieces.values()))
            found += list(pieces) if claim is None else [claim]
    return found + alone


def _disjoint(biases: dict[int, Bias]) -> list[dict[int, Bias]]:
    """Biases of one output, by number: those together that are added to disjoint parts of it."""
    if len(biases) == 1:
        return [biases]
    together: list[dict[int, Bias]] = []
    for number, bias in biases.items():
        for others in together:
            entries = np.concatenate([b.entries for b in others.values()])
            alike = all(b.scans == bias.scans for b in others.values())
            if alike and not np.isin(bias.entries, entries).any():
                others[number] = bias
                break
        else:
            together.append({number: bias})
    return together


def _claim(number: int, use: Use, biases: list[Bias]) -> Claim | None:
    """View biases that are added to one output as (scan axes, positions, stack, out).

    None if they differ between positions, or are added to a part or to copies of the output.
    """
    numbered = jaxprs.numbered(use.eqn.outvars[0])
    entries, ids = biases[0].entries, biases[0].ids_at_entries
    if len(biases) > 1:
        entries = np.concatenate([b.entries for b in biases])
        ids = np.concatenate([b.ids_at_entries for b in biases])
    factors = {b.factor for b in biases}
    met = np.zeros(numbered.size, bool)
    met[entries] = True
    if entries.size != numbered.size or not met.all() or len(factors) != 1 or None in factors:
        return None
    ids_of_output = np.empty((numbered.size, *ids.shape[1:]), ids.dtype)
    ids_of_output[entries] = ids
    place = use.pattern.outputs(use.eqn, use.operand, numbered)
    ids = np.moveaxis(ids_of_output[place], range(3), range(-3, 0))  # (scan axes, T, K, out)
    positions = ids.ndim - 3
    if (ids == FOREIGN).any() or not constant_along(ids, positions):
        return None
    claim = Claim.of(number, use, ids.take(0, axis=positions)[..., None, :])
    claim = replace(claim, bias=factors.pop())
    return None if claim.problem else claim


# -- among the groups --------------------------------------------------------------------------


def without_partial_sums(
    groups: list[Group], fallbacks: list[Fallback], findings: Findings, space: ParameterSpace
) -> list[Group]:
    """Make a leaf a fallback parameter as a whole if a part of it is added to data, the rest idle.

    Its gradient is exact, and the leaf one layer instead of two.
    """
    used = np.zeros(space.size, bool)
    for entries in [g[0].entries for g in groups] + [entry.ids for entry in fallbacks]:
        used[entries] = True
    kept = []
    for group in groups:
        if not isinstance(findings.uses[group[0].use].role, Bias):
            kept.append(group)
            continue
        leaves = space.leaves_of(group[0].ids)
        if all(used[space.offsets[k] : space.offsets[k + 1]].all() for k in leaves):
            kept.append(group)
            continue
        whole = np.concatenate([space.leaf_ids(k).ravel() for k in leaves])
        fallbacks.append(Fallback(whole, "shift", "added to data in part", added=True))
    return kept


def join(groups: list[Group]) -> list[tuple[Group, Group]]:
    """Pairs of a weight and the bias that is joint with it, which is empty if there is none."""
    weights = [g for g in groups if g[0].bias is None]
    biases = {g[0].use: g for g in reversed(groups) if g[0].bias is not None}
    bias_of: dict[int, Group] = {}
    joined: set[int] = set()
    for weight in weights:
        bias = biases.get(weight[0].use)
        if bias is not None and id(bias) not in joined and _are_joint(weight, bias):
            bias_of[id(weight)] = bias
            joined.add(id(bias))
    return [(g, bias_of.get(id(g), [])) for g in groups if id(g) not in joined]


def _are_joint(weight: Group, bias: Group) -> bool:
    """Whether every use of the one is a use of the other, with one bias for each of its columns."""
    if weight[0].ids.shape[::2] != bias[0].ids.shape[::2]:
        return False
    biases = {c.use: c for c in bias}
    return (
        len(biases) == len(bias) == len(weight)
        and all(c.use in biases and biases[c.use].shared == c.shared for c in weight)
        and all(c.has_place_for_bias for c in weight)
    )
