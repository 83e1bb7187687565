"""Patterns of equations, and both sides of the contract that they keep."""

import jax
import jax.numpy as jnp

from laplax_kfac import patterns
from support.tolerances import tolerance

ATOL = tolerance(jnp.float64)["atol"]


def pattern_of(eqn):
    """The pattern of an equation that has one."""
    pattern = patterns.find(eqn)
    assert pattern is not None
    return pattern


def both_sides(function, operand, *values):
    """outputs and inputs @ weight of a function of one equation, compiled once."""
    (eqn,) = jax.make_jaxpr(function)(*values).eqns
    pattern = pattern_of(eqn)
    others = tuple(v for k, v in enumerate(values) if k != operand)

    @jax.jit
    def sides(values, others):
        weight = pattern.weight(eqn, operand, values[operand])
        inputs = pattern.inputs(eqn, operand, others)
        if pattern.indexed:
            inputs = patterns.one_hot(inputs, weight.shape[1])
        outputs = pattern.outputs(eqn, operand, function(*values))
        return outputs, jnp.einsum("tki,kio->tko", inputs, weight)

    return sides(values, others)
