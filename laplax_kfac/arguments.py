"""Arguments of public functions: checks with errors that name the argument and what to do.

Every check lets pass what is not known yet, a tracer's value, but not what is known of it, its
shape and dtype: so all work under `jit`.
"""

import difflib
import math
import operator
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Function = TypeVar("Function")

SHOWN = 12
"""Most names that an error lists."""


def no_type_check(function: Function) -> Function:
    """Mark a public function that refuses wrong arguments itself, by errors that say what to do.

    jaxtyping's import hook, which checks annotations when a test calls a function, leaves functions
    with a decorator of this name alone: its own error would come before ours. To a static type
    checker the function is as typed as any other, which it is not with the decorator of `typing`.
    """
    return function


# -- choices -----------------------------------------------------------------------------------


def positive_integer(name: str, value: object, least: int = 1) -> int:
    """The value, if it is an integer of at least 1, or another number; no boolean.

    Raises:
        ValueError: If it is not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        msg = f"`{name}` must be {kind}, found {shown(value)}."
        raise ValueError(msg)
    return number


def require_flags(**values: object) -> None:
    """Refuse what is neither True nor False: a string such as "false" would count as true.

    Raises:
        TypeError: If one is neither.
    """
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            msg = f"`{name}` must be True or False, found {shown(value)}."
            raise TypeError(msg)


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in choices:
        near = nearest(value, choices)
        msg = (
            f"`{name}` must be one of {', '.join(map(repr, choices))}; found {shown(value)}.{near}"
        )
        raise ValueError(msg)


def require_callable(name: str, value: object, what: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: If it cannot.
    """
    if not callable(value):
        msg = f"`{name}` must be {what}, found {shown(value)}."
        raise TypeError(msg)


def require_key(name: str, value: object) -> None:
    """Refuse what is no random key; keys of the old kind, arrays of uint32, are some.

    Raises:
        TypeError: If it is none.
    """
    found = getattr(value, "dtype", None), getattr(value, "shape", None)
    if found[0] is not None and jnp.issubdtype(found[0], jax.dtypes.prng_key):
        fits = found[1] == ()
    else:
        fits = found in ((np.uint32, (2,)), (np.uint32, (4,)))
    if not fits:
        msg = (
            f"`{name}` must be one random key, such as jax.random.key(0); found {shown(value)}. "
            "Several keys come from jax.random.split: pass one of them."
        )
        raise TypeError(msg)


# -- numbers -----------------------------------------------------------------------------------


def require_positive(
    name: str,
    value: object,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Refuse what is not a positive, finite, real number, or an array of such numbers.

    Args:
        name: The argument.
        value: What was passed.
        shape: Shape that it must have; any if None.
        dtype: Numbers that are zero or infinite in this dtype are refused as well; JAX's type of
            floating-point numbers by default.

    Raises:
        ValueError: If a number is zero, negative, infinite, complex or NaN, or the shape is not as
            it must be.
        TypeError: If these are no numbers.
    """
    known = numbers(name, value, shape=shape)
    if known is None:
        return
    with np.errstate(all="ignore"):
        kept = known.astype(jnp.result_type(float) if dtype is None else dtype)
    if (np.isfinite(kept) & (kept >= jnp.finfo(kept.dtype).tiny)).all():  # less flushes to zero
        return
    why = ", or the posterior is improper" if name == "prior_prec" else ""
    lost = (known > 0).all() and np.isfinite(known).all()
    where = name if "`" in name else f"`{name}`"
    msg = f"{where} must be positive and finite{why}; found {shown(value)}" + (
        f", which {kept.dtype} cannot hold (jax_enable_x64 can)." if lost else "."
    )
    raise ValueError(msg)


def require_weights(name: str, value: object) -> None:
    """Refuse weights that are negative, infinite or no numbers.

    The values of arrays of JAX are looked at by the pass over the data, not here: it would wait for
    them with every batch.

    Raises:
        ValueError: If one is.
        TypeError: If these are no numbers.
    """
    if getattr(value, "dtype", None) == np.bool_:
        return
    if isinstance(value, jax.Array):
        value = jax.ShapeDtypeStruct(value.shape, value.dtype)
    known = numbers(name, value, shape=None)
    if known is not None and not (np.isfinite(known) & (known >= 0)).all():
        wrong = known[~(np.isfinite(known) & (known >= 0))]
        found = f"{wrong.size} that are not, such as {wrong.ravel()[0]}"
        where = name if "`" in name else f"`{name}`"
        msg = f"The weights in {where} must be finite and not negative; found {found}."
        raise ValueError(msg)


def numbers(name: str, value: object, *, shape: tuple[int, ...] | None) -> np.ndarray | None:
    """Real numbers that were passed as an argument, as far as they are known.

    Args:
        name: The argument.
        value: What was passed.
        shape: Shape that it must have; any if None.

    Returns:
        The numbers, or None where they are traced.

    Raises:
        ValueError: If they are complex, or of another shape.
        TypeError: If they are none: text, a boolean, an object.
    """
    where = name if "`" in name else f"`{name}`"
    traced = isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    found: Any = value if traced else as_numpy(value)
    kind = "none" if found is None else found.dtype.kind
    if kind not in "iuf" and not (found is not None and jnp.issubdtype(found.dtype, jnp.floating)):
        what = "a real number" if shape == () else "real numbers"
        msg = f"{where} must be {what}, found {shown(value)}."
        raise ValueError(msg) if kind == "c" else TypeError(msg)
    if shape is not None and found.shape != shape:
        what = "one number" if shape == () else f"of shape {shape}"
        msg = f"{where} must be {what}, found shape {found.shape}."
        raise ValueError(msg)
    return None if traced else np.asarray(found)


def as_numpy(value: object) -> np.ndarray | None:
    """A value as an array of numpy; None where it is text, or nothing that numpy can read."""
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def require_bounds(bounds: object) -> tuple[float, float]:
    """The smallest and the largest value, two positive numbers.

    Raises:
        ValueError: If they are not, or if JAX's type of floating-point numbers cannot hold them.
    """
    pair = as_numpy(bounds)
    fits = pair is not None and pair.shape == (2,) and pair.dtype.kind in "iuf"
    if pair is not None and fits:
        fits = 0 < float(pair[0]) < float(pair[1]) < float("inf")
    if not fits:
        msg = f"`bounds` must be two positive numbers, smaller first; found {shown(bounds)}."
        raise ValueError(msg)
    assert pair is not None
    require_positive("bounds", pair)
    return float(pair[0]), float(pair[1])


# -- words -------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """A value as errors show it: short, and arrays by what they are where they are long."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced value of type {value.aval}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        short = math.prod(value.shape) <= 4 and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
        what = f"an array of {value.dtype} of shape {tuple(value.shape)}"
        return f"{np.asarray(value).tolist()} ({what})" if short else what
    text = repr(value) if isinstance(value, str | bytes | int | float | complex) else ""
    if value is None or (isinstance(value, tuple | list | dict) and len(repr(value)) <= 80):
        text = repr(value)
    return text[:80] or f"a {type(value).__name__}"


def listed(names: Iterable[object]) -> str:
    """Names in one line, not more than a person reads."""
    all_names = [str(name) for name in names]
    rest = len(all_names) - SHOWN
    text = ", ".join(map(repr, all_names[:SHOWN]))
    return f"{text} and {rest} more" if rest > 0 else text or "none"


def nearest(value: object, names: Iterable[str]) -> str:
    """A sentence with the name that is nearest to a value; nothing where none is near."""
    near = difflib.get_close_matches(str(value), list(names), 1)
    return f" Did you mean {near[0]!r}?" if near else ""
