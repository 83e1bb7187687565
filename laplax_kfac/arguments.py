"""Arguments of public functions: checks with errors that name the argument and what to do."""

import operator
from collections.abc import Collection
from typing import TypeVar

Function = TypeVar("Function")


def no_type_check(function: Function) -> Function:
    """Mark a public function that refuses wrong arguments itself, by errors that say what to do.

    jaxtyping's import hook, which checks annotations when a test calls a function, leaves functions
    with a decorator of this name alone: its own error would come before ours. To a static type
    checker the function is as typed as any other, which it is not with the decorator of `typing`.
    """
    return function


def positive_integer(name: str, value: object) -> int:
    """The value, if it is a positive integer.

    Raises:
        ValueError: If it is not.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        msg = f"`{name}` must be a positive integer, found {value!r}."
        raise ValueError(msg)
    return number


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; found {value!r}."
        raise ValueError(msg)
