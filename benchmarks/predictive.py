"""The linearised predictive: output covariances for many inputs, after the fit.

The peers take minutes to hours for all inputs, and do the same for every one of them. They predict
a few, the time is scaled up, and the second size shows that this is fair.
"""

import harness

WORKLOADS = ("mlp", "lenet")
EXAMPLES = 256
"""Data of the fit, which is not measured here."""
INPUTS = 512
FEW = {"mlp": (2, 4), "lenet": (16, 64)}
"""Inputs that peers predict."""

if __name__ == "__main__":
    session = harness.Session("predictive")
    for name in session.chosen("workload", WORKLOADS):
        workload = {"examples": EXAMPLES} | session.description(name)
        for few in FEW[name]:
            ours = [harness.OURS] if few == FEW[name][0] else []
            contenders = [*ours, harness.LAPLAX, harness.LAPLACE_TORCH[0]]
            session.compare(workload, contenders, (INPUTS,), few=few)
    session.finish()
