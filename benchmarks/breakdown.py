"""Where the time goes: forward passes, pullbacks, factors, eigendecompositions, by workload."""

import harness
import workloads

CONTENDERS = (harness.MACHINE, harness.OURS)
WORKLOADS = ("mlp", "lenet", "conv8", "transformer")
PARTS = (
    "forward",
    "pullbacks mc",
    "factors mc",
    "pullbacks type2",
    "factors type2",
    "eigendecompositions",
)
ROUNDS = 3

if __name__ == "__main__":
    session = harness.Session("breakdown")
    for name in session.chosen("workload", WORKLOADS):
        session.compare(
            session.description(name, **workloads.PART.get(name, {})),
            CONTENDERS,
            PARTS,
            rounds=ROUNDS,
        )
    session.finish()
