"""Batches of data: one batch or a loader of many, in one form and padded to one size."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

Batch = dict[str, PyTree]
WeightedBatch = tuple[Batch, Float[Array, " size"]]


def as_batch(batch: Any) -> Batch:
    """One batch in laplax's form.

    Args:
        batch: ``(input, target)``, or a mapping with the keys ``"input"`` and ``"target"``.

    Raises:
        ValueError: If a tuple has not two entries, or a mapping lacks a key.
        TypeError: If it is neither.
    """
    if isinstance(batch, Mapping):
        if "input" not in batch or "target" not in batch:
            msg = f"A batch needs the keys 'input' and 'target', found {sorted(map(str, batch))}."
            raise ValueError(msg)
        return {"input": batch["input"], "target": batch["target"]}
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            msg = (
                f"A batch must be (input, target), found a {type(batch).__name__} of {len(batch)}."
            )
            raise ValueError(msg)
        return {"input": batch[0], "target": batch[1]}
    msg = (
        f"A batch must be a tuple (input, target) or a mapping with 'input' and 'target', found "
        f"{type(batch).__name__}. `data` is one such batch, or an iterable of them."
    )
    raise TypeError(msg)


def batches(data: Any, transform: Callable[[Any], Any] | None = None) -> Iterator[Batch]:
    """The batches of ``data``: itself if it is a tuple or a mapping, else what it iterates over.

    Args:
        data: One batch (tuple or mapping), or an iterable of batches, such as a list or a loader.
        transform: Applied to every batch first, to bring it to one of these forms.

    Raises:
        TypeError: If ``data`` is neither.
        ValueError: If a loader is empty, or a batch is of no known form.
    """
    convert = (lambda b: as_batch(transform(b))) if transform else as_batch
    if isinstance(data, tuple | Mapping):
        yield convert(data)
        return
    if not isinstance(data, Iterable) or hasattr(data, "shape"):
        msg = (
            f"`data` must be a batch (a tuple (input, target) or a mapping) or an iterable of "
            f"batches, found {type(data).__name__}."
        )
        raise TypeError(msg)
    empty = True
    for batch in data:
        empty = False
        yield convert(batch)
    if empty:
        msg = (
            "`data` has no batches. A generator can be iterated only once: pass a list of batches "
            "or a loader that starts anew with every iteration."
        )
        raise ValueError(msg)


def to_arrays(batch: Batch) -> Batch:
    """Leaves as arrays; foreign ones (torch tensors) through numpy."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), batch)


def batch_size(batch: Batch) -> int:
    """Number of examples.

    Raises:
        ValueError: If the leaves disagree about it, or it is zero.
    """
    sizes = {name: {np.shape(x)[:1] for x in jax.tree.leaves(part)} for name, part in batch.items()}
    found = set().union(*sizes.values())
    if len(found) != 1 or () in found:
        msg = f"All arrays of a batch need the same leading axis, found leading axes {sizes}."
        raise ValueError(msg)
    ((size,),) = found
    if size == 0:
        msg = "A batch has no examples: its arrays have a leading axis of length 0."
        raise ValueError(msg)
    return int(size)


def positive_integer(name: str, value: Any) -> int:
    """The value, if it is a positive integer.

    Raises:
        ValueError: If it is not.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        msg = f"`{name}` must be a positive integer, found {value!r}."
        raise ValueError(msg)
    return number


def pad(batch: Batch, size: int) -> WeightedBatch:
    """Repeat the last example up to ``size``; weights are 1 for real examples and 0 for repeats.

    Padding with an example keeps every value in the model's domain, and one size for all batches
    means one compilation.
    """
    missing = size - batch_size(batch)

    def longer(x: Any) -> Any:
        repeat = np.concatenate if isinstance(x, np.ndarray) else jnp.concatenate
        return repeat([x, *[x[-1:]] * missing]) if missing else x

    weights = np.ones(size, np.float32)
    weights[size - missing :] = 0.0
    return jax.tree.map(longer, batch), jnp.asarray(weights)


def even_batches(stream: Iterable[Batch], most: int) -> Iterator[WeightedBatch]:
    """Split batches into parts of one size, at most ``most``, padded; with weights (see `pad`).

    The first batch decides the size: it is split evenly, so that padding stays small.
    """
    size = 0
    for batch in stream:
        arrays = to_arrays(batch)
        count = batch_size(arrays)
        if not size:
            size = math.ceil(count / math.ceil(count / most))
        for start in range(0, count, size):
            here = slice(start, start + size)
            yield pad(jax.tree.map(operator.itemgetter(here), arrays), size)


def first_example(batch: Batch) -> PyTree:
    """Shapes and dtypes of one input, without the batch axis."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], jax.dtypes.canonicalize_dtype(x.dtype)),
        batch["input"],
    )
