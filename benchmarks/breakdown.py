"""Where the time goes: forward passes, pullbacks, factors, eigendecompositions, by workload."""

import harness

WORKLOADS = ("mlp", "lenet", "conv8", "transformer")
PARTS = ("forward", "pullbacks", "factors", "eigendecompositions")
FISHER_TYPES = ("mc", "type2")
ROUNDS = 3

if __name__ == "__main__":
    session = harness.Session("breakdown")
    for name in session.chosen("workload", WORKLOADS):
        variants = [f"{kind} {part}" for kind in FISHER_TYPES for part in PARTS]
        session.compare(
            session.description(name), (harness.MACHINE, harness.OURS), variants, rounds=ROUNDS
        )
    session.finish()
