"""Frozen dataclasses as pytrees."""

from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar

import jax

from laplax_kfac import summaries

Record = TypeVar("Record")


def register(cls: type[Record]) -> type[Record]:
    """Register a frozen dataclass as a pytree, with fields of ``metadata={"static": True}`` static.

    Unlike `jax.tree_util.register_dataclass`, putting a tree together again does not run
    ``__init__``: JAX does that with leaves that are no arrays, such as shapes and axes, while
    annotations are of the arrays that we make records of. The class prints a summary of itself.
    """
    data = [f.name for f in fields(cls) if not f.metadata.get("static")]  # type: ignore[arg-type]
    static = [f.name for f in fields(cls) if f.metadata.get("static")]  # type: ignore[arg-type]
    keys = [jax.tree_util.GetAttrKey(name) for name in data]

    def flatten(record: Record) -> tuple[list[object], tuple[object, ...]]:
        values = vars(record)
        return [values[name] for name in data], tuple(values[name] for name in static)

    def flatten_with_keys(record: Record) -> tuple[list[tuple[object, object]], tuple[object, ...]]:
        children, meta = flatten(record)
        return list(zip(keys, children, strict=True)), meta

    def unflatten(meta: tuple[object, ...], children: Iterable[object]) -> Record:
        record = object.__new__(cls)
        vars(record).update(zip(data, children, strict=True))
        vars(record).update(zip(static, meta, strict=True))
        return record

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return summaries.summarised(cls)
