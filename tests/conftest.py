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
        "--xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
    ]
).strip()

from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook
from loguru import logger

logger.remove()  # laplax logs every step

# Shapes and types in annotations are checked at every call, unless this variable is set.
if not os.environ.get("LAPLAX_KFAC_UNCHECKED"):
    FOLDERS = [
        "bases",
        "blocks",
        "capture",
        "curvature",
        "evidence",
        "factors",
        "likelihood",
        "parsing",
        "patterns",
        "posterior",
        "predictive",
    ]
    ROOM = ["checkpoint", "gram", "jaxprs", "links", "plotting", "report"]
    install_import_hook([f"laplax_kfac.{name}" for name in FOLDERS + ROOM], "beartype.beartype")


@pytest.fixture
def x64() -> Iterator[None]:
    """Compute in float64; `pytestmark = pytest.mark.usefixtures("x64")` does so in a whole file."""
    with jax.enable_x64(True):
        yield
