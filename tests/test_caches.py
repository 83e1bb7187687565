"""What is kept for later calls is bounded, the oldest goes first, and all can be forgotten."""

import gc
import itertools
import weakref
from typing import Any

import pytest

from laplax_kfac import clear_caches
from laplax_kfac.caches import Cache


def test_a_thing_is_made_once_for_equal_keys():
    cache: Cache[int] = Cache(2)
    numbers = itertools.count()
    found = [cache.get(key, lambda: next(numbers)) for key in ((1, "a"), (1, "a"), (2, "a"))]
    assert found == [0, 0, 1]


def test_what_was_asked_for_last_is_kept():
    cache: Cache[Any] = Cache(2)
    for key in "ab":
        cache.get(key, key.upper)
    cache.get("a", list)  # now "b" is the oldest
    cache.get("c", list)
    assert len(cache) == 2
    assert cache.get("a", list) == "A"
    assert cache.get("b", list) == []


def test_nothing_is_kept_of_a_failure():
    cache: Cache[Any] = Cache(2)

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.get("a", fail)
    assert len(cache) == 0
    assert cache.get("a", lambda: 1) == 1


def test_all_caches_are_cleared_and_none_is_kept_alive():
    one: Cache[Any] = Cache(1)
    other: Cache[Any] = Cache(3)
    for cache in (one, other):
        cache.get("a", list)
    clear_caches()
    assert len(one) == len(other) == 0
    alive = weakref.ref(one)
    del one, cache
    gc.collect()
    assert alive() is None
