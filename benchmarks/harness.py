"""Run contenders side by side and write what was measured as JSON lines.

Every contender runs in a process of its own (`worker`), with its own interpreter. All are prepared
first; then they run in turn, round after round, so that whatever else the machine does meets all
alike. The first run of each, with its compilation, is kept apart from the others.
"""

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workloads

HERE = Path(__file__).parent
ROUNDS = 5
"""Timed runs of a contender, its first not counted."""
SHARE = 4.0
"""Seconds of timed runs after which a contender sits out further rounds."""
FRESH_SHARE = 30.0
"""The same, where rounds have new processes and the first runs count."""
LIMIT = 60.0
"""Seconds after which a run is given up."""
TOO_LONG = f"takes more than {LIMIT:.0f} s"
PAUSE = 0.1
"""Seconds between runs: threads that wait actively go to sleep."""

OURS = "laplax_kfac"
LAPLAX = "laplax"
KFAC_JAX = "kfac-jax"
CURVLINOPS = "curvlinops"
LAPLACE_TORCH = ("laplace-torch curvlinops", "laplace-torch BackPACK", "laplace-torch ASDL")
MACHINE = "machine"
"""Not a contender: the rate of matrix products, measured in the same rounds."""

Reply = dict[str, Any]


def worker_of(contender: str) -> tuple[Path, str]:
    """Interpreter and module of a contender; the Makefile sets the peers' environments up."""
    if contender == KFAC_JAX:
        return HERE.parent / ".venv-bench-kfac-jax/bin/python", "contender_kfac_jax"
    if contender == CURVLINOPS or contender in LAPLACE_TORCH:
        return HERE.parent / ".venv-bench-torch/bin/python", "contender_torch"
    return Path(sys.executable), "contender_ours"


class Worker:
    """A contender's process.

    Threads of OpenMP sleep while they wait, so that processor time is work: torch's would spin.
    """

    def __init__(self, contender: str, root: Path = HERE.parent):
        python, module = worker_of(contender)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, root / "benchmarks/worker.py", module, contender],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def ask(self, **command: Any) -> Reply:
        """Send a command and wait for the reply, which has ``error`` if it failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return {"error": self.last_words()}
        if not select.select([self.process.stdout], [], [], LIMIT)[0]:
            self.process.kill()
            return {"error": TOO_LONG}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": self.last_words()}

    def last_words(self) -> str:
        """Why the process ended."""
        self.log.seek(0)
        return "process ended: " + self.log.read().strip().split("\n")[-1][:200]

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


@dataclass
class Runs:
    """What one contender did in one case."""

    contender: str
    prepared: Reply
    firsts: list[Reply] = field(default_factory=list)
    timed: list[Reply] = field(default_factory=list)
    check: float | None = None

    @property
    def error(self) -> str | None:
        """Why it has no more results."""
        replies = [self.prepared, *self.firsts, *self.timed]
        return next((r["error"] for r in replies if "error" in r), None)

    def wants_more(self, rounds: int, share: float, *, with_firsts: bool = False) -> bool:
        """Whether it takes part in another round of timed runs."""
        if self.error:
            return False
        spent = sum(r["wall"] for r in self.timed + self.firsts * with_firsts)
        return len(self.timed) < rounds and spent < share

    def summary(self) -> dict[str, Any]:
        """The record of the results file."""
        firsts, timed = ([r for r in rs if "error" not in r] for rs in (self.firsts, self.timed))
        if self.error or not timed:
            return {"contender": self.contender, "error": self.error}
        return rounded(
            {
                "contender": self.contender,
                "wall": statistics.median(r["wall"] for r in timed),
                "cpu": statistics.median(r["cpu"] for r in timed),
                "first_wall": statistics.median(r["wall"] for r in firsts),
                "first_cpu": statistics.median(r["cpu"] for r in firsts),
                "walls": [r["wall"] for r in timed],
                "cpus": [r["cpu"] for r in timed],
                "fraction": self.prepared["fraction"],
                "peak_mb": timed[-1]["peak_mb"],
                "prepared_mb": self.prepared["peak_mb"],
                "check": self.check,
            }
        )


def rounded(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


class Session:
    """A run of one question's script: its options and its results file."""

    def __init__(self, question: str):
        parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
        parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is kept")
        parser.add_argument("--workload", action="append", help="only this one; may be repeated")
        parser.add_argument("--contender", action="append", help="only this one; may be repeated")
        parser.add_argument("--variant", action="append", help="only this one; may be repeated")
        parser.add_argument("--examples", type=int, help="another number of examples")
        parser.add_argument("--output", type=Path, help="another file for the results")
        self.options = parser.parse_args()
        self.question = question
        self.records: list[dict[str, Any]] = []
        self.versions: dict[str, str] = {}
        self.began = time.perf_counter()

    def description(self, name: str, **sizes: Any) -> dict[str, Any]:
        """A workload as JSON, see `workloads.from_description`."""
        description = {"name": name, **sizes}
        if self.options.quick:
            examples, batch = workloads.QUICK[name]
            description |= {"examples": examples, "batch": batch}
        if self.options.examples:
            description["examples"] = self.options.examples
        if self.options.quick or self.options.examples:
            description.pop("run", None)
        return description

    def chosen(self, option: str, names: Iterable[str]) -> list[str]:
        """Those of the names that the command line asks for."""
        wanted = getattr(self.options, option)
        return [name for name in names if not wanted or name in wanted]

    def installed(self, contenders: Iterable[str]) -> list[str]:
        """Those of the contenders that are asked for and have their environment."""
        names = self.chosen("contender", contenders)
        lacking = [name for name in names if not worker_of(name)[0].exists()]
        if lacking:
            print(f"not installed, `make bench` would do it: {', '.join(lacking)}")
        return [name for name in names if name not in lacking]

    def compare(
        self,
        workload: dict[str, Any],
        contenders: Iterable[str],
        variants: Iterable[Any] = ("",),
        *,
        rounds: int = ROUNDS,
        **more: Any,
    ) -> None:
        """Measure all contenders on one workload, variant by variant.

        One that takes too long for a variant is not asked for the others.

        Args:
            workload: Its description.
            contenders: Their names.
            variants: Of the question, such as the Fisher type.
            rounds: Timed runs of each.
            **more: Further entries of the case.
        """
        names = self.installed(contenders)
        workers = {name: Worker(name) for name in names}
        slow: dict[str, Reply] = {}
        for variant in self.chosen("variant", variants):
            case = self.case(workload, variant, more)
            found = [Runs(n, slow.get(n) or self.prepare(workers[n], n, case)) for n in names]
            self.interleave(found, workers, 1 if self.options.quick else rounds)
            self.keep(case, found, workers)
            for runs in found:
                if runs.error == TOO_LONG:
                    reason = f"not asked, for `{variant}` {TOO_LONG}" if variant else TOO_LONG
                    slow[runs.contender] = {"error": reason}
            for name in names:
                if workers[name].process.poll() is not None:  # it was stopped, or failed
                    workers[name].stop()
                    workers[name] = Worker(name)
        for worker in workers.values():
            worker.stop()

    def interleave(self, found: list[Runs], workers: dict[str, Worker], rounds: int) -> None:
        """The first run of each, then rounds of timed runs, every other one backwards."""
        for runs in found:
            if not runs.error:
                runs.firsts.append(workers[runs.contender].ask(do="run"))
            if not runs.error:
                runs.check = workers[runs.contender].ask(do="check").get("check")
        for number in range(rounds):
            for runs in found[:: 1 if number % 2 else -1]:
                if runs.wants_more(rounds, SHARE):
                    time.sleep(PAUSE)
                    runs.timed.append(workers[runs.contender].ask(do="run"))

    def compare_fresh(
        self, workload: dict[str, Any], contenders: Iterable[str], rounds: int = ROUNDS
    ) -> None:
        """Like `compare`, for what happens once in a process: every round has new ones.

        Each does it twice. First runs are the medians of the rounds, and so are the second ones.
        """
        case = self.case(workload, "", {})
        found: dict[str, Runs] = {}
        workers: dict[str, Worker] = {}
        for _ in range(1 if self.options.quick else rounds):
            for name in self.installed(contenders):
                if name in found and not found[name].wants_more(
                    rounds, FRESH_SHARE, with_firsts=True
                ):
                    continue
                worker = workers[name] = Worker(name)
                prepared = self.prepare(worker, name, case)
                runs = found.setdefault(name, Runs(name, prepared))
                for replies in (runs.firsts, runs.timed):
                    if not runs.error:
                        replies.append(worker.ask(do="run"))
                self.versions |= worker.ask(do="versions").get("versions", {})
                worker.stop()
        self.keep(case, list(found.values()), {})

    def prepare(self, worker: Worker, contender: str, case: dict[str, Any]) -> Reply:
        """Tell a worker what is asked of it."""
        question = {"question": "rate"} if contender == MACHINE else {}
        return worker.ask(do="prepare", case=case | question)

    def case(self, workload: dict[str, Any], variant: Any, more: dict[str, Any]) -> dict[str, Any]:
        """What workers are asked to prepare."""
        return {"question": self.question, "workload": workload, "variant": variant, **more}

    def keep(self, case: dict[str, Any], found: list[Runs], workers: dict[str, Worker]) -> None:
        """Add the records of a case, and print them."""
        for worker in workers.values():
            self.versions |= worker.ask(do="versions").get("versions", {})
        for runs in found:
            record = {**case, **runs.summary()}
            self.records.append(record)
            print(line_of(record), flush=True)

    def finish(self) -> None:
        """Write the results file, unless this was a quick run or a part of one."""
        chosen = vars(self.options)
        path = chosen.pop("output")
        if any(chosen.values()) and not path:
            return
        suffix = "-gpu" if "device" in self.versions else ""
        path = path or HERE / f"results/{self.question}{suffix}.jsonl"
        head = {
            "environment": environment(),
            "versions": dict(sorted(self.versions.items())),
            "seconds": round(time.perf_counter() - self.began),
        }
        lines = [json.dumps(entry) for entry in [head, *self.records]]
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def line_of(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    sizes = {k: v for k, v in record["workload"].items() if k != "name"}
    head = (
        f"{record['question']:10} {record['workload']['name']:12} {record['variant']!s:12} "
        f"{record['contender']:26}"
    )
    if "error" in record:
        return f"{head} {record['error']}"
    return (
        f"{head} wall {record['wall'] / record['fraction']:9.3f} s  "
        f"cpu {record['cpu'] / record['fraction']:9.3f} s  first {record['first_wall']:7.2f} s  "
        f"peak {record['peak_mb']:6.0f} MB  check {record['check']}" + (f"  {sizes}" * bool(sizes))
    )


def environment() -> dict[str, Any]:
    """What was measured on; no names of machines, no paths."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
