"""Segments describe ids compactly and exactly."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Contiguous, Scattered, Segment, make_segment

BASE = np.arange(5, 29)

REGULAR = {
    "range": BASE,
    "matrix": BASE.reshape(4, 6),
    "transposed": BASE.reshape(4, 6).T,
    "merged_after_transpose": BASE.reshape(2, 3, 4).transpose(2, 0, 1).reshape(4, 6),
    "split_and_merged": BASE.reshape(2, 3, 4).transpose(1, 2, 0).reshape(1, 12, 2),
    "axes_of_one": BASE.reshape(1, 24, 1),
    "one_entry": np.array([[[7]]]),
    **{
        f"permuted_{''.join(map(str, p))}": BASE.reshape(2, 3, 4).transpose(p)
        for p in itertools.permutations(range(3))
    },
}

IRREGULAR = {
    "reversed": BASE[::-1],
    "with_a_gap": np.array([0, 1, 2, 4]),
    "strided": np.array([[0, 2], [4, 6]]),
    "shuffled": np.random.default_rng(0).permutation(24).reshape(4, 6),
    "swapped_rows": BASE.reshape(4, 6)[[1, 0, 2, 3]],
    "uneven_blocks": np.array([0, 3, 4, 1, 2, 5]),
    "empty": np.zeros((0, 3), int),
}


@pytest.mark.parametrize("ids", REGULAR.values(), ids=REGULAR.keys())
def test_permuted_ranges_are_recognised(ids):
    segment = make_segment(ids)
    assert isinstance(segment.place, Contiguous)
    assert segment.shape == ids.shape
    assert segment.first == ids.min()
    assert segment.place.stop == ids.max() + 1
    space = ParameterSpace.of(jnp.zeros(40))
    np.testing.assert_array_equal(space.ids(segment), ids)


@pytest.mark.parametrize("ids", IRREGULAR.values(), ids=IRREGULAR.keys())
def test_other_ids_are_kept_as_they_are(ids):
    segment = make_segment(ids)
    assert isinstance(segment.place, Scattered)
    assert segment.shape == ids.shape
    np.testing.assert_array_equal(ParameterSpace.of(jnp.zeros(40)).ids(segment), ids)


def test_segments_are_equal_by_content():
    ids = np.array([3, 1, 2])
    one, other = make_segment(ids), make_segment(ids.copy())
    assert one == other
    assert hash(one) == hash(other)
    assert one != make_segment(np.array([3, 2, 1]))
    assert one != make_segment(ids[None])
    assert one.place != "ids"
    assert repr(one.place) == "Scattered(<3 ids>)"
    assert one.first == 1


def test_a_segment_knows_its_first_id():
    assert Segment((2,), Contiguous(4, (2,), (0,))).first == 4
    assert make_segment(np.array([9, 3])).first == 3
