"""The contract of a pattern, its registry, and `check`; see the package for what it says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Int, Shaped

from laplax_kfac.arguments import no_type_check
from laplax_kfac.gram import Symmetric
from laplax_kfac.summaries import summarised

Operands = tuple[Any, ...]
"""The operands of an equation beside the weight: arrays, and scalars that a jaxpr holds itself."""

Entries = Shaped[Array | np.ndarray, "..."]
"""A weight or an output, whose entries are rearranged: its values, or symbolic indices of them."""

Inputs = Shaped[Array | np.ndarray, "positions stack in"]
"""Layer inputs, or row numbers with one entry in the place of a one-hot row."""

Moments = Callable[[Operands, Float[Array, " N"]], tuple[Symmetric, Array]]
"""(Other operands with examples in front, their weights) -> see `Pattern.moments`."""


@summarised
@dataclass(frozen=True)
class Pattern:
    """How one primitive uses a weight; see the package's docstring for the contract.

    Attributes:
        name: What a report calls layers of this pattern, e.g. ``"dense"``.
        operands: Equation -> positions of the operands that may be the weight; empty when the
            equation is not of this pattern.
        weight: (equation, operand, w) -> w as ``(stack, in, out)``; rearranges entries only.
        inputs: (equation, operand, other operands) -> layer inputs ``(positions, stack, in)``.
        outputs: (equation, operand, y) -> y as ``(positions, stack, out)``; rearranges only.
        active: (equation, operand, other operands) -> which outputs use which matrix of the stack,
            1 or 0 of shape ``(positions, stack)``; only where not all do. The identity then holds
            for those, and inputs of the others are zero.
        indexed: Whether an input picks one row of the weight. ``inputs`` then returns row numbers
            ``(positions, stack, 1)``, -1 for none; they stand for one-hot rows.
        moments: (equation, operand) -> a function of the other operands of several examples,
            stacked in front, and of the examples' weights. It gives the weighted sums of
            ``a a^T``, ``(stack, in, in)``, and of ``a``, ``(stack, in)``, over all examples and
            positions, in less time than it takes from ``inputs``. None where there is no such way.
    """

    name: str
    operands: Callable[[JaxprEqn], tuple[int, ...]]
    weight: Callable[[JaxprEqn, int, Entries], Entries]
    inputs: Callable[[JaxprEqn, int, Operands], Inputs]
    outputs: Callable[[JaxprEqn, int, Entries], Entries]
    active: Callable[[JaxprEqn, int, Operands], Shaped[Array, "positions stack"]] | None = None
    indexed: bool = False
    moments: Callable[[JaxprEqn, int], Moments | None] | None = None


_REGISTRY: dict[str, Pattern] = {}


@no_type_check
def register(primitive: str, pattern: Pattern) -> None:
    """Register the pattern for equations of a primitive; a later registration wins.

    Args:
        primitive: The primitive's name as printed in jaxprs, e.g. ``"dot_general"``.
        pattern: How that primitive uses its weight.

    Raises:
        TypeError: If ``primitive`` is not a string or ``pattern`` not a `Pattern`.
    """
    if not isinstance(primitive, str):
        msg = (
            f"`primitive` must be the primitive's name as a string, "
            f"got {type(primitive).__name__}; pass `primitive.name`."
        )
        raise TypeError(msg)
    if not isinstance(pattern, Pattern):
        msg = f"`pattern` must be a laplax_kfac.patterns.Pattern, got {type(pattern).__name__}."
        raise TypeError(msg)
    _REGISTRY[primitive] = pattern


def find(eqn: JaxprEqn) -> Pattern | None:
    """The pattern registered for an equation's primitive, if there is one."""
    return _REGISTRY.get(eqn.primitive.name)


def check(function: Callable[..., Array], operand: int, *operands: Array) -> float:
    """Largest violation of the contract on an example, to test a newly registered pattern.

    Args:
        function: A function whose jaxpr is one equation of the pattern's primitive.
        operand: Which of ``operands`` is the weight.
        *operands: Example values of the operands.

    Returns:
        ``max |outputs - inputs @ weight|``, which is zero up to rounding.

    Raises:
        ValueError: If the function is not one equation of a registered primitive.
    """
    eqns = jax.make_jaxpr(function)(*operands).eqns
    pattern = find(eqns[0]) if len(eqns) == 1 else None
    if pattern is None or operand not in pattern.operands(eqns[0]):
        names = [e.primitive.name for e in eqns]
        msg = (
            f"`function` must be one equation of a registered primitive with operand {operand} as "
            f"its weight, found the equations {names}; registered are {sorted(_REGISTRY)}."
        )
        raise ValueError(msg)
    others = tuple(o for i, o in enumerate(operands) if i != operand)
    inputs = pattern.inputs(eqns[0], operand, others)
    weight = pattern.weight(eqns[0], operand, operands[operand])
    if pattern.indexed:
        inputs = one_hot(inputs, weight.shape[1])
    outputs = pattern.outputs(eqns[0], operand, function(*operands))
    if pattern.active is not None:
        outputs = outputs * pattern.active(eqns[0], operand, others)[..., None]
    return float(jnp.max(jnp.abs(outputs - jnp.einsum("tki,kio->tko", inputs, weight))))


def one_hot(
    rows: Int[Array | np.ndarray, "*n 1"], size: int, dtype: Any = None
) -> Shaped[Array, "*n rows"]:
    """The inputs that row numbers of an indexed pattern stand for; -1 gives zeros."""
    return jax.nn.one_hot(rows[..., 0], size, dtype=dtype or jnp.result_type(float))


def merged(array: Entries, *groups: tuple[int, ...]) -> Entries:
    """Transpose an array so that every group of axes is one axis, in the order of the groups."""
    shape = [math.prod(array.shape[a] for a in axes) for axes in groups]
    return array.transpose([a for axes in groups for a in axes]).reshape(shape)
