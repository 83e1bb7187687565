"""What is found to be zero is zero, and what moves entries moves zeros."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from laplax_kfac import jaxprs
from laplax_kfac.parsing.supports import LARGE, supports

pytestmark = pytest.mark.usefixtures("x64")

HALF = np.asarray([True, False, True, False])
COLUMNS = np.broadcast_to(np.asarray([True, False, False]), (4, 3))
ALL = np.ones((3, 2), bool)
I = jnp.asarray(1)  # noqa: E741


@jax.custom_vjp
def with_a_rule(x):
    return jnp.sin(x)


with_a_rule.defvjp(lambda x: (x, None), lambda _, g: (g,))


def looped(x, y):
    return lax.while_loop(lambda c: jnp.sum(c[0]) < 9, lambda c: (c[0] + c[1], c[1]), (x, y))[0]


def scanned(x, y):
    return lax.scan(lambda c, row: (c * 2.0, c[:3] + row), x, y)


def written(x, i, y):
    return lax.dynamic_update_slice(x, y, (i, 0))


# Functions of operands with zeros, whose supports are as small as they can be.
TIGHT: dict[str, Any] = {
    "moved": (lambda x: jnp.pad(x.reshape(2, 2).T[::-1], 1), HALF),
    "sum and product": (lambda x, y: (x + y, x * y, x - 2.0 * x, y / 3.0), HALF, HALF[::-1]),
    "elementwise": (lambda x: (jnp.tanh(x), jnp.sqrt(x * x), x**3, -x, jnp.exp(x)), HALF),
    "choice": (lambda x, y: jnp.where(y > 0, x, 0.0), HALF, HALF),
    "matrix product": (lambda x, w: x.T @ x @ w, COLUMNS, ALL),
    "convolution": (lambda x: jnp.convolve(x, jnp.asarray([1.0, 2.0]), "same"), HALF & HALF[0]),
    "sums": (lambda x: (jnp.sum(x, axis=0), jnp.cumsum(x, axis=1), jnp.max(x * 0.0)), COLUMNS),
    "slice that data pick": (lambda x, i: lax.dynamic_slice_in_dim(x, i, 2), COLUMNS, I),
    "row that data pick": (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), COLUMNS, I),
    "row written": (lambda x, i, y: x.at[i].set(y), COLUMNS, I, COLUMNS[0]),
    "row added": (lambda x, i, y: x.at[i, :].add(y, mode="drop"), COLUMNS, I, COLUMNS[0]),
    "part written": (written, COLUMNS, I, COLUMNS[:2]),
    "call": (jax.jit(lambda x: jnp.sin(x)), HALF),
    "rule": (with_a_rule, HALF),
    "branches": (lambda x, i: lax.cond(i > 0, lambda x: x, lambda x: 2.0 * x, x), HALF, I),
    "while loop": (looped, HALF, HALF),
    "scan": (scanned, HALF, COLUMNS),
    "solve": (lambda x, w: jnp.linalg.solve(jnp.eye(3) + x.T @ x, w * 0.0), COLUMNS, ALL),
    "transform": (lambda x: jnp.fft.fft(x * 0.0), HALF),
}  # fmt: skip
# Those of which less is found out than there is to know.
LOOSE: dict[str, Any] = {
    "carry that grows": (lambda x: lax.fori_loop(0, 2, lambda _, c: jnp.roll(c, 1) + c, x), HALF),
    "sorted": (jnp.sort, HALF),
    "cosine": (lambda x: jnp.cos(x) - 1.0, HALF),
    "cancelled": (lambda x: x - x, HALF),
    "power": (lambda x: (1.0 + x) ** 0, HALF),
    "row that data picks": (lambda x, i: x.T[i], COLUMNS, I),
}


def draws(operands):
    """Operands that are zero outside of the supports that they shall have."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield [
            jnp.where(x, rng.uniform(0.5, 1.5, x.shape), 0.0)
            if isinstance(x, np.ndarray)
            else jnp.asarray(rng.integers(0, 3))
            for x in operands
        ]


def found_and_seen(function, operands):
    """The supports that are found, and the entries that differ from zero for drawn operands."""
    points = list(draws(operands))
    jaxpr, consts, _ = jaxprs.trace(function, *points[0])
    known = [x if isinstance(x, np.ndarray) else np.ones((), bool) for x in operands]
    found = supports(jaxpr, [*(np.asarray(c) != 0 for c in consts), *known])
    outputs = [jax.tree.leaves(function(*point)) for point in points]
    seen = [np.any([np.asarray(x) != 0 for x in xs], axis=0) for xs in zip(*outputs, strict=True)]
    return found, seen


@pytest.mark.parametrize("name", TIGHT | LOOSE)
def test_what_is_found_to_be_zero_is_zero(name):
    function, *operands = (TIGHT | LOOSE)[name]
    for support, nonzero in zip(*found_and_seen(function, operands), strict=True):
        assert support.shape == nonzero.shape
        assert not (nonzero & ~support).any()


@pytest.mark.parametrize("name", TIGHT)
def test_what_moves_entries_moves_zeros(name):
    function, *operands = TIGHT[name]
    for support, nonzero in zip(*found_and_seen(function, operands), strict=True):
        np.testing.assert_array_equal(support, nonzero)


def test_of_large_arrays_only_whether_they_are_zero_is_kept():
    size = LARGE + 1

    def function(x):
        return jnp.zeros(size) * 2.0, jnp.pad(x, (0, size - 4)) * 2.0

    jaxpr, _, _ = jaxprs.trace(function, jax.ShapeDtypeStruct((4,), float))
    zero, some = supports(jaxpr, [np.ones(4, bool)])
    assert not zero.any()
    assert some.all()
