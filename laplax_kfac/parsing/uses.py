"""What a walk finds: the uses of parameters, and parameters that only a fallback serves.

A *use* is an equation ``outputs[t, k] = inputs[t, k] @ weight[k]`` of a parameter. Its *role* says
what the parameter is to the equation: its `Weight`, or (`biases.Bias`) what it adds.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Float, Int

from laplax_kfac import jaxprs
from laplax_kfac.parsing.complex_numbers import IMAGINARY
from laplax_kfac.parsing.separable_maps import SeparableMap
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
from laplax_kfac.patterns import Moments, Pattern

Ids = Int[np.ndarray, " n"]
Site = tuple[int, ...]
"""Where an equation sits: equation index, then (sub-jaxpr number, equation index) inward."""


class Role:
    """What a parameter is to an equation that uses it.

    Attributes:
        pattern: How the equation's operands and output are read as a layer's.
        operand: Which operand is the parameter; -1 where it is none of them, but added.
        view: The parameter as matrices, shape (*scan axes, stack, in, out), with scan axes of
            length one where all iterations read the same.
        refusal: Why these cannot be matrices of distinct parameters; empty if that depends on
            their ids alone.
        reason: What a report says of the use.
        map: How gradients in the equation's weight are pulled back to the parameter, where it is
            not the weight itself, but what that is made of.
        added: Whether the parameter is added to something.
    """

    pattern: Pattern
    operand: int
    view: Symbolic
    refusal: str
    reason: str
    map: SeparableMap | None = None
    added: ClassVar[bool] = False


@dataclass(frozen=True, eq=False)
class Weight(Role):
    """The weight of a registered pattern's equation."""

    pattern: Pattern
    operand: int
    view: Symbolic
    reason: str
    refusal: str = ""
    map: SeparableMap | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter by an equation.

    Attributes:
        eqn: The equation.
        site: Where the equation sits.
        scans: Lengths of the scans around it, outermost first.
        role: What the parameter is to it.
    """

    eqn: JaxprEqn
    site: Site
    scans: tuple[int, ...]
    role: Role

    @property
    def pattern(self) -> Pattern:
        """How the equation is read as a layer."""
        return self.role.pattern

    @property
    def operand(self) -> int:
        """Which operand is the parameter; -1 where it is added."""
        return self.role.operand

    @property
    def ids(self) -> Int[np.ndarray, "*scans stack rows out"]:
        """Ids of the parameter as matrices."""
        return self.role.view.index

    @property
    def scale(self) -> Float[np.ndarray, "*scans stack rows out"] | None:
        """Factors of the parameter's entries; None stands for 1."""
        scale = self.role.view.scale
        return None if scale is None else np.broadcast_to(scale, self.ids.shape)

    @property
    def imaginary(self) -> bool:
        """Whether it is at the positions of another use, that of a complex product's other part."""
        return IMAGINARY in str(self.eqn.source_info.name_stack)

    @functools.cached_property
    def positions(self) -> int:
        """Positions in one evaluation of the equation."""
        shape = jaxprs.shape(self.eqn.outvars[0])
        return self.pattern.outputs(self.eqn, self.operand, np.empty(shape, bool)).shape[0]

    @functools.cached_property
    def moments(self) -> Moments | None:
        """How sums over the inputs are formed without them; None in a scan."""
        if self.pattern.moments is None or self.scans:
            return None
        return self.pattern.moments(self.eqn, self.operand)


@dataclass(frozen=True, eq=False)
class Fallback:
    """Parameters used in a way that has no Kronecker form.

    Attributes:
        ids: The parameters.
        pattern: What a report calls their use.
        reason: Why there is no such form.
        product: Number of the use, an elementwise product, that a sum may still give such a form
            (see `products`); -1 if there is none.
        makes_weight: Whether a function of the parameters is a weight.
        added: Whether they are added to data, each at places of its own (see `tables`).
    """

    ids: Int[np.ndarray, " n"]
    pattern: str
    reason: str
    product: int = -1
    makes_weight: bool = False
    added: bool = False

    @classmethod
    def of(
        cls, ids: Int[np.ndarray, "..."], pattern: str, reason: str, product: int = -1
    ) -> "Fallback":
        """Those among some ids, each once."""
        return cls(np.unique(ids[ids != FOREIGN]), pattern, reason, product)


@dataclass
class Findings:
    """Everything the walk found.

    Attributes:
        uses: The uses, in the order of the jaxpr; their place is their number.
        fallbacks: Parameters without a Kronecker form.
        of_parameters: Numbers of the uses whose equations no data enter.
        sums: Number of a product -> that of the product which stands for the sum of both, and the
            factor of the first one's cotangent over the second one's.
        pairs: Ids of scales, and of what is added to the entries that they scale.
        passed_on: Of these, the ones whose parameters are uses of a weight that is made of the
            output.
        ended: Of these, the ones whose output is used in another way, too.
    """

    uses: list[Use] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    of_parameters: set[int] = field(default_factory=set)
    sums: dict[int, tuple[int, float]] = field(default_factory=dict)
    pairs: list[tuple[Ids, Ids]] = field(default_factory=list)
    passed_on: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)

    def is_fixed(self, value: Value) -> bool:
        """Whether a value is the same for all data."""
        if isinstance(value, Symbolic):
            alone = value.source == PARAMETERS or value.source in self.of_parameters
            return alone and not value.mixed
        return isinstance(value, Known | Fixed)

    def end(self, ending: Ending, *, makes_weight: bool = False) -> None:
        """Note that parameters get what the equation that they met allows.

        Args:
            ending: The parameters.
            makes_weight: Whether what is made of them is a weight.
        """
        if ending.use is None:
            found = Fallback.of(ending.view.index, ending.pattern, ending.reason)
            self.fallbacks.append(replace(found, makes_weight=makes_weight))
        else:
            self.ended.add(ending.use)

    def mark(self, value: Value, pattern: str, reason: str) -> None:
        """Note that the parameters in a value have no Kronecker form."""
        if of_parameters(value):
            self.fallbacks.append(Fallback.of(value.index, pattern, reason))
