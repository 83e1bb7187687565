"""Processor time that importing the plugin adds to importing laplax, from bytecode.

The least of five imports is what counts.

Run as `python benchmarks/import_time.py`.
"""

import os
import subprocess
import sys
import tempfile

MEASURE = """
import time
import jax, laplax
start = time.process_time()
import laplax_kfac
print(time.process_time() - start)
"""
ROUNDS = 5


def import_seconds(environment: dict[str, str]) -> float:
    """Return the processor seconds of one import in a new process."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return float(run.stdout)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, PYTHONPYCACHEPREFIX=folder)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        compiling, *others = (import_seconds(environment) for _ in range(ROUNDS + 1))
    print(f"import laplax_kfac: {min(others):.3f} s, {compiling:.3f} s the first time")
