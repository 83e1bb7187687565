"""Every bad input is refused, by an error that names the argument and is our own."""

import importlib
import pkgutil
import traceback
from pathlib import Path

import pytest

import bad_inputs
import laplax_kfac
from bad_inputs.rows import Row

PACKAGE = Path(laplax_kfac.__file__).parent
MODULES = [
    importlib.import_module(f"bad_inputs.{info.name}")
    for info in pkgutil.iter_modules(bad_inputs.__path__)
    if not info.name.startswith("test_")
]
ROWS: list[Row] = [row for module in MODULES for row in getattr(module, "ROWS", [])]


def test_rows_have_names_of_their_own():
    names = [row.id for row in ROWS]
    assert len({*names}) == len(names), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_bad_input_is_refused(row):
    with pytest.raises(row.error) as info:
        row.call()
    message = str(info.value)
    assert type(info.value) is row.error, f"a {type(info.value).__name__}: {message}"
    assert row.text in message, message
    # The last frame is where it was raised: what JAX or NumPy raises is not ours.
    frames = traceback.extract_tb(info.value.__traceback__)
    assert Path(frames[-1].filename).is_relative_to(PACKAGE), f"raised in {frames[-1]}: {message}"
    if row.argument:
        assert f"`{row.argument}`" in message, message
