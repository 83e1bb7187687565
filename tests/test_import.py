"""What importing the plugin loads. Its time is measured by benchmarks/import_time.py."""

import subprocess
import sys

LOADED = """
import sys
import jax, laplax
modules, arrays = set(sys.modules), len(jax.live_arrays())
import laplax_kfac
roots = {name.partition(".")[0] for name in set(sys.modules) - modules}
print(*sorted(roots - sys.stdlib_module_names))
print(len(jax.live_arrays()) - arrays)
"""
RUN_TIME_DEPENDENCIES = {"absl", "jax", "jaxlib", "jaxtyping", "laplax", "numpy", "optax", "tqdm"}
"""Those of pyproject.toml, and absl, which optax brings."""


def test_the_import_loads_no_extra_and_makes_no_array():
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    roots, arrays = run.stdout.splitlines()
    assert set(roots.split()) <= RUN_TIME_DEPENDENCIES | {"laplax_kfac"}
    assert "laplax_kfac" in roots.split()
    assert int(arrays) == 0
