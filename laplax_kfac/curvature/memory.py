"""How many examples and columns are worked on at once: what a pass keeps in memory.

A CPU works on a few examples at once: new pages of memory cost it as much time as what it computes
in them, and a loop over chunks uses the same ones again.
"""

import math

import jax

from laplax_kfac import factors, jaxprs, machine
from laplax_kfac.capture.batches import Batch
from laplax_kfac.capture.capture import record_size
from laplax_kfac.curvature.options import Settings
from laplax_kfac.fisher import Columns, FisherType
from laplax_kfac.parsing.grouping import Member
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.program import Program

DEFAULT_BATCH_SIZE = 256


def num_columns_of(program: Program, columns: Columns, batch: Batch) -> int:
    """How many vectors are pulled back for one example."""
    target = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), batch["target"])
    return columns.number(program.output, target)


def columns_at_once(program: Program, fisher: FisherType, columns: int) -> int:
    """All columns, unless the records of one example take more than `Machine.record_bytes`."""
    if record_bytes(program, columns) <= machine.MACHINE.record_bytes or (
        program.custom_vjp and fisher.is_root  # may pull all unit vectors back
    ):
        return columns
    without = record_bytes(program, 0)
    each = record_bytes(program, 1) - without
    return min(columns, max(1, (machine.MACHINE.record_bytes - without) // max(1, each)))


def record_bytes(program: Program, columns: int) -> int:
    """Memory for the records of one example."""
    return 4 * sum(record_size(layer, columns) for layer in program.layers)


def formed_bytes(program: Program, settings: Settings, columns: int) -> int:
    """Memory for what is formed of the records of one example, if they are summed up to factors."""
    numbers = 0
    for resolved in program.resolved:
        inputs = factors.needs_inputs(resolved, settings.kfac_approx_for(resolved.layer))
        numbers += record_size(resolved.layer, columns, inputs=inputs)
        if not inputs:
            operands = sum(_num_in_operands(program, member) for member in resolved.members)
            numbers += machine.MACHINE.layouts * operands
    return 4 * numbers


def _num_in_operands(program: Program, member: Member) -> int:
    """Numbers of one example that the inputs of a use would be made of."""
    use = program.uses[member.claim.use]
    operands = (x for number, x in enumerate(use.eqn.invars) if number != use.operand)
    return sum(math.prod(jaxprs.shape(x)) for x in operands)


def examples_at_once(program: Program, record_bytes: int) -> int:
    """How many examples are worked on at once: as many as fit; on a CPU fewer.

    New pages of memory cost a CPU as much time as what it computes in them, and a loop over small
    parts uses the same ones again. But the sums are read and written with every part: its records
    should be larger. Powers of two divide most batches, and fill its vectors.

    Args:
        program: The parsed model.
        record_bytes: Memory for the records of one example.
    """
    examples = machine.MACHINE.record_bytes // max(1, record_bytes)
    if jax.default_backend() == "cpu":
        room = max(machine.MACHINE.reused_bytes, 5 * sum(map(sum_bytes, program.layers)) // 2)
        examples = min(examples, room // max(1, record_bytes))
        examples = 1 << max(examples, 1).bit_length() - 1
    return max(examples, 1)


def sum_bytes(layer: Layer) -> int:
    """Memory for the sums of a Kronecker layer, and for its bases."""
    return 4 * layer.factor_elements
