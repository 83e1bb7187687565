"""Two checkouts of this package side by side: what a change costs, as ratios in one run.

    python benchmarks/before_after.py --before ../other-checkout

Both run each question in turn, in processes of their own, so that whatever else the machine does
meets both alike. First runs, with their compilation, are those of new processes.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import harness

FEW = {"conv8": 128, "transformer": 64}
"""Examples of the networks that take longest."""
CASES: list[dict[str, Any]] = [
    {"question": question, "workload": workload, "variant": variant}
    for question, variant, names, sizes in (
        ("factors", "type2", ("mlp", "lenet", "conv8", "transformer"), FEW),
        ("factors", "mc", ("mlp", "lenet", "conv8", "transformer"), FEW),
        ("ekfac", "type2", ("mlp", "lenet"), {"mlp": 1024, "lenet": 1024}),
        ("predictive", 512, ("mlp", "lenet"), {"mlp": 256, "lenet": 256}),
        ("samples", 32, ("lenet",), {"lenet": 256}),
        ("evidence", "", ("mlp", "lenet"), {"mlp": 256, "lenet": 256}),
    )
    for name in names
    for workload in [{"name": name} | ({"examples": sizes[name]} if name in sizes else {})]
]
ROUNDS = 5
FRESH = 4
"""New processes of each: a process's memory alone can shift all its times by several per cent."""


def measured(case: dict[str, Any], roots: dict[str, Path]) -> dict[str, Any]:
    """Processor seconds of each checkout, first runs apart."""
    firsts: dict[str, list[float]] = {name: [] for name in roots}
    timed: dict[str, list[float]] = {name: [] for name in roots}
    for _ in range(FRESH):
        workers = {name: harness.Worker(harness.OURS, root) for name, root in roots.items()}
        for name, worker in workers.items():
            began = worker.ask(do="prepare", case=case)
            reply = worker.ask(do="run") if "error" not in began else began
            if "error" in reply:
                return {"error": f"{name}: {reply['error']}"}
            firsts[name].append(began["cpu"] + reply["cpu"])
        for number in range(ROUNDS):
            for name in list(workers)[:: 1 if number % 2 else -1]:
                timed[name].append(workers[name].ask(do="run")["cpu"])
        for worker in workers.values():
            worker.stop()
    return {
        "cpu": {name: statistics.median(times) for name, times in timed.items()},
        "least": {name: min(times) for name, times in timed.items()},
        "first": {name: min(times) for name, times in firsts.items()},
    }


def main() -> None:
    """Print a line a case: after over before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--question", action="append", help="only this one; may be repeated")
    parser.add_argument("--workload", action="append", help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, help="a file for the results, as JSON lines")
    options = parser.parse_args()
    roots = {"before": options.before.resolve(), "after": harness.HERE.parent}
    records = [{"environment": harness.environment()}]
    for case in CASES:
        name = case["workload"]["name"]
        if options.question and case["question"] not in options.question:
            continue
        if options.workload and name not in options.workload:
            continue
        found = measured(case, roots)
        records.append({**case, **harness.rounded(found)})
        ratios = {k: v["after"] / v["before"] for k, v in found.items() if k != "error"}
        shown = "  ".join(f"{k} {ratio:.3f}" for k, ratio in ratios.items())
        print(
            f"{case['question']:10} {name:12} {case['variant']!s:6} {found.get('error', shown)}",
            flush=True,
        )
    if options.output:
        options.output.write_text("\n".join(map(json.dumps, records)) + "\n")


if __name__ == "__main__":
    main()
