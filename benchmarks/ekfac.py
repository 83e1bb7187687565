"""EKFAC: factors, eigendecompositions, and the second pass that corrects the eigenvalues."""

import harness
import workloads

WORKLOADS = ("mlp", "lenet", "conv8", "transformer")

if __name__ == "__main__":
    session = harness.Session("ekfac")
    for name in session.chosen("workload", WORKLOADS):
        session.compare(
            session.description(name, **workloads.FEW.get(name, {})),
            (harness.OURS, harness.CURVLINOPS),
            ("type2",),
        )
    session.finish()
