"""What is kept for later calls: explicit, bounded, and cleared by one function."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")

_CACHES: "weakref.WeakSet[Cache[Any]]" = weakref.WeakSet()
"""Every cache that there is."""


class Cache(Generic[Made]):
    """Things that are made once for each key; those that were asked for last are kept.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._made: OrderedDict[Hashable, Made] = OrderedDict()
        _CACHES.add(self)

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made for an equal key before; made now if there is no such thing."""
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        made = self._made[key] = make()
        while len(self._made) > self.most:
            self._made.popitem(last=False)
        return made

    def values(self) -> list[Made]:
        """All that is kept."""
        return list(self._made.values())

    def clear(self) -> None:
        """Forget everything."""
        self._made.clear()

    def __len__(self) -> int:
        return len(self._made)


def clear_caches() -> None:
    """Forget everything that was compiled or worked out for earlier calls.

    Nothing depends on it but time and memory: what is needed again is made anew. Programs that JAX
    has compiled are JAX's own to forget (``jax.clear_caches()``).
    """
    for cache in list(_CACHES):
        cache.clear()
