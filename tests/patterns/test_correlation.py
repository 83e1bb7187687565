"""Second moments of patches by correlation, against patches that are cut out one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.images import CASES, cut_out, images
from support.machines import tune_machine

import laplax_kfac
from laplax_kfac.curvature import passes
from laplax_kfac.gram import whole
from laplax_kfac.patterns import correlation
from laplax_kfac.patterns.patches import Axis

pytestmark = pytest.mark.usefixtures("x64")

SAME = (Axis(8, 3, padding=(1, 1)),) * 2
MORE = {
    "same_of_five": (Axis(6, 5, padding=(2, 2)), Axis(7, 5, padding=(2, 2))),
    "strided_same": (Axis(8, 3, stride=2, padding=(0, 1)), Axis(7, 3, stride=2, padding=(1, 1))),
    "part_is_unused": (Axis(9, 2, stride=3, padding=(-1, 0)), Axis(3, 2)),
    "fewer_patches_than_places": (Axis(4, 3), Axis(5, 4)),
}
PLAIN = {
    name: axes
    for name, axes in (CASES | MORE).items()
    if all(axis.spread == axis.dilation == 1 for axis in axes) and name != "line_of_many"
}


@pytest.mark.parametrize("name", PLAIN)
def test_moments_are_those_of_all_patches(name, monkeypatch):
    """Of all images at once and in chunks; the derivative is there at a weight of zero, too."""
    axes = PLAIN[name]
    x, weights = images(axes, 13)
    cut = cut_out(axes, x)
    expected = np.einsum("n,nsp,nsq->pq", weights, cut, cut)

    @jax.jit
    def both(x, weights):
        moment = lambda *args: whole(correlation.second_moment(axes, *args))  # noqa: E731
        at_once, tangent = jax.jvp(functools.partial(moment, x), (weights,), (weights,))
        tune_machine(monkeypatch, cached_bytes=2000)
        return at_once, tangent, moment(x, weights)

    for found in both(jnp.asarray(x), jnp.asarray(weights)):
        np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())


def test_tiles_are_put_together_in_the_same_way_outside_of_jit():
    x, weights = images(SAME, 3)
    tiles = correlation.second_moment(SAME, jnp.asarray(x), jnp.asarray(weights))
    found, expected = whole(tiles), jax.jit(whole)(tiles)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(found, found.T)


def test_where_it_is_cheaper():
    assert correlation.is_cheaper(SAME, (8, 8, 8, 16))
    assert not correlation.is_cheaper(SAME, (7, 8, 8, 16))
    assert not correlation.is_cheaper(SAME, (8, 8, 8, 15))
    for axis in (Axis(8, 3, dilation=2), Axis(8, 3, spread=2), Axis(2, 3), Axis(40, 33)):
        assert not correlation.is_cheaper((axis,), (8, 8, 16))
    small = (Axis(4, 3, padding=(1, 1)),) * 2
    assert not correlation.is_cheaper(small, (8, 4, 4, 16))
    with jax.enable_x64(False):
        assert correlation.is_cheaper(small, (8, 4, 4, 16))
    # Too many edges, more work than by rows.
    assert not correlation.is_cheaper((Axis(28, 5),) * 2, (8, 28, 28, 16))
    assert not correlation.is_cheaper((Axis(3, 3), Axis(4, 4)), (8, 3, 4, 16))


def convolved(input, params):
    y = lax.conv_general_dilated(
        input[None], params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sum(jnp.tanh(y[0] + params["b"]), axis=(0, 1))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA does these well")
def test_images_of_several_sizes_share_a_layer(monkeypatch):
    """Where their sums have other forms, these are added whole."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 3, 16, 2)), "b": rng.normal(size=2)}
    batches = [
        {"input": rng.normal(size=(8, size, size, 16)), "target": rng.normal(size=(8, 2))}
        for size in (8, 9, 2, 8)
    ]
    accumulator = laplax_kfac.accumulator(convolved, params, loss_fn="mse")
    forms: list[bool] = []
    have_one_form = passes.have_one_form

    def noted(*states):
        forms.append(have_one_form(*states))
        return forms[-1]

    monkeypatch.setattr(passes, "have_one_form", noted)
    found: Any = accumulator.collect((batch, jnp.ones(8)) for batch in batches)
    assert forms == [
        True,
        True,
        False,
        False,
    ]  # few patches are formed; from then on sums are whole
    expected = accumulator.init()
    for batch in batches:
        expected = accumulator.update(expected, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), found, expected)

    axes = [tuple(Axis(n, 3, padding=(1, 1)) for n in b["input"].shape[1:3]) for b in batches]
    total = sum(
        np.einsum("nsp,nsq->pq", *[cut_out(a, b["input"])] * 2)
        for a, b in zip(axes, batches, strict=True)
    )
    np.testing.assert_allclose(found.sums[0].inputs[0, 0, :-1, :-1], total, rtol=1e-9)
