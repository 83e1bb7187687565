"""``python -m study``: run the cells that are not there yet, then write the page and its figure."""

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any

from loguru import logger

from study import classification, continual, figure, regression, selection, tables
from study.results import Results

SEEDS = range(5)
KINDS: tuple[Any, ...] = (continual, regression, selection, classification)


def run(results: Results, names: Sequence[str] = (), seconds: float = float("inf")) -> bool:
    """Run what is missing of the tasks of these names; whether there was time for all of it."""
    start = time.perf_counter()
    for kind, task in [(module, task) for module in KINDS for task in module.TASKS]:
        if names and task.name not in names:
            continue
        for cell in kind.run(task, SEEDS, results):
            print(f"{time.perf_counter() - start:8.1f} s  {cell}", flush=True)
            if time.perf_counter() - start > seconds:
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="names of tasks; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--page", action="store_true", help="only write the page and its figure")
    chosen = parser.parse_args()
    logger.remove()
    warnings.simplefilter("ignore")  # what they warn of is what is measured
    if chosen.page or run(Results.read(), chosen.tasks, chosen.seconds):
        results = Results.read()
        tables.write(results)
        figure.draw(tables.Summary(results))


if __name__ == "__main__":
    main()
