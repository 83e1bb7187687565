"""The factor pass: Kronecker factors of all layers from all data, by Fisher type (`expand`)."""

import harness
import workloads

WORKLOADS = ("mlp", "lenet", "conv8", "transformer")
FISHER_TYPES = ("mc", "empirical", "type2")  # the largest last: peak memory only grows
CONTENDERS = (
    harness.MACHINE,
    harness.OURS,
    harness.KFAC_JAX,
    harness.CURVLINOPS,
    *harness.LAPLACE_TORCH,
)

if __name__ == "__main__":
    session = harness.Session("factors")
    for name in session.chosen("workload", WORKLOADS):
        session.compare(
            session.description(name, **workloads.PART.get(name, {})), CONTENDERS, FISHER_TYPES
        )
    session.finish()
