"""The factor accumulator: from what layers saw to sums over batches.

In go the inputs and cotangents of layers; out come sums that may be added over any split of the
data: Kronecker factors, eigenvalue corrections, half steps of the nearest Kronecker product.
"""

from laplax_kfac.factors.layer_sums import (
    KFAC_APPROXIMATIONS,
    KfacApprox,
    batch_sums,
    needs_inputs,
    without_cotangents,
)
from laplax_kfac.factors.sums import (
    KroneckerSums,
    ParameterSums,
    Statistics,
    edge,
    empty_statistics,
    merge,
    mirrored,
    nonfinite_layers,
    require_same_blocks,
)
from laplax_kfac.factors.to_blocks import (
    finalize,
    kronecker_factors,
    require_data,
    with_kronecker_factors,
)

__all__ = [
    "KFAC_APPROXIMATIONS", "KfacApprox", "KroneckerSums", "ParameterSums", "Statistics",
    "batch_sums", "edge", "empty_statistics", "finalize", "kronecker_factors", "merge", "mirrored",
    "needs_inputs", "nonfinite_layers", "require_data", "require_same_blocks",
    "with_kronecker_factors", "without_cotangents",
]  # fmt: skip
