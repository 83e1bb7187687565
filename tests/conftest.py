"""Settings for all tests; they must be made before jax is imported."""

import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"
# Eigendecompositions run in OpenBLAS, whose threads spin: they would keep the tests beside waiting.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The tests spend their time compiling small programs, so compile with little effort. XLA's older
# code generators take half the time; but a flag that XLA does not know would end the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
    ]
).strip()

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook
from loguru import logger

logger.remove()  # laplax logs every step

# Shapes and types in annotations are checked at every call, unless this variable is set.
if not os.environ.get("LAPLAX_KFAC_UNCHECKED"):
    install_import_hook("laplax_kfac", "beartype.beartype")


@pytest.fixture
def x64() -> Iterator[None]:
    """Compute in float64; `pytestmark = pytest.mark.usefixtures("x64")` does so in a whole file."""
    with jax.enable_x64(True):
        yield


MAPS = Path("/proc/self/maps")
MOST_MAPS = 25_000
"""Linux ends a process that has more than 65,530; a compiled program takes several."""


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten() -> Iterator[None]:
    """What was compiled for a file is forgotten where there is much of it."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
