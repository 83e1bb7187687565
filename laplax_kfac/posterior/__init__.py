"""The Gaussian posterior: a block-diagonal curvature and a prior precision.

In go a matrix and a prior; out comes a posterior whose every use is a function of eigenvalues.
"""
