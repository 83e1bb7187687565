"""Experts: ``ragged_dot`` of tokens sorted by expert, each with the matrix of its group.

The experts are the stack. A token is a position of all of them but only one expert is *active*
there: inputs of the others are zero.
"""

import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float

from laplax_kfac import jaxprs
from laplax_kfac.patterns.contract import Entries, Inputs, Operands, Pattern, register


def operands(eqn: JaxprEqn) -> tuple[int, ...]:
    """Which operands may be the weight."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    plain = (
        tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,))
        and not any(numbers.dot_dimension_numbers[1])
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
    return (1,) if plain else ()


def _groups_of_tokens(eqn: JaxprEqn, _: int, others: Operands) -> Float[Array, "positions stack"]:
    ends = jnp.cumsum(others[1])
    token = jnp.arange(jaxprs.shape(eqn.invars[0])[0])[:, None]
    return ((token < ends) & (token >= ends - others[1])).astype(others[0].dtype)


def inputs(eqn: JaxprEqn, operand: int, others: Operands) -> Inputs:
    """Layer inputs ``(positions, stack, in)``."""
    return others[0][:, None, :] * _groups_of_tokens(eqn, operand, others)[..., None]


def outputs(eqn: JaxprEqn, _: int, y: Entries) -> Entries:
    """The output as ``(positions, stack, out)``."""
    return y[:, None, :].repeat(jaxprs.shape(eqn.invars[1])[0], axis=1)


RAGGED = Pattern(
    "dense",
    operands,
    weight=lambda _, __, w: w,
    inputs=inputs,
    outputs=outputs,
    active=_groups_of_tokens,
)

register("ragged_dot_general", RAGGED)
