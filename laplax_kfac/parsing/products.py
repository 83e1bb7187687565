"""Parameters that multiply data entry by entry, and sums of such products over taps of a kernel.

A product ``z = w * x`` has in every entry of z one entry of w. Alone it has no Kronecker form: its
gradient is elementwise, and the exact diagonal (or dense block) of a fallback parameter is all that
there is to have. But in a sum of products

    y = w_1 * x_1 + ... + w_J * x_J,        all w_j of one leaf and of one layout,

all products have the cotangent g of y, if nothing else reads them. Feature k of y then is a dense
layer of J inputs and one output, and the sum a stack of these over the features: a depthwise
convolution that is written tap by tap. A bias joins it as it does other layers, for the output of
the first product stands for the sum (see `biases`).

The walk notes every product as a use (`note`), with what it is as long as it is in no sum, and
which products sums add up (`summed`). What comes of them is decided when all is known (`claims`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from laplax_kfac import jaxprs
from laplax_kfac.parsing.claims import Claim, constant_along
from laplax_kfac.parsing.index_rules import INDEX_RULES, moved
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.steps import Step
from laplax_kfac.parsing.uses import Fallback, Findings, Role
from laplax_kfac.parsing.values import FOREIGN, PARAMETERS, Numbers, Scaled, Symbolic, Value
from laplax_kfac.patterns import Pattern
from laplax_kfac.patterns.contract import Entries, Inputs, Operands, merged

REASON = "multiplies other values elementwise, which has no Kronecker form"


@dataclass(frozen=True)
class Layout:
    """Axes of a product along which its parameter is the same, and those along which it is not."""

    shape: tuple[int, ...]
    positions: tuple[int, ...]
    features: tuple[int, ...]

    def inputs(self, _: JaxprEqn, __: int, others: Operands) -> Inputs:
        """The data that the parameter multiplies."""
        return self.outputs(_, __, jnp.broadcast_to(others[0], self.shape))

    def outputs(self, _: JaxprEqn, __: int, y: Entries) -> Entries:
        """Entries of the product as (positions, stack, 1)."""
        return merged(y, self.positions, self.features)[..., None]

    def weight(self, _: JaxprEqn, __: int, w: Entries) -> Entries:
        """The parameter, broadcast to the product, as (stack, 1, 1)."""
        return self.outputs(_, __, w)[0][:, None]


@dataclass(frozen=True, eq=False)
class Product(Role):
    """A parameter that multiplies data entry by entry; read as matrices when it is asked for.

    Attributes:
        weight: The parameter, broadcast to the product.
        shape: Shape of the product.
    """

    weight: Symbolic
    shape: tuple[int, ...]
    operand: int
    reason: str = "taps of a kernel: a sum of elementwise products"

    @functools.cached_property
    def layout(self) -> Layout:
        """Where the parameter varies."""
        index, axes = self.weight.index, range(len(self.shape))
        same = [constant_along(index, axis) for axis in axes]
        return Layout(
            self.shape,
            tuple(axis for axis in axes if same[axis]),
            tuple(axis for axis in axes if not same[axis]),
        )

    @functools.cached_property
    def pattern(self) -> Pattern:  # type: ignore[override]
        """One input and one output for every feature."""
        at = self.layout
        return Pattern("taps", lambda _: (), at.weight, at.inputs, at.outputs)

    @functools.cached_property
    def view(self) -> Symbolic:  # type: ignore[override]
        """The parameter as (*scans, stack, 1, 1)."""

        def taken(x: Numbers) -> Numbers:
            first = tuple(0 if k in self.layout.positions else slice(None) for k in range(x.ndim))
            x = x[first]
            features = len(self.layout.features)
            scans = x.shape[features:]
            return np.moveaxis(x.reshape(-1, *scans), 0, -1)[..., None, None]

        return self.weight.map(taken)

    @property
    def refusal(self) -> str:  # type: ignore[override]
        """Why it is no row of matrices."""
        scale = self.weight.scale
        if scale is not None and not all(constant_along(scale, a) for a in self.layout.positions):
            return REASON
        return ""


# -- on the walk -------------------------------------------------------------------------------


def note(step: Step, operand: int, weight: Symbolic) -> Symbolic:
    """A product of a parameter and data: a use, which a sum may yet become a part of."""
    out = step.eqn.outvars[0]
    use = step.add_use(Product(weight, jaxprs.shape(out), operand))
    step.findings.fallbacks.append(Fallback.of(weight.index, "scale", REASON, use))
    index = jaxprs.numbered(out)
    return Symbolic(use, index[(..., *[None] * len(step.scope.scans))])


def is_product(value: Value, findings: Findings) -> TypeGuard[Symbolic]:
    """Whether a value is the output of a product, or a sum of several."""
    if not isinstance(value, Symbolic) or value.source < 0:
        return False
    return isinstance(findings.uses[value.source].role, Product)


def summed(findings: Findings, terms: Sequence[Value], outputs: list[Symbolic]) -> list[Symbolic]:
    """Of the outputs of uses among the terms of a sum, the one that is followed from here on.

    That of a layer, for its bias may come yet. A product is followed as long as nothing but
    products, parameters and constants is added. The first of two products stands for both if all
    entries of either are there, in one layout, each times one number.
    """
    of_layers = [out for out in outputs if not is_product(out, findings)]
    if of_layers or not outputs:
        return of_layers
    if not all(is_product(t, findings) or findings.is_fixed(t) for t in terms):
        return []
    if len(outputs) == 1:
        return outputs
    first, second = outputs
    ratio = np.divide(second.factors.flat[0], first.factors.flat[0])
    alike = np.array_equal(first.index, second.index) and first.source != second.source
    if not alike or not np.allclose(second.factors, ratio * first.factors.flat[0], rtol=1e-6):
        return []
    if not np.isfinite(ratio) or not np.allclose(first.factors, first.factors.flat[0], rtol=1e-6):
        return []
    # The cotangent of the second is its factor over the first one's times that of the first.
    findings.sums[second.source] = first.source, float(ratio)
    return [first]


def scaled(value: Symbolic, findings: Findings) -> Scaled:
    """What is left of a product where it is no term of a sum: which parameter is in which entry."""
    role = findings.uses[value.source].role
    assert isinstance(role, Product)
    if (value.index == FOREIGN).any():
        return Scaled()
    index = role.weight.index
    flat = index.reshape(-1, *index.shape[len(role.shape) :])
    scans = index.ndim - len(role.shape)  # places are the same in all iterations
    places = value.index.reshape(*value.index.shape[: value.index.ndim - scans], -1)[..., 0]
    return Scaled(Symbolic(PARAMETERS, flat[places]))


def carried(step: Step) -> list[Value]:
    """What stays of data that parameters have scaled: they are moved, or scaled by other data."""
    eqn, name = step.eqn, step.eqn.primitive.name
    found = [k for k, v in enumerate(step.values) if isinstance(v, Scaled)]
    if not found or len(eqn.outvars) != 1 or (name != "mul" and name not in INDEX_RULES):
        return step.nothing
    by = [v.by if isinstance(v, Scaled) else v for v in step.values]
    if len(found) > 1 or by[found[0]] is None:
        return [Scaled()]
    if name == "mul":
        same = jaxprs.shape(eqn.invars[found[0]]) == jaxprs.shape(eqn.outvars[0])
        return [step.values[found[0]] if same else Scaled()]
    (moved_by,) = moved(eqn, by)
    return [Scaled(moved_by if isinstance(moved_by, Symbolic) else None)]


# -- as claims ---------------------------------------------------------------------------------


def sums_of(findings: Findings) -> dict[int, dict[int, float]]:
    """The product that stands for a sum -> all products in it, and their factors in it."""
    found: dict[int, dict[int, float]] = {}
    for number, use in enumerate(findings.uses):
        if isinstance(use.role, Product):
            root, factor = number, 1.0
            while root in findings.sums:
                root, ratio = findings.sums[root]
                factor *= ratio
            found.setdefault(root, {})[number] = factor
    return found


def claims(findings: Findings, space: ParameterSpace) -> list[Claim]:
    """A claim for every sum of products that has a Kronecker form; the others stay fallbacks."""
    found = (_claim(findings, space, root, terms) for root, terms in sums_of(findings).items())
    return [claim for claim in found if claim is not None]


def _claim(
    findings: Findings, space: ParameterSpace, root: int, terms: dict[int, float]
) -> Claim | None:
    """The claim of a sum: its products as the rows of one weight, if they are of one kernel."""
    uses = [findings.uses[number] for number in terms]
    roles = [use.role for use in uses if isinstance(use.role, Product)]
    if len(roles) < 2 or len({role.layout for role in roles}) > 1 or any(r.refusal for r in roles):
        return None
    # Gains of several branches are leaves of their own, and each has its exact diagonal.
    if len({leaf for use in uses for leaf in space.leaves_of(use.ids)}) > 1:
        return None
    parts = np.broadcast_arrays(*(use.ids for use in uses))
    claim = Claim.of(root, findings.uses[root], np.concatenate(parts, axis=-2))
    if claim.problem or claim.ids.shape[0] == 1:
        return None  # one output for all: the taps have an exact dense block
    claim = replace(claim, terms=tuple(terms))
    factors = terms.values()
    if all(use.scale is None and f == 1.0 for use, f in zip(uses, factors, strict=True)):
        return claim
    scales = [
        np.broadcast_to(f * (1.0 if use.scale is None else use.scale), part.shape)
        for use, f, part in zip(uses, factors, parts, strict=True)
    ]
    scaled = claim.scaled(np.concatenate(scales, axis=-2))
    return scaled if isinstance(scaled, Claim) else None
