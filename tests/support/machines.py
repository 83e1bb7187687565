"""Another machine for a test."""

from dataclasses import replace
from typing import Any

import pytest

from laplax_kfac import machine


def tune_machine(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Change some of the sizes and thresholds."""
    monkeypatch.setattr(machine, "MACHINE", replace(machine.MACHINE, **values))
