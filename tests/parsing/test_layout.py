"""Segments describe ids compactly and exactly; parameters are read and written through them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Contiguous, Scattered, Segment, make_segment

PARAMS = {
    "a": jnp.zeros((2, 3)),
    "b": jnp.zeros(()),
    "c": jnp.zeros((0, 4)),
    "d": jnp.zeros((4, 2)),
}


def numbered_leaves(space):
    """Leaves whose entries are their own ids."""
    return [jnp.asarray(space.leaf_ids(k), float) for k in range(len(space.shapes))]


# -- segments ----------------------------------------------------------------------------------

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


# -- reading and writing -----------------------------------------------------------------------

PLACES = {
    "a_whole_leaf": np.arange(6).reshape(1, 2, 3),
    "a_transposed_leaf": np.arange(7, 15).reshape(4, 2).T[None],
    "a_leaf_with_its_axes_cycled": np.arange(7, 15).reshape(2, 2, 2).transpose(1, 2, 0),
    "a_part_of_a_leaf": np.arange(9, 13).reshape(2, 2),
    "a_scalar": np.array([6]),
    "scattered_in_a_leaf": np.array([14, 7, 10]),
    "two_leaves_in_order": np.arange(4, 10),
    "two_leaves_mixed": np.array([[13, 2], [0, 8], [6, 5]]),
    "nothing": np.zeros((1, 0, 2), int),
}


@pytest.mark.parametrize("ids", PLACES.values(), ids=PLACES.keys())
def test_a_segment_is_read_and_written(ids):
    space = ParameterSpace.of(PARAMS)
    segment = make_segment(ids)
    leaves = numbered_leaves(space)
    np.testing.assert_array_equal(space.read(segment, leaves), ids)
    values = jnp.asarray(100.0 + ids)
    written = space.write([(segment, values)])
    expected = np.zeros(space.size)
    expected[ids.ravel()] = 100.0 + ids.ravel()
    assert [leaf.shape for leaf in written] == list(space.shapes)
    np.testing.assert_array_equal(space.ravel(written), expected)


def test_segments_that_share_leaves_are_written_together():
    space = ParameterSpace.of(PARAMS)
    rng = np.random.default_rng(1)
    order = rng.permutation(space.size)
    parts = [order[:4].reshape(2, 2), order[4:5], order[5:11], order[11:]]
    pieces = [(make_segment(p), jnp.asarray(p, float)) for p in parts]
    written = space.ravel(space.write(pieces))
    np.testing.assert_array_equal(written, np.arange(space.size))


def test_reading_and_writing_work_under_transformations():
    space = ParameterSpace.of(PARAMS)
    segment = make_segment(PLACES["two_leaves_mixed"])
    leaves = numbered_leaves(space)

    @jax.jit
    @jax.vmap
    def scaled(factor):
        return space.write([(segment, factor * space.read(segment, leaves))])

    written = scaled(jnp.asarray([1.0, 2.0]))
    expected = np.zeros(space.size)
    inside = space.ids(segment).ravel()
    expected[inside] = 2.0 * inside
    np.testing.assert_array_equal(np.concatenate([w[1].ravel() for w in written]), expected)


@pytest.mark.usefixtures("x64")
def test_written_leaves_have_the_dtype_of_the_values():
    space = ParameterSpace.of({"w": jnp.zeros((2, 2)), "v": jnp.zeros(3)})
    for ids in (np.arange(3, 7), np.array([3, 5])):
        written = space.write([(make_segment(ids), jnp.ones(ids.shape, jnp.float64))])
        assert written[1].dtype == jnp.float64


# -- parameter spaces --------------------------------------------------------------------------


def test_a_space_is_the_structure_of_the_parameters():
    space = ParameterSpace.of(PARAMS)
    assert space.shapes == ((2, 3), (), (0, 4), (4, 2))
    assert space.offsets == (0, 6, 7, 7, 15)
    assert space.size == 15
    assert space.paths == ("['a']", "['b']", "['c']", "['d']")
    assert space.names == ("a", "b", "c", "d")
    assert [space.leaf_at(k) for k in (0, 5, 6, 7, 14)] == [0, 0, 1, 3, 3]
    assert space.leaves_of(np.array([14, 6, 14])) == [1, 3]
    np.testing.assert_array_equal(space.leaf_ids(3), np.arange(7, 15).reshape(4, 2))


def test_flat_vectors_are_in_the_order_of_laplax():
    space = ParameterSpace.of(PARAMS)
    vector = jnp.arange(15.0)
    leaves = space.unravel(vector)
    np.testing.assert_array_equal(leaves[0], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(leaves[1], 6)
    np.testing.assert_array_equal(leaves[3], np.arange(7, 15).reshape(4, 2))
    np.testing.assert_array_equal(space.ravel(leaves), vector)
    tree = space.unflatten(leaves)
    assert tree.keys() == PARAMS.keys()
    np.testing.assert_array_equal(space.ravel(space.flatten(tree)), ravel_pytree(tree)[0])


def test_names_are_paths_as_people_write_them():
    tree = {"net": [{"kernel": jnp.zeros(1)}, (jnp.zeros(1),)], "out/w": jnp.zeros(1)}
    assert ParameterSpace.of(tree).names == ("net/0/kernel", "net/1/0", "out/w")
    assert ParameterSpace.of(jnp.zeros(2)).names == ("params",)


def test_equal_spaces_are_equal_and_hashable():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert ParameterSpace.of(PARAMS) == ParameterSpace.of(shapes)
    assert hash(ParameterSpace.of(PARAMS)) == hash(ParameterSpace.of(shapes))
    assert ParameterSpace.of(PARAMS) != ParameterSpace.of({**PARAMS, "b": jnp.zeros(1)})


@pytest.mark.parametrize("params", [{}, [], None, {"a": None}])
def test_no_parameters_are_an_error(params):
    with pytest.raises(ValueError, match="`params` has no leaves; pass the pytree"):
        ParameterSpace.of(params)


@pytest.mark.parametrize(("leaf", "kind"), [(1.5, "float"), ("relu", "str"), (jnp.tanh, "")])
def test_leaves_that_are_no_arrays_are_an_error(leaf, kind):
    with pytest.raises(TypeError, match=rf"found {kind}.* at \['lin'\]\['rate'\]; convert it"):
        ParameterSpace.of({"lin": {"w": jnp.zeros(2), "rate": leaf}})


def test_another_tree_than_the_parameters_is_an_error():
    space = ParameterSpace.of({"w": jnp.zeros((2, 3))})
    for other in ({"v": jnp.zeros((2, 3))}, {"w": jnp.zeros((3, 2))}, jnp.zeros((2, 3))):
        with pytest.raises(ValueError, match="`tangent` must be a pytree with the structure and"):
            space.flatten(other, name="tangent")


def test_a_segment_knows_its_first_id():
    assert Segment((2,), Contiguous(4, (2,), (0,))).first == 4
    assert make_segment(np.array([9, 3])).first == 3
