"""Weight samples from the posterior, after the fit."""

import harness

WORKLOADS = ("mlp", "lenet")
EXAMPLES = 256
"""Data of the fit, which is not measured here."""
SAMPLES = 30

if __name__ == "__main__":
    session = harness.Session("samples")
    for name in session.chosen("workload", WORKLOADS):
        workload = {"examples": EXAMPLES} | session.description(name)
        contenders = (harness.OURS, harness.LAPLAX, harness.LAPLACE_TORCH[0])
        session.compare(workload, contenders, (SAMPLES,))
    session.finish()
