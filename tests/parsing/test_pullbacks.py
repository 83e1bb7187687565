"""Pullbacks that only rearrange and scale make views; others do not."""

import jax
import jax.numpy as jnp
import pytest
from support.symbolic import traced

from laplax_kfac.parsing.values import Fixed

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    "backward",
    [
        lambda w, g: g + 0.1 * w,
        lambda _, g: g + 1.0,
        lambda _, g: jnp.pad(jnp.add(*jnp.split(g, 2)), ((0, 1), (0, 0))),
    ],
    ids=["decay", "constant", "sum"],
)
def test_a_rule_that_does_more_than_rearrange_is_no_view(backward):
    @jax.custom_vjp
    def function(w):
        return 2.0 * w

    function.defvjp(lambda w: (2.0 * w, w), lambda w, g: (backward(w, g),))
    found, findings = traced(function, jnp.ones((2, 3)))
    assert isinstance(found, Fixed)
    assert [entry.ids.size for entry in findings.fallbacks] == [6]
