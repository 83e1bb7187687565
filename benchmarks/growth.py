"""How the factor pass grows: with examples, width, depth, classes and sequence length."""

from typing import Any

import harness

WIDTH = 256
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "examples": [
        {"name": "mlp", "sizes": (784, WIDTH, WIDTH, 10), "examples": n}
        for n in (1024, 4096, 16384)
    ],
    "width": [
        {"name": "mlp", "sizes": (784, w, w, 10), "examples": 1024} for w in (128, 256, 512, 1024)
    ],
    "depth": [
        {"name": "mlp", "sizes": (784, *[WIDTH] * d, 10), "examples": 1024} for d in (2, 4, 8, 16)
    ],
    "classes": [
        {"name": "mlp", "sizes": (784, WIDTH, c), "examples": 256}
        for c in (10, 100, 316, 1000, 3162, 10000)
    ],
    "tokens": [
        {"name": "transformer", "tokens": t, "examples": 8, "batch": 8} for t in (32, 64, 128, 256)
    ],
}
FISHER_TYPES = ("mc", "type2")
MOST_CLASSES = 316
"""Beyond this many, the exact Hessian has too many columns for a benchmark."""
ROUNDS = 3

if __name__ == "__main__":
    session = harness.Session("growth")
    for sweep in session.chosen("workload", SWEEPS):
        for workload in SWEEPS[sweep]:
            classes = workload["sizes"][-1] if "sizes" in workload else 10
            types = FISHER_TYPES if classes <= MOST_CLASSES else FISHER_TYPES[:1]
            sizes = session.description(**workload)
            for fisher_type in types:  # in processes of their own, for the peak memory of each
                session.compare(sizes, (harness.OURS,), (fisher_type,), rounds=ROUNDS, sweep=sweep)
    session.finish()
