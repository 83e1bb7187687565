"""Dense layers: ``dot_general`` with any dimension numbers, the weight on either side.

A sparse array times a weight (``bcoo_dot_general``) is one, whose inputs are the array's entries.
"""

from dataclasses import dataclass

from jax.extend.core import JaxprEqn

from laplax_kfac import jaxprs
from laplax_kfac.patterns.contract import Entries, Inputs, Operands, Pattern, merged, register


@dataclass(frozen=True)
class _DotAxes:
    """Axes of a dot_general's weight ``w`` and other operand ``x``."""

    w_batch: tuple[int, ...]
    w_in: tuple[int, ...]
    w_out: tuple[int, ...]
    x_batch: tuple[int, ...]
    x_in: tuple[int, ...]
    x_positions: tuple[int, ...]

    @classmethod
    def of(cls, eqn: JaxprEqn, operand: int) -> "_DotAxes":
        """Contracted axes are ``in``, batch axes ``stack``; free ones ``out`` and ``positions``."""
        contract, batch = eqn.params["dimension_numbers"]
        # A sparse array is two operands, its entries and their places.
        sparse = eqn.params.get("lhs_spinfo")
        first = jaxprs.ndim(eqn.invars[0]) if sparse is None else len(sparse.shape)
        ndims = (first, jaxprs.ndim(eqn.invars[-1]))
        mine = min(operand, 1)
        other = 1 - mine

        def free(side: int) -> tuple[int, ...]:
            taken = (*contract[side], *batch[side])
            return tuple(d for d in range(ndims[side]) if d not in taken)

        return cls(
            tuple(batch[mine]), tuple(contract[mine]), free(mine),
            tuple(batch[other]), tuple(contract[other]), free(other),
        )  # fmt: skip


def weight(eqn: JaxprEqn, operand: int, w: Entries) -> Entries:
    """The weight as ``(stack, in, out)``."""
    axes = _DotAxes.of(eqn, operand)
    return merged(w, axes.w_batch, axes.w_in, axes.w_out)


def inputs(eqn: JaxprEqn, operand: int, others: Operands) -> Inputs:
    """Layer inputs ``(positions, stack, in)``."""
    axes, (x,) = _DotAxes.of(eqn, operand), others
    return merged(x, axes.x_positions, axes.x_batch, axes.x_in)


def sparse_inputs(eqn: JaxprEqn, operand: int, others: Operands) -> Inputs:
    """Layer inputs ``(positions, stack, in)`` of a sparse array, with its zeros."""
    from jax.experimental.sparse import BCOO  # a large module, of use to few models

    dense = BCOO(others, shape=eqn.params["lhs_spinfo"].shape).todense()
    return inputs(eqn, operand, (dense,))


def outputs(eqn: JaxprEqn, operand: int, y: Entries) -> Entries:
    """The output as ``(positions, stack, out)``."""
    # dot_general lays its output out as (batch, free axes of lhs, free axes of rhs).
    axes = _DotAxes.of(eqn, operand)
    n_batch, n_pos, n_out = len(axes.w_batch), len(axes.x_positions), len(axes.w_out)
    batch = tuple(range(n_batch))
    first = tuple(range(n_batch, n_batch + (n_out if operand == 0 else n_pos)))
    last = tuple(range(n_batch + len(first), y.ndim))
    positions, out = (last, first) if operand == 0 else (first, last)
    return merged(y, positions, batch, out)


DENSE = Pattern("dense", lambda _: (0, 1), weight, inputs, outputs)

SPARSE = Pattern("dense", lambda _: (2,), weight, sparse_inputs, outputs)

register("dot_general", DENSE)
register("bcoo_dot_general", SPARSE)
