"""Progress bars: silent unless a caller asked for them, whoever does the work.

A public function with `progress` says so once, by `showing`; what it calls, however deep, shows a
bar of its own work where that takes time. With a total wherever it is known, so that the time left
is known as well.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

Item = TypeVar("Item")
Values = TypeVar("Values")

_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)
"""Whether bars are shown."""


@contextlib.contextmanager
def showing(flag: bool) -> Iterator[None]:
    """Show bars inside, or none."""
    before = _SHOWN.set(bool(flag))
    try:
        yield
    finally:
        _SHOWN.reset(before)


def meter(description: str, unit: str, total: int | None) -> tqdm:
    """A bar that counts to a total, if bars are shown."""
    return tqdm(desc=description, unit=unit, total=total, disable=not _SHOWN.get())


def each(items: list[Item], description: str, unit: str) -> Iterator[Item]:
    """The items, one after another; the bar counts those that are done with."""
    with meter(description, unit, len(items)) as bar:
        for item in items:
            yield item
            bar.update()


def awaited(values: Values) -> Values:
    """Values as they are; when they are there, if bars are shown: else time would run ahead."""
    return jax.block_until_ready(values) if _SHOWN.get() else values


class BatchBar:
    """The bar of one pass over data, in batches as they are worked on.

    Data that tell how many batches they have, as one batch, a list and most loaders do, have a
    total: so many times as many as the first is split into.

    Args:
        data: What is gone through.
        description: What is done with it.
    """

    def __init__(self, data: object, description: str) -> None:
        self._bar = meter(description, "batch", None)
        self._batches: int | None = None
        if isinstance(data, tuple | Mapping):
            self._batches = 1
        elif isinstance(data, Sized):
            with contextlib.suppress(TypeError):  # of a dataset that cannot tell
                self._batches = len(data)
        self._count = 0

    def batches(self, stream: Iterable[PyTree]) -> Iterator[PyTree]:
        """The batches; the first is counted."""
        for batch in stream:
            if not self._count:
                self._count = np.shape(jax.tree.leaves(batch["input"])[0])[0]
            yield batch

    def parts(self, stream: Iterable[tuple[PyTree, Array]]) -> Iterator[tuple[PyTree, Array]]:
        """The parts that they are split into."""
        with self._bar as bar:
            for number, part in enumerate(stream):
                if number == 0:
                    size = len(part[1])
                    if self._batches is not None:
                        bar.total = self._batches * math.ceil(self._count / size)
                    bar.set_postfix_str(f"{size} examples each")
                yield part
                bar.update()
            if bar.total is not None:
                bar.total = bar.n  # the last batches may have been shorter
                bar.refresh()
