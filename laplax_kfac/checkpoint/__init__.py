"""Saving curvatures, posteriors and states, and reading them back: records in, a file out.

`records` is the structure in JSON, `contents` the arrays of what is saved, `saving` the two public
functions. Whatever a file says is compared with what else it says, for a file may come from anyone.
"""

from laplax_kfac.checkpoint.saving import load, save

__all__ = ["load", "save"]
