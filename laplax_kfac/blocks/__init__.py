"""Blocks: symmetric matrices on the parameters, as eigenbases and eigenvalues in them.

In go factors; out come `blocks.BlockDiagonal` matrices, which know products, determinants and sums.
"""
