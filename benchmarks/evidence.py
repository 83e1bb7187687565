"""The log marginal likelihood and its gradient in the prior precision, after the fit."""

import harness

WORKLOADS = ("mlp", "lenet")
EXAMPLES = 256
"""Data of the fit, which is not measured here."""

if __name__ == "__main__":
    session = harness.Session("evidence")
    for name in session.chosen("workload", WORKLOADS):
        workload = {"examples": EXAMPLES} | session.description(name)
        session.compare(workload, (harness.OURS, harness.LAPLACE_TORCH[0]))
    session.finish()
