"""Parameters are read and written through segments; a space is the structure of a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import make_segment

PARAMS = {
    "a": jnp.zeros((2, 3)),
    "b": jnp.zeros(()),
    "c": jnp.zeros((0, 4)),
    "d": jnp.zeros((4, 2)),
}


def numbered_leaves(space):
    """Leaves whose entries are their own ids."""
    return [jnp.asarray(space.leaf_ids(k), float) for k in range(len(space.shapes))]


BASE = np.arange(5, 29)
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
