"""Lines of results: a cell each, written when it is finished; what is there is not run again."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FILE = HERE / "results.jsonl"

Record = dict[str, Any]
KEYS = ("task", "method", "seed")


@dataclass
class Results:
    """The records of a file, and a way to add to it.

    Attributes:
        path: The file. A line is one write at its end, so that several runs may share it; what an
            interrupted write left behind has no end, and is cut off when the file is read.
        records: By task, method and seed.
    """

    path: Path
    records: dict[tuple[Any, ...], Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = FILE) -> "Results":
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(path, len(whole.encode()))
        records = map(json.loads, whole.splitlines())
        return cls(path, {tuple(r[k] for k in KEYS): r for r in records})

    def __contains__(self, cell: tuple[str, str, int]) -> bool:
        return cell in self.records

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def add(self, task: str, method: str, seed: int, numbers: Record) -> None:
        """Keep a cell; numbers are rounded to five digits."""
        record = {"task": task, "method": method, "seed": seed, **_rounded(numbers)}
        self.records[task, method, seed] = record
        with open(self.path, "ab", buffering=0) as file:
            file.write((json.dumps(record) + "\n").encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, (float, np.floating)) else value
