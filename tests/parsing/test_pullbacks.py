"""Pullbacks that only rearrange and scale make views; others do not."""

import jax
import jax.numpy as jnp
import pytest
from support.symbolic import traced

from laplax_kfac.parsing.values import Fixed

pytestmark = pytest.mark.usefixtures("x64")


def partly(w, g):
    """A part of the cotangent is handed on, and another one is multiplied."""
    first, second = jnp.split(g, 2)
    return jnp.concatenate([first, second * w[1:]])


@pytest.mark.parametrize(
    ("backward", "size"),
    [
        (lambda w, g: g + 0.1 * w, 6),
        (lambda _, g: g + 1.0, 6),
        # The second row has no cotangent: it plays no part.
        (lambda _, g: jnp.pad(jnp.add(*jnp.split(g, 2)), ((0, 1), (0, 0))), 3),
        (lambda w, g: jnp.concatenate([g[:1], g[1:] * w[1:]]), 6),
        (partly, 6),
    ],
    ids=["decay", "constant", "sum", "product of a slice", "product of a part"],
)
def test_a_rule_that_does_more_than_rearrange_is_no_view(backward, size):
    @jax.custom_vjp
    def function(w):
        return 2.0 * w

    function.defvjp(lambda w: (2.0 * w, w), lambda w, g: (backward(w, g),))
    found, findings = traced(function, jnp.ones((2, 3)))
    assert isinstance(found, Fixed)
    assert [entry.ids.size for entry in findings.fallbacks] == [size]
