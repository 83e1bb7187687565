"""Uses become matrices of distinct parameters, with factors of rank one."""

import numpy as np
import pytest

from laplax_kfac.parsing.claims import constant_along, parts_of, rank_one, take_first


def test_a_scale_of_rank_one_is_factored():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 3)), rng.normal(size=(2, 4))
    scale = u[:, :, None] * v[:, None, :]
    factors = rank_one(scale)
    assert factors is not None
    rows, columns = factors
    assert columns is not None
    np.testing.assert_allclose(rows[:, :, None] * columns[:, None, :], scale)
    scale[1, 0, 0] += 0.1
    assert rank_one(scale) is None


def test_a_scale_of_the_inputs_alone_has_none_of_the_outputs():
    rows, columns = rank_one(np.asarray([[[2.0, 2.0], [0.0, 0.0]]])) or (None, None)
    np.testing.assert_array_equal(rows, [[2.0, 0.0]])
    assert columns is None


PADDED = np.full((1, 4, 5), -1)
PADDED[0, 1:3, 2:] = np.arange(6).reshape(2, 3)
BLOCKS = np.full((1, 4, 5), -1)
BLOCKS[0, :2, :3], BLOCKS[0, 2:, 3:] = np.arange(6).reshape(2, 3), np.arange(6, 10).reshape(2, 2)
OVERLAPPING = BLOCKS.copy()
OVERLAPPING[0, 0, 4] = 10


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.arange(20).reshape(1, 4, 5), None),
        (PADDED, [([1, 2], [2, 3, 4])]),
        (BLOCKS, [([2, 3], [3, 4]), ([0, 1], [0, 1, 2])]),
        (OVERLAPPING, None),
        (np.stack([PADDED, np.roll(PADDED, 1, axis=1)]), None),  # elsewhere in another iteration
    ],
    ids=["whole", "padded", "blocks", "overlapping", "scanned"],
)
def test_parts_of_a_weight_among_constants(ids, expected):
    found = [None if p is None else tuple(a.tolist() for a in p) for p in parts_of(ids)]
    assert found == ([None] if expected is None else expected)


def test_shared_axes_are_dropped_and_others_merged():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 1, 3, 4, 5)
    np.testing.assert_array_equal(take_first(x, (False, True, False)), x[:, 0].reshape(6, 4, 5))
    assert constant_along(np.broadcast_to(x[:, :, :1], x.shape), 2)
    assert not constant_along(x, 2)
