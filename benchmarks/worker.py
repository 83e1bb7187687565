"""A contender in a process of its own: prepares a case, then runs it once whenever it is told to.

Started by `harness` as ``python worker.py MODULE CONTENDER`` with the contender's interpreter.
Speaks JSON, a line each way, over the standard streams; what libraries print goes to the error
stream.
A contender's module has a dictionary ``QUESTIONS`` of functions ``(contender, case) -> Task``.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        run: Does it once, and returns when it is done.
        check: Of the result: a number that other contenders find too, or None.
        fraction: How much of the question's work a run does.
    """

    run: Callable[[], Any]
    check: Callable[[Any], float | None] = lambda _: None
    fraction: float = 1.0


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module_name, contender = sys.argv[1:]
    module: Any = None
    task: Task | None = None
    result: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        reply: dict[str, Any] = {}
        try:
            if command["do"] == "prepare":
                result = None
                module = importlib.import_module(module_name)
                task = module.QUESTIONS[command["case"]["question"]](contender, command["case"])
                reply["fraction"] = task.fraction
            elif command["do"] == "run":
                assert task is not None
                result = None  # so that two results never live at once
                result = task.run()
            elif command["do"] == "check":
                assert task is not None
                value = task.check(result)
                reply["check"] = None if value is None else float(value)
            else:
                reply["versions"] = module.versions()
        except Exception as error:  # whatever a peer cannot do is a result
            reply["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        reply["wall"] = time.perf_counter() - wall
        reply["cpu"] = time.process_time() - cpu
        reply["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
