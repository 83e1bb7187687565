"""Importing the plugin costs little on top of importing laplax."""

import subprocess
import sys

MEASURE = """
import time
import laplax
start = time.process_time()
import laplax_kfac
print(time.process_time() - start)
"""


def test_import_adds_less_than_0_3_seconds():
    # Processor time, least of three: what else the machine does then matters little.
    runs = [
        subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 0.3
