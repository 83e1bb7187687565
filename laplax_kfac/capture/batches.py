"""Batches of data: one batch or a loader of many, in one form and padded to one size.

Examples may have weights: one of weight w counts as w equal examples do.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import no_type_check, require_callable, require_weights, shown
from laplax_kfac.capture.left_out import without_left_out
from laplax_kfac.capture.shards import Shards
from laplax_kfac.meshes import automatic

Batch = dict[str, PyTree]
Transform = Callable[[Any], object]
"""Brings whatever a loader yields to one of the forms of a batch."""
WeightedBatch = tuple[Batch, Float[Array, " size"]]


OTHER_NAMES_OF_WEIGHTS = ("weights", "sample_weight", "sample_weights")


def as_batch(batch: object, name: str = "data") -> Batch:
    """One batch in laplax's form.

    Weights of examples come by their key alone: the third entry of a tuple may be anything, such as
    the number of an example, a group, or a second input.

    Args:
        batch: ``(input, target)``, or a mapping with the keys ``"input"`` and ``"target"``, and
            ``"weight"`` if examples have weights: an array (N,) of numbers that are not negative.
            Other keys play no part.
        name: The argument that it comes from, for errors.

    Returns:
        Input and target, and the weight where there is one.

    Raises:
        ValueError: If a tuple has not two entries, or a mapping lacks a key, or the weight is no
            such array.
        TypeError: If it is neither.
    """
    if isinstance(batch, Mapping):
        return _of_mapping(batch, name)
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return _of_mapping({"input": batch[0], "target": batch[1]}, name)
        msg = (
            f"A batch of `{name}` must be (input, target), found a {type(batch).__name__} of "
            f"{len(batch)}."
        )
        if len(batch) > 2:
            msg += (
                " What else there is plays no part, and is not taken for weights: leave it out, by "
                "`transform=lambda batch: batch[:2]` where a loader yields it. Several inputs are "
                "one pytree: ((t, x), u). Weights of examples come by their key: "
                '{"input": x, "target": y, "weight": w}.'
            )
        raise ValueError(msg)
    msg = (
        f"A batch of `{name}` must be a tuple (input, target) or a mapping with 'input' and "
        f"'target', found {type(batch).__name__}. `data` is one such batch, or an iterable of them."
    )
    raise TypeError(msg)


def _of_mapping(batch: Mapping[Any, Any], name: str) -> Batch:
    if "input" not in batch or "target" not in batch:
        msg = (
            f"A batch of `{name}` needs the keys 'input' and 'target', found "
            f"{sorted(map(str, batch))}."
        )
        raise ValueError(msg)
    for other in OTHER_NAMES_OF_WEIGHTS:
        if other in batch:
            msg = (
                f"A batch of `{name}` has the key {other!r}: weights of examples have the key "
                "'weight', and a weight for every loss term belongs to "
                "`laplax_kfac.likelihood.weighted`."
            )
            raise ValueError(msg)
    parts = {"input": batch["input"], "target": batch["target"]}
    for part, values in parts.items():
        if values is None:
            msg = (
                f"The {part} of a batch of `{name}` is None: a batch is (input, target), of arrays."
            )
            raise ValueError(msg)
    weight = batch.get("weight")
    if weight is None:
        return parts
    if isinstance(weight, Mapping | tuple | list) or len(np.shape(weight)) != 1:
        shape = "" if isinstance(weight, Mapping | tuple | list) else f" of {np.shape(weight)}"
        msg = (
            f"The weight of a batch of `{name}` must be an array of shape (N,), one number an "
            f"example; found {type(weight).__name__}{shape}."
        )
        raise ValueError(msg)
    require_weights(f"the key 'weight' of `{name}`", weight)
    return {**parts, "weight": weight}


@no_type_check
def weighted_batch(batch: Batch, weights: ArrayLike | None = None) -> WeightedBatch:
    """Split a batch into its examples and what each counts.

    Args:
        batch: A batch of arrays, in the form of `as_batch`.
        weights: Further factors, of shape (N,); 1 by default.

    Raises:
        ValueError: If the arrays, or ``weights``, disagree about the number of examples.
        TypeError: If it is no such batch.
    """
    if not isinstance(batch, Mapping):
        msg = (
            "`data` must be batches with their weights here, as `Accumulator.parts` makes them of "
            f"batches; found {shown(batch)} as a batch."
        )
        raise TypeError(msg)
    counts = _counts(batch)
    if weights is None:
        return _examples(batch), jnp.asarray(counts)
    if np.shape(weights) != counts.shape:
        msg = (
            f"`weights` must have shape {counts.shape}, one number for every example of the batch; "
            f"found {np.shape(weights)}."
        )
        raise ValueError(msg)
    weights = jnp.asarray(weights, counts.dtype)
    return _examples(batch), weights * counts if "weight" in batch else weights


def _examples(batch: Batch) -> Batch:
    return {name: part for name, part in batch.items() if name != "weight"}


def _counts(batch: Batch) -> Array | np.ndarray:
    """What each example counts; a numpy array unless the batch has weights in JAX."""
    size, dtype = batch_size(batch), jnp.result_type(float)
    return batch["weight"].astype(dtype) if "weight" in batch else np.ones(size, dtype)


def require_transform(transform: object) -> None:
    """Refuse a transform of batches that is no function; None is none at all.

    Raises:
        TypeError: If it is not.
    """
    if transform is not None:
        require_callable("transform", transform, "a function of one batch")


def batches(data: object, transform: Transform | None = None) -> Iterator[Batch]:
    """The batches of ``data``: itself if it is a tuple or a mapping, else what it iterates over.

    Args:
        data: One batch (tuple or mapping), or an iterable of batches: a list, a loader of torch or
            grain, a ``tf.data.Dataset``, an iterator.
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
            "`data` must be a batch (a tuple (input, target) or a mapping) or an iterable of "
            f"batches, found {type(data).__name__}."
        )
        raise TypeError(msg)
    empty = True
    as_numpy = getattr(data, "as_numpy_iterator", None)  # of a tf.data.Dataset
    for batch in data if as_numpy is None else as_numpy():
        empty = False
        yield convert(batch)
    if empty:
        msg = (
            "`data` has no batches. A generator can be iterated only once: pass a list of batches "
            "or a loader that starts anew with every iteration."
        )
        raise ValueError(msg)


@no_type_check
def require_several_passes(data: object, purpose: str) -> None:
    """Refuse, before it is touched, data that can be iterated over only once.

    Args:
        data: One batch, or an iterable of batches.
        purpose: What needs the passes.

    Raises:
        TypeError: If ``data`` is an iterator or a generator.
    """
    if isinstance(data, Iterator):
        msg = (
            f"{purpose} goes through `data` more than once, but a {type(data).__name__} is an "
            "iterator, which ends after one pass. Pass a list of batches, or a loader of which "
            "`iter(data)` starts anew and which is no iterator itself (it has no `__next__`)."
        )
        raise TypeError(msg)


def same_number(stream: Iterable[Batch], earlier: list[int]) -> Iterator[Batch]:
    """The batches of one pass, if it has as many examples as the passes before it.

    Args:
        stream: The batches.
        earlier: Numbers of examples of the passes so far; that of this one is appended.

    Raises:
        ValueError: At the end, if the number differs from that of the first pass.
    """
    count = 0
    for batch in stream:
        count += batch_size(batch)
        yield batch
    earlier.append(count)
    if count != earlier[0]:
        msg = (
            f"`data` had {earlier[0]} examples in the first pass and {count} in pass "
            f"{len(earlier)}: pass a loader that goes through the same examples every time."
        )
        raise ValueError(msg)


def to_arrays(batch: Batch, name: str = "data") -> Batch:
    """Leaves as arrays, with automatic axes; foreign ones (tensors of torch ...) through numpy.

    Args:
        batch: The batch.
        name: The argument that it comes from, for errors.

    Raises:
        TypeError: If numpy cannot read a leaf as numbers.
    """
    return jax.tree.map(lambda x: _as_array(x, name), batch)


def _as_array(x: object, name: str) -> Array | np.ndarray:
    if isinstance(x, jax.Array):
        return automatic(x)
    reason = "it is not made of numbers"
    try:
        array = np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error)
    else:
        if array.dtype.kind not in "OUSMm":
            return array
    msg = (
        f"`{name}` holds {shown(x)}, which numpy cannot read as numbers ({reason}); convert it by "
        "`transform`, or in the loader."
    )
    raise TypeError(msg)


def batch_size(batch: Batch, name: str = "data") -> int:
    """Number of examples.

    Args:
        batch: The batch.
        name: The argument that it comes from, for errors.

    Raises:
        ValueError: If the leaves disagree about it, or it is zero.
    """
    sizes = {name: {np.shape(x)[:1] for x in jax.tree.leaves(part)} for name, part in batch.items()}
    found = set().union(*sizes.values())
    if len(found) != 1 or () in found:
        msg = (
            f"All arrays of a batch need the same leading axis, found leading axes {sizes}: every "
            f"array of `{name}` has an entry for each example."
        )
        raise ValueError(msg)
    ((size,),) = found
    if size == 0:
        msg = f"A batch has no examples: arrays of `{name}` have a leading axis of length 0."
        raise ValueError(msg)
    return int(size)


def pad(batch: Batch, size: int) -> WeightedBatch:
    """Repeat the last example up to ``size``; repeats have weight 0, others their own or 1.

    Padding with an example keeps every value in the model's domain, and one size for all batches
    means one compilation.
    """
    missing = size - batch_size(batch)
    examples, counts = _examples(batch), _counts(batch)
    if not missing:
        return examples, jnp.asarray(counts)

    def longer(x: Array | np.ndarray, end: Array | np.ndarray) -> Array | np.ndarray:
        join = np.concatenate if isinstance(x, np.ndarray) else jnp.concatenate
        return join([x, *[end] * missing])

    repeated = jax.tree.map(lambda x: longer(x, x[-1:]), examples)
    return repeated, jnp.asarray(longer(counts, np.zeros(1, counts.dtype)))


def even_batches(stream: Iterable[Batch], most: int) -> Iterator[WeightedBatch]:
    """Split batches into parts of one size, at most ``most``, padded; with weights (see `pad`).

    The first batch decides the size: it is split evenly, so that padding stays small.
    """
    size = 0
    for batch in stream:
        arrays = to_arrays(batch)
        count = batch_size(arrays)
        arrays |= without_left_out(_examples(arrays), arrays.get("weight"))
        shards = Shards.of(_examples(arrays))
        if not size:
            devices = shards.count if shards else 1
            size = math.ceil(count / math.ceil(count / most))
            size = devices * math.ceil(size / devices)  # the same number for each
        if count == size:
            yield pad(arrays, size)
            continue
        for start in range(0, count, size):
            here = slice(start, start + size)
            examples, counts = pad(jax.tree.map(operator.itemgetter(here), arrays), size)
            yield jax.tree.map(shards.place, examples) if shards else examples, counts


def first_example(batch: Batch, part: str = "input") -> PyTree:
    """Shapes and dtypes of one input, or target, without the batch axis."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], jax.dtypes.canonicalize_dtype(x.dtype)),
        batch[part],
    )
