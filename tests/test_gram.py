"""Symmetric matrices by tiles, alone and as the sums of wide layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal

import laplax_kfac
from laplax_kfac.gram import UpperTiles, self_product, upper_tiles, whole

pytestmark = pytest.mark.usefixtures("x64")

NARROW, WIDE, WIDEST = 40, 401, 1300


@pytest.mark.parametrize("width", [NARROW, 64, 256, WIDE, WIDEST])
def test_a_product_with_itself(width):
    x = normal(3, width)
    product = self_product(jnp.asarray(x))
    assert isinstance(product, UpperTiles) == (width >= WIDE)
    np.testing.assert_allclose(whole(product), x.T @ x, atol=1e-12)


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_the_upper_tiles_are_those_of_a_product(width):
    x = jnp.asarray(normal(3, width))
    shapes = jax.tree.map(jnp.shape, self_product(x))
    stack = jnp.stack([x.T @ x, 2 * x.T @ x])
    tiles = upper_tiles(stack)
    assert jax.tree.map(lambda tile: tile.shape[1:], tiles) == shapes
    np.testing.assert_array_equal(whole(tiles), stack)


def test_tiles_of_other_processors_are_whole_matrices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.asarray(normal(3, WIDE))
    assert isinstance(self_product(x), jax.Array)
    assert isinstance(upper_tiles(x.T @ x), jax.Array)


def wide(input, params):
    return jnp.tanh(input @ params["w"]) @ params["v"]


PARAMS = {"w": normal(4, WIDE, seed=1) / 10, "v": normal(WIDE, 2, seed=2) / 10}
DATA = normal(6, 4), normal(6, 2, seed=3)
WEIGHTS = np.asarray([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])


def factors_of(weights):
    """The factors of width `WIDE`: the inputs of ``v``, the cotangents at the outputs of ``w``."""
    hidden = jnp.tanh(DATA[0] @ PARAMS["w"])
    g = np.sqrt(2.0) * jnp.einsum("nh,hc->nch", 1 - hidden**2, PARAMS["v"])
    inputs = jnp.einsum("n,nh,nk->hk", weights, hidden, hidden)
    return inputs, jnp.einsum("n,nch,nck->hk", weights, g, g)


def wide_sums(state):
    by_name = dict(zip([ly.name for ly in state.layers], state.sums, strict=True))
    return by_name["v"].inputs[0, 0], by_name["w"].outputs[0, 0]


@pytest.fixture(scope="module")
def accumulator():
    return laplax_kfac.accumulator(wide, PARAMS, loss_fn="mse")


def test_sums_of_wide_layers(accumulator):
    """One batch at a time, with all entries; or all in place, by their upper tiles."""
    state = accumulator.update(accumulator.init(), DATA, WEIGHTS)
    weights = jnp.asarray(WEIGHTS)
    parts = [((x[:3], x[3:]) for x in DATA), (weights[:3], weights[3:])]
    batches = list(zip(*parts[0], strict=True))
    data = [
        ({"input": x, "target": y}, w) for (x, y), w in zip(batches, parts[1], strict=True)
    ]  # fmt: skip
    for found in (state, accumulator.collect(data)):
        assert found.num_examples == WEIGHTS.sum()
        for matrix, expected in zip(wide_sums(found), factors_of(WEIGHTS), strict=True):
            np.testing.assert_allclose(matrix, expected, atol=1e-12)


def test_a_derivative_in_the_weights_of_examples(accumulator):
    """At a weight of zero, too; in forward and in reverse mode."""
    directions = [normal(WIDE, WIDE, seed=4), normal(WIDE, WIDE, seed=5)]

    def along(matrices):
        return sum(jnp.vdot(d, m) for d, m in zip(directions, matrices, strict=True))

    def found(weights):
        return along(wide_sums(accumulator.update(accumulator.init(), DATA, weights)))

    expected = jax.grad(lambda weights: along(factors_of(weights)))(WEIGHTS)
    np.testing.assert_allclose(jax.grad(found)(WEIGHTS), expected, rtol=1e-9)
    slope = jax.jvp(found, (WEIGHTS,), (np.ones_like(WEIGHTS),))[1]
    np.testing.assert_allclose(slope, expected.sum(), rtol=1e-9)
