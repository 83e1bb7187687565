"""What records print: names, sizes and single numbers in a few lines, never their arrays.

The ``repr`` of a dataclass shows all that it holds, which for a curvature is every number of every
basis. `summarised` gives a class one that fits a screen, whatever the fields hold: arrays, tracers,
shapes without values, or nothing, as in a tree that JAX maps over.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Class = TypeVar("Class")

MOST_LINES = 15
WIDTH = 100
MOST_SCALARS = 6  # of a pytree that is shown number by number


def summarised(cls: type[Class]) -> type[Class]:
    """Give a dataclass a ``repr`` of at most `MOST_LINES` lines.

    It shows the fields, those of ``repr=False`` left out. A class whose fields say little has a
    method ``summary_lines`` that returns a heading and the lines below it.
    """
    cls.__repr__ = summary  # type: ignore[method-assign]
    return cls


def summary(record: object) -> str:
    """The record in one line where it is short, else a line a field, the longest cut."""
    lines_of = getattr(record, "summary_lines", None)
    if lines_of is not None:
        heading, *lines = lines_of()
        return "\n".join([heading, *("  " + line for line in shortened(lines))])
    shown = [f"{name}={brief(value)}" for name, value in fields_of(record)]
    name = type(record).__name__
    whole = f"{name}({', '.join(shown)})"
    if len(whole) <= WIDTH:
        return whole
    return "\n".join([f"{name}(", *("  " + line for line in shortened(shown)), ")"])


def fields_of(record: object) -> list[tuple[str, object]]:
    """Names and values of the fields that are shown, as far as the record has them yet."""
    held = vars(record)
    shown = [f.name for f in dataclasses.fields(record) if f.repr]  # type: ignore[arg-type]
    return [(name, held[name]) for name in shown if name in held]


def readable_bytes(count: float | int) -> str:
    """A number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} EB"


def shortened(lines: Sequence[str]) -> list[str]:
    """Lines of bounded number and length."""
    most = MOST_LINES - 2
    cut = [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines]
    if len(cut) <= most:
        return cut
    return [*cut[: most - 1], f"... {len(cut) - most + 1} more"]


def brief(value: object) -> str:
    """A value in a part of a line: numbers as they are, arrays by dtype and shape."""
    if isinstance(value, np.dtype):
        return str(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return number(value) or f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, float):
        return f"{value:.5g}"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        lines_of = getattr(value, "summary_lines", None)
        return lines_of()[0] if lines_of is not None else nested(value)
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    leaves = jax.tree.leaves(value)
    if len(leaves) > MOST_SCALARS or any(getattr(x, "shape", ()) for x in leaves):
        size = sum(math.prod(x.shape) for x in leaves if hasattr(x, "size"))
        numbers = f" leaves, {size:,} numbers" if size else ""
        return f"<{type(value).__name__} of {len(leaves)}{numbers}>"
    return written(value)


def written(value: object) -> str:
    """A small pytree, written out."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {brief(x)}" for k, x in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(brief, value)) + ")"
    return f"<{type(value).__name__}>"


def number(value: object) -> str:
    """An array of one number, if the number can be read here; else nothing."""
    if getattr(value, "shape", None) != () or isinstance(value, jax.core.Tracer):
        return ""
    if isinstance(value, jax.Array):
        if value.is_deleted() or not value.is_fully_addressable:
            return ""
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return ""
    elif not isinstance(value, np.ndarray | np.generic):
        return ""
    found = np.asarray(value)
    return f"{found:.5g}" if np.issubdtype(found.dtype, np.floating) else str(found)


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of a table, with every column as wide as its widest cell."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def nested(record: object) -> str:
    """A record within another one: its first field stands for it."""
    (name, value), *more = fields_of(record) or [("", None)]
    return f"{type(record).__name__}({name}={brief(value)}{', ...' if more else ''})"
