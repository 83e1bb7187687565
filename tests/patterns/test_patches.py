"""Entries of patches and their second moments, against patches that are cut out one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.images import CASES, cut_out, images
from support.machines import tune_machine

from laplax_kfac.patterns import patches
from laplax_kfac.patterns.patches import Axis

pytestmark = pytest.mark.usefixtures("x64")

CHEAP = [name for name, axes in CASES.items() if patches.has_cheap_moment(axes)]


@pytest.mark.parametrize("name", CASES)
def test_patches_are_cut_out(name):
    axes = CASES[name]
    x, _ = images(axes)
    expected = cut_out(axes, x)
    assert np.any(expected)
    found = patches.extract(axes, jnp.asarray(x))
    assert found.shape[1:-1] == tuple(axis.positions for axis in axes)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("way", ["patches in rows", "in chunks", "whole rows"])
@pytest.mark.parametrize("name", CHEAP)
def test_second_moments_are_those_of_all_patches(name, way, monkeypatch):
    """However they are formed; the derivative is there at a weight of zero, too."""
    axes = CASES[name]
    whole = way == "whole rows"
    monkeypatch.setattr(patches, "_whole_rows_are_cheaper", lambda *_: whole)
    tune_machine(monkeypatch, cached_bytes=2**20 if way != "in chunks" else 1)
    x, weights = images(axes, 13)
    cut = cut_out(axes, x)

    @jax.jit
    def both(x, weights):
        function = lambda *args: patches.second_moment(axes, *args)  # noqa: E731
        # By the derivative in the weights; the moment is linear in them.
        return function(x, weights), jax.jvp(lambda w: function(x, w), (weights,), (weights,))[1]

    expected = np.einsum("n,nsp,nsq->pq", weights, cut, cut)
    for found in both(jnp.asarray(x), jnp.asarray(weights)):
        np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())


def test_moments_are_cheap_where_patches_overlap():
    assert set(CASES) - set(CHEAP) == {"line_of_many", "tiles", "one_entry", "one_patch"}
    assert not patches.has_cheap_moment(())
    assert patches.has_cheap_moment((Axis(32, 3, padding=(1, 1)), Axis(32, 3, padding=(1, 1))))
    assert not patches.has_cheap_moment((Axis(500, 30),))  # more products than are compiled


def test_whole_rows_are_chosen_for_few_channels():
    same = (Axis(28, 5, padding=(2, 2)),) * 2
    assert patches._whole_rows_are_cheaper(same, (64, 28, 28, 1))
    assert not patches._whole_rows_are_cheaper(same, (64, 28, 28, 64))


def test_an_image_of_which_a_part_is_unused():
    """Rows whose products no pair of a patch needs, and pairs that meet no row."""
    axes = (Axis(9, 2, stride=3, padding=(-1, 0)), Axis(3, 2))
    x, weights = images(axes)
    cut = cut_out(axes, x)
    found = patches.second_moment(axes, jnp.asarray(x), jnp.asarray(weights))
    np.testing.assert_allclose(found, np.einsum("n,nsp,nsq->pq", weights, cut, cut), atol=1e-12)
