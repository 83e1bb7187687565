"""What the walk makes of a function of one parameter."""

import numpy as np

from laplax_kfac import jaxprs
from laplax_kfac.parsing.steps import Scope
from laplax_kfac.parsing.uses import Findings
from laplax_kfac.parsing.values import PARAMETERS, Symbolic, constant
from laplax_kfac.parsing.walk import walk


def traced(function, x):
    """Its value, and the findings."""
    jaxpr, consts, _ = jaxprs.trace(function, x)
    parameter = Symbolic(PARAMETERS, np.arange(x.size).reshape(x.shape))
    findings = Findings()
    (found,) = walk(jaxpr, [*map(constant, consts), parameter], Scope(findings))
    return found, findings
