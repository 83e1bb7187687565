"""A whole fit in a new process, compilation and all, and a second fit in the same process.

laplax's own types run on networks that are small enough for them.
"""

import harness

WORKLOADS = ("mlp", "lenet")
SMALL = {"sizes": (64, 32, 32, 10), "examples": 1024}
"""A network of 3,466 parameters: laplax's diagonal and dense curvature take one product each."""
ROUNDS = 3

if __name__ == "__main__":
    session = harness.Session("cold")
    peers = (harness.KFAC_JAX, harness.LAPLACE_TORCH[0])
    for name in session.chosen("workload", WORKLOADS):
        session.compare_fresh(
            session.description(name), (harness.OURS, "laplax lanczos", *peers), rounds=ROUNDS
        )
    if session.chosen("workload", ("small",)):
        session.compare_fresh(
            session.description("small", **SMALL),
            (harness.OURS, "laplax diagonal", "laplax lanczos", "laplax full"),
            rounds=ROUNDS,
        )
    session.finish()
