"""The eigendecompositions of all factors, after the factor pass."""

import harness
import workloads

WORKLOADS = ("mlp", "lenet", "conv8", "transformer")
CONTENDERS = (harness.OURS, harness.KFAC_JAX, harness.LAPLACE_TORCH[0])

if __name__ == "__main__":
    session = harness.Session("eigen")
    for name in session.chosen("workload", WORKLOADS):
        session.compare(session.description(name, **workloads.FEW.get(name, {})), CONTENDERS)
    session.finish()
