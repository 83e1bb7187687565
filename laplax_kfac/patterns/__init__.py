"""The registry of patterns: how a primitive uses a parameter as the weight of a layer.

A pattern says, for one equation ``y = primitive(..., w, ..., x, ...)`` that is linear in ``w``,
how to view the weight as ``(stack, in, out)`` matrices, the other operands as layer inputs
``(positions, stack, in)`` and the output as layer outputs ``(positions, stack, out)``, so that

    outputs[t, k] = inputs[t, k] @ weight[k]        for every position t and stack index k.

That identity is the whole contract: `check` tests it for any equation. ``positions`` are the
places one weight is shared over (tokens, pixels); ``stack`` counts independent matrices (groups,
heads, experts). ``weight`` and ``outputs`` may only rearrange entries (``reshape``,
``transpose``), for the parser also applies them to arrays of indices.

Example: a primitive ``scaled_matmul`` whose operands are the input and the weight.

    register("scaled_matmul", Pattern(
        name="scaled_matmul",
        operands=lambda eqn: (1,),
        weight=lambda eqn, operand, w: w[None],
        inputs=lambda eqn, operand, others: eqn.params["scale"] * others[0][:, None],
        outputs=lambda eqn, operand, y: y[:, None],
    ))
"""

from laplax_kfac.patterns.contract import Moments, Pattern, check, find, one_hot, register
from laplax_kfac.patterns.convolution import CONV
from laplax_kfac.patterns.dense import DENSE, SPARSE
from laplax_kfac.patterns.embedding import DYNAMIC_SLICE, GATHER
from laplax_kfac.patterns.experts import RAGGED

__all__ = [
    "CONV", "DENSE", "DYNAMIC_SLICE", "GATHER", "RAGGED", "SPARSE", "Moments", "Pattern", "check",
    "find", "one_hot", "register",
]  # fmt: skip
