"""On eight devices, whatever the layout of the arrays, everything is as on one.

JAX has as many devices as it had at its start, so that the rows of `layouts` are computed in a
process of their own.
"""

import json
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LAYOUTS = [
    "explicit", "explicit_set", "automatic", "automatic_set", "fsdp_first_explicit",
    "fsdp_last_explicit", "fsdp_first_automatic", "two_data_axes_explicit",
    "two_data_axes_automatic", "tensor_explicit", "tensor_automatic",
]  # fmt: skip
COMPUTED = [
    "kfac", "ekfac", "kfoc", "mc", "diagonal", "accumulator", "kfac_under_jit", "ekfac_under_jit",
    "predictives", "sampled_functions", "samples", "evidence", "relative_error",
]  # fmt: skip
FAST = (["ekfac", "samples"], ["explicit_set", "fsdp_last_explicit"])
TOLERANCES = {32: 1e-6, 64: 1e-12}


def printed(script: str, *arguments: str) -> list[list[Any]]:
    """What a script beside this file prints, a line of JSON a row."""
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


@cache
def errors(bits: int, computed: tuple[str, ...], layouts: tuple[str, ...]) -> dict[object, object]:
    """Relative errors of some rows of the table."""
    rows = printed("layouts.py", str(bits), ",".join(computed), ",".join(layouts))
    return {(name, layout): error for name, layout, error in rows}


def require_small(error: object, bits: int) -> None:
    assert isinstance(error, float), error
    assert error < TOLERANCES[bits]


@pytest.mark.parametrize("layout", FAST[1])
@pytest.mark.parametrize("name", FAST[0])
def test_eight_devices_are_as_one(name: str, layout: str) -> None:
    found = errors(64, tuple(FAST[0]), tuple(FAST[1]))
    require_small(found[name, layout], 64)


@pytest.mark.slow
@pytest.mark.skipif("LAPLAX_KFAC_DEVICES" not in os.environ, reason="`make devices` runs it")
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", COMPUTED)
def test_the_whole_table(name: str, layout: str, bits: int) -> None:
    found = errors(bits, (name,), tuple(LAYOUTS))
    require_small(found[name, layout], bits)


def test_collectives_do_not_grow_with_batches_or_loops() -> None:
    """The sums are added once, and parameters that are spread are gathered once, each leaf."""
    for layout, found in printed("collectives.py"):
        gathered = {} if layout == "automatic" else {"all-gather": 5}
        assert found == {"all-reduce": 3, **gathered}, layout


@pytest.mark.slow
def test_the_page_on_devices_runs_on_eight() -> None:
    page = (ROOT / "docs" / "devices.md").read_text()
    source = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    found = subprocess.run(
        [sys.executable, "-c", source + "\nassert jax.device_count() == 8"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_are_as_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("processes.py")
    runs = [
        subprocess.Popen(
            [sys.executable, script, port, number, count],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, count in (("0", "1"), ("0", "2"), ("1", "2"))
    ]  # fmt: skip
    try:
        outputs = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0, 0], [e[-1000:] for _, e in outputs]
    lines = [out.splitlines()[-1] for out, _ in outputs]
    one, *others = [np.array(line.split(), float) for line in lines]
    for other in others:
        np.testing.assert_allclose(other, one, rtol=1e-12)
