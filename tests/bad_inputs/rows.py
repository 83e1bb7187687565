"""A row of the table of bad inputs, and rows by function, argument and value."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bad_inputs.fitted import CALLS


@dataclass(frozen=True)
class Row:
    """A bad input and the error that it must end in.

    Attributes:
        id: The input in a few words.
        call: Passes it.
        error: The very type of the error, not one above it.
        text: A fragment of the message.
        argument: The argument that the message must name in backticks.
        unnamed: Why the message names none, where it does not.
    """

    id: str
    call: Callable[[], object]
    error: type[Exception]
    text: str
    argument: str = ""
    unnamed: str = ""

    def __post_init__(self) -> None:
        assert bool(self.argument) != bool(self.unnamed), self.id


def rows(
    functions: Iterable[str],
    argument: str,
    values: Mapping[str, Any] | Iterable[Any],
    error: type[Exception],
    text: str,
    **others: Any,
) -> list[Row]:
    """Rows for every function of `CALLS` and every value of one argument, all else being good.

    The other arguments may be changed, too: to what the argument needs to play a part. Values have
    names, or show what they are.
    """
    named = values if isinstance(values, Mapping) else {brief(value): value for value in values}

    def of(function: str, name: str) -> Row:
        call = lambda: CALLS[function](**others, **{argument: named[name]})  # noqa: E731
        return Row(f"{function} {argument}={name}", call, error, text, argument)

    return [of(function, name) for function in functions for name in named]


def brief(value: object) -> str:
    """A value as part of a test's name."""
    if isinstance(value, np.ndarray) or hasattr(value, "shape"):
        return f"{value.dtype}{list(np.shape(value))}"  # type: ignore[attr-defined]
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= 40 else type(value).__name__
