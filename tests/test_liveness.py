"""Peaks of small programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from laplax_kfac import liveness

N = 32
SQUARE = jnp.zeros((N, N), jnp.float32)
MATRIX = 4 * N * N


def peak_of(function, *args):
    return liveness.peak(jax.make_jaxpr(function)(*args).jaxpr) / MATRIX


def chain(x):
    for _ in range(5):
        x = x @ x
    return x


def tree(x):
    """Four products, two sums of two: three are there at once if each pair is taken together."""
    leaves = [(x + k) @ x for k in range(4)]
    return (leaves[0] @ leaves[1]) @ (leaves[2] @ leaves[3])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x, 0),
        (lambda x: jnp.tanh(x) + 2 * x, 0),  # takes the place of an argument, or of the result
        (lambda x: x @ x, 1),
        (lambda x: x.T @ x.T, 1),
        (lambda x: jnp.sin(x) @ x, 2),
        (chain, 2),
        (lambda x: jnp.sum(x @ x), 1),
        (lambda x: jax.jit(chain)(x), 2),
        (lambda x: lax.fori_loop(0, 9, lambda _, y: y @ x, x), 2),
        (lambda x: lax.scan(lambda y, _: (chain(y), None), x, length=3)[0], 3),
        (lambda x: lax.scan(lambda y, _: (y, y), x, length=3)[1], 3),
        (lambda x: lax.cond(x[0, 0] > 0, chain, lambda y: y @ y, x), 3),
        (lambda x: jnp.concatenate([x, x]).T @ jnp.concatenate([x, x]), 5),
        (lambda x: x @ jnp.concatenate([x, x, x], axis=1)[:, :N], 4),
    ],
)
def test_peaks_by_hand(function, expected):
    assert peak_of(function, SQUARE) == pytest.approx(expected, abs=0.01)


def test_of_steps_that_may_come_next_the_one_that_leaves_the_least_is_taken():
    """In the order of the equations, all four factors would be there at once, with an operand."""
    assert peak_of(tree, SQUARE) <= 5


def test_a_small_part_does_not_keep_what_it_is_of():
    def firsts(x):
        return [((x + k) @ x)[0] for k in range(20)]

    assert peak_of(lambda x: jnp.concatenate(firsts(x)), SQUARE) < 4
