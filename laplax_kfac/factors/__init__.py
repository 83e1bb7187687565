"""The factor accumulator: from what layers saw to sums over batches.

In go the inputs and cotangents of layers; out come sums that may be added over any split of the
data: Kronecker factors, eigenvalue corrections, half steps of the nearest Kronecker product.
"""
