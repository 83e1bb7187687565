"""Products by group keep the contract where a group is active."""

import jax.numpy as jnp
import pytest
from jax import lax
from support.models import normal

from laplax_kfac import patterns

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(2, 3, 1), (0, 6, 0), (1, 2, 1)], ids=str)
def test_ragged_products_use_the_matrix_of_the_group(sizes):
    """Tokens behind the last group have no matrix: their outputs are zero."""
    x, w = normal((6, 4)), normal((3, 4, 2), seed=1)
    error = patterns.check(lax.ragged_dot, 1, x, w, jnp.asarray(sizes, jnp.int32))
    assert error < 1e-12
