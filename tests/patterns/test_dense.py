"""Products with every order of axes, the weight on either side, keep the contract."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse
from support.models import normal
from support.patterns import ATOL, both_sides, pattern_of

from laplax_kfac import patterns

pytestmark = pytest.mark.usefixtures("x64")


SIZES = {"b": 2, "c": 3, "i": 4, "j": 5, "o": 3, "p": 2, "s": 5, "t": 3}
# Axes of the weight and of the data: b, c of both (stack), i, j contracted, o, p and s, t free.
PRODUCTS = [("io", "si"), ("bio", "bsi"), ("ijo", "sij"), ("iop", "ist"), ("bcio", "sbci"),
            ("bijo", "tbisj"), ("ijop", "sij")]  # fmt: skip


def numbers_of(operands):
    """dot_general's dimension numbers and einsum's equation of two operands given by letters."""
    first, second = operands
    batch = [a for a in "bc" if a in first and a in second]
    inner = [a for a in "ij" if a in first and a in second]
    free = [a for a in first + second if a not in batch + inner]
    numbers = [[tuple(d.index(a) for a in axes) for d in operands] for axes in (inner, batch)]
    return numbers, f"{first},{second}->{''.join(batch + free)}"


@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
@pytest.mark.parametrize(("weight", "data"), PRODUCTS, ids="_".join)
def test_dense_with_every_order_of_axes(weight, data, side):
    for shift, w in enumerate(map("".join, itertools.permutations(weight))):
        x = data[shift % len(data) :] + data[: shift % len(data)]
        operands = [w, x] if side == 0 else [x, w]
        numbers, equation = numbers_of(operands)
        rng = np.random.default_rng(shift)
        values = [rng.normal(size=[SIZES[a] for a in d]) for d in operands]
        (eqn,) = jax.make_jaxpr(lambda a, b, n=numbers: lax.dot_general(a, b, n))(*values).eqns
        pattern = pattern_of(eqn)
        # The pattern only rearranges, so that numpy can do it.
        outputs = pattern.outputs(eqn, side, np.einsum(equation, *values))
        matrices = pattern.weight(eqn, side, values[side])
        inputs = pattern.inputs(eqn, side, (values[1 - side],))
        size = {a: math.prod(SIZES[b] for b in weight if b in a) for a in ("bc", "ij", "op")}
        assert matrices.shape == tuple(size.values())
        products = np.einsum("tki,kio->tko", inputs, matrices)
        np.testing.assert_allclose(outputs, products, atol=ATOL, err_msg=equation)


def test_dense_reads_the_axes_of_its_weight():
    """In einsum's letters: stack of the batch axes, in of the contracted, out of the free ones."""
    x, w = normal((2, 5, 4)), normal((4, 3, 2), seed=1)  # b s i, i o b
    (eqn,) = jax.make_jaxpr(lambda x, w: lax.dot_general(x, w, (((2,), (0,)), ((0,), (2,)))))(
        x, w
    ).eqns
    pattern = pattern_of(eqn)
    np.testing.assert_array_equal(pattern.weight(eqn, 1, w), np.einsum("iob->bio", w))
    np.testing.assert_array_equal(pattern.inputs(eqn, 1, (x,)), np.einsum("bsi->sbi", x))
    np.testing.assert_array_equal(pattern.weight(eqn, 0, x), np.einsum("bsi->bis", x))
    np.testing.assert_array_equal(pattern.inputs(eqn, 0, (w,)), np.einsum("iob->obi", w))
    assert patterns.check(lambda x, w: eqn.primitive.bind(x, w, **eqn.params), 0, x, w) < ATOL


# Axes of a sparse array that are contracted and of its batch, as for `dot_general`.
SPARSE = [(((1,), (0,)), ((), ()), 0), (((0,), (1,)), ((), ()), 0), (((2,), (1,)), ((0,), (0,)), 1)]


@pytest.mark.parametrize(("contract", "batch", "batched"), SPARSE)
def test_a_sparse_array_has_its_entries_as_inputs(contract, batch, batched):
    rng = np.random.default_rng(0)
    entries = rng.normal(size=(2, 4, 5)) * (rng.uniform(size=(2, 4, 5)) < 0.5)
    array = sparse.BCOO.fromdense(jnp.asarray(entries if batched else entries[0]), n_batch=batched)
    shape = [3] * (3 if batched else 2)
    for axis, k in zip((*contract[1], *batch[1]), (*contract[0], *batch[0]), strict=True):
        shape[axis] = array.shape[k]

    def product(data, places, weight):
        whole = sparse.BCOO((data, places), shape=array.shape)
        return sparse.bcoo_dot_general(whole, weight, dimension_numbers=(contract, batch))

    outputs, identity = both_sides(product, 2, array.data, array.indices, rng.normal(size=shape))
    np.testing.assert_allclose(outputs, identity, atol=ATOL)
