"""The nearest Kronecker product of a sum of several uses."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal, positive
from support.sums import sums_of, twice
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.bases import Dense
from laplax_kfac.factors.nearest_kronecker import nearest_kronecker

pytestmark = pytest.mark.usefixtures("x64")


DENSE = (Dense(), Dense())
N = 5


# -- sums of one layer, against their definitions ----------------------------------------------

DENSE = (Dense(), Dense())
DENSE = (Dense(), Dense())
N, S, IN, OUT = 5, 3, 4, 2
PARAMS = {"b": normal(OUT, seed=1), "w": normal(IN, OUT, seed=2)}
X, Y = normal(N, S, IN), normal(N, OUT, seed=3)


def rearranged(inputs, outputs):
    """sum_u vec(A_u) vec(B_u)^T: its best rank-one matrix is the nearest Kronecker product."""
    return np.einsum("uij,ukl->ijkl", inputs, outputs).reshape(inputs[0].size, outputs[0].size)


@pytest.mark.parametrize("uses", [1, 2, 5])
def test_nearest_kronecker_is_the_best_rank_one_of_the_rearranged_sum(uses):
    inputs, outputs = positive(uses, 4, seed=0), positive(uses, 3, seed=1)
    a, b = nearest_kronecker(DENSE, jnp.asarray(inputs[:, None]), jnp.asarray(outputs[:, None]))
    u, s, vt = np.linalg.svd(rearranged(inputs, outputs))
    np.testing.assert_allclose(
        np.outer(a[0], b[0]), s[0] * np.outer(u[:, 0], vt[0]), **tolerance(jnp.float64)
    )
    assert np.linalg.eigvalsh(a[0]).min() > -1e-12
    assert np.linalg.eigvalsh(b[0]).min() > -1e-12


def test_nearest_kronecker_of_a_stack_is_that_of_each():
    inputs, outputs = positive(3, 2, 4, seed=0), positive(3, 2, 3, seed=1)
    a, b = nearest_kronecker(DENSE, jnp.asarray(inputs), jnp.asarray(outputs))
    for k in range(2):
        alone = nearest_kronecker(
            DENSE, jnp.asarray(inputs[:, k, None]), jnp.asarray(outputs[:, k, None])
        )
        np.testing.assert_allclose(
            np.kron(a[k], b[k]), np.kron(alone[0][0], alone[1][0]), **tolerance(jnp.float64)
        )


def test_nearest_kronecker_of_equal_directions_is_exact():
    a, b = positive(1, 4, seed=0), positive(1, 3, seed=1)
    scales = np.asarray([0.5, 2.0, 3.0])[:, None, None]
    found = nearest_kronecker(
        DENSE, jnp.asarray((scales * a)[:, None]), jnp.repeat(b, 3, axis=0)[:, None]
    )
    expected = np.kron(5.5 * a[0], b[0])
    np.testing.assert_allclose(np.kron(found[0][0], found[1][0]), expected, rtol=1e-9)


@pytest.mark.parametrize("zero", [(0, 1, 2), (1,)], ids=["all", "one"])
def test_uses_without_curvature_contribute_nothing(zero):
    inputs, outputs = positive(3, 1, 4, seed=0), positive(3, 1, 3, seed=1)
    outputs[list(zero)] = 0.0
    a, b = nearest_kronecker(DENSE, jnp.asarray(inputs), jnp.asarray(outputs))
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    kept = [u for u in range(3) if u not in zero]
    if not kept:
        np.testing.assert_array_equal(np.kron(a[0], b[0]), 0.0)
        return
    expected = nearest_kronecker(DENSE, jnp.asarray(inputs[kept]), jnp.asarray(outputs[kept]))
    np.testing.assert_allclose(
        np.kron(a[0], b[0]), np.kron(expected[0][0], expected[1][0]), **tolerance(jnp.float64)
    )


def test_a_tied_layer_gets_the_nearest_product_of_its_sum():
    w = normal(3, 3)
    data = normal(N, 3, seed=1), normal(N, 3, seed=2)
    (sums,) = sums_of(twice, w, data, loss_fn="mse")
    inputs, outputs = np.asarray(sums.inputs[:, 0]) / N, np.asarray(sums.outputs[:, 0])
    u, s, vt = np.linalg.svd(rearranged(inputs, outputs))
    best = s[0] * np.outer(u[:, 0], vt[0]).reshape(3, 3, 3, 3)
    expected = best.transpose(0, 2, 1, 3).reshape(9, 9)
    found = laplax_kfac.kfac(twice, w, data, loss_fn="mse").to_dense()
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))
