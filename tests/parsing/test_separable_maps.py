"""Derivatives of weights: where they act on two sides apart, the sides say what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import normal

from laplax_kfac.jaxprs import with_consts
from laplax_kfac.parsing.separable_maps import MadeWeight, generic, matrices_of, separable

pytestmark = pytest.mark.usefixtures("x64")

W, S = (6, 4), (4,)
CENTRING = np.eye(6) - 1 / 6
MAPS = {
    "identity": (lambda w, _: w, (True, True), True),
    "twice": (lambda w, _: 2 * w, (True, True), True),
    "columns": (lambda w, s: w * s, (True, True), False),
    "rows": (lambda w, s: w * jnp.exp(s[0] + jnp.arange(6.0))[:, None], (True, True), True),
    "rows and columns": (lambda w, s: jnp.arange(1.0, 7)[:, None] * w * s, (True, True), False),
    "centred": (lambda w, _: jnp.asarray(CENTRING) @ w, (False, True), True),
    "root": (lambda w, s: w / jnp.sqrt(s), (True, True), False),
    "transposed": (lambda w, _: w.T, (True, True), True),
    "wider": (lambda w, s: w @ jnp.outer(s, s)[:, :3] @ jnp.ones((3, 9)), (True, False), False),
    "one column of the product": (lambda w, s: w @ s[:, None], (True, False), False),
}


def made(function):
    w, s = normal(W), normal(S)
    closed = jax.make_jaxpr(function)(w, s)
    return MadeWeight(with_consts(closed.jaxpr), tuple(closed.consts), (0, 1), 0)


@pytest.mark.parametrize("name", MAPS)
def test_sides_are_those_of_the_pullback(name):
    function, diagonal, keeps = MAPS[name]
    found = separable(made(function), [], (0,), np.arange(24).reshape(W))
    assert found is not None
    assert (found.diagonal, found.keeps_outputs) == (diagonal, keeps)
    w, s = normal(W, seed=4), jnp.abs(normal(S, seed=5))
    left, right = (x if x is None or x.ndim == 2 else jnp.diag(x) for x in found.sides([w, s]))
    cotangent = normal(found.made.shape, seed=6)
    exact = jax.vjp(lambda w: function(w, s), w)[1](cotangent)[0].ravel()[found.places]
    through = left @ cotangent if right is None else left @ cotangent @ right.T
    np.testing.assert_allclose(through, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, _: jnp.exp(w),
        lambda w, _: w * jnp.tri(6, 4),
        lambda w, s: w + jnp.flip(w, 0) * s,
        lambda w, _: w / jnp.linalg.norm(w, axis=0),
        lambda w, _: jnp.clip(w, -10.0, 10.0),
        lambda w, _: jnp.where(w > -0.5, w, 0.0),
        lambda w, _: w * jnp.nan,
        lambda w, _: 0.0 * w,
    ],
    ids=["exp", "mask", "flip", "norm", "clip", "branch", "nan", "zero"],
)
def test_others_do_not_separate(function):
    assert separable(made(function), [], (0,), np.arange(24).reshape(W)) is None


def test_sides_of_a_kernel_are_found_among_its_axes():
    def function(kernel, _):
        return jnp.moveaxis(kernel - kernel.mean((0, 1, 2)), 2, 0).reshape(12, 5)

    kernel = normal((2, 2, 3, 5))
    closed = jax.make_jaxpr(function)(kernel, normal(S))
    weight = MadeWeight(with_consts(closed.jaxpr), tuple(closed.consts), (0, 1), 0)
    found = separable(weight, [], (0,), np.arange(60).reshape(2, 2, 3, 5))
    assert found is not None
    assert found.places.shape == (12, 5)
    assert (found.diagonal, found.keeps_outputs) == ((False, True), True)


def test_every_way_to_see_an_array_as_a_matrix():
    shapes = [m.shape for m in matrices_of(np.arange(24).reshape(2, 3, 1, 4))]
    assert shapes[0] == (6, 4)
    assert sorted(shapes) == sorted(
        [(6, 4), (24, 1), (12, 2), (8, 3), (4, 6), (3, 8), (2, 12), (1, 24)]
    )


def test_generic_vectors_differ():
    first, second = generic(5), generic(5, 1)
    assert np.abs(first).min() >= 1
    assert abs(first @ second) < 0.999 * np.linalg.norm(first) * np.linalg.norm(second)
