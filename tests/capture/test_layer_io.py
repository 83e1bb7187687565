"""What a use saw: second moments of every type of side are those of its vectors, of any kind."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import basis_of, normal
from support.tolerances import tolerance

from laplax_kfac.bases import kind_of
from laplax_kfac.capture.layer_io import (
    Cotangents,
    Counting,
    Features,
    LayerIO,
    ParameterIO,
    Patches,
    Rows,
)
from laplax_kfac.capture.matrix_io import MatrixIO

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
N, R, S, STACK, ROWS, OUT = 4, 3, 5, 2, 6, 2
WEIGHTS = np.arange(1.0, N + 1)
INPUT_WEIGHTS = np.asarray([1.0, 0.0, 2.0, 1.0])
ACTIVE = np.ones((N, S, STACK))
ACTIVE[1, 2:, 0] = 0.0
KINDS = ["dense", "diagonal", "identity", "blocked:4"]


def moments(operands, weights):
    """The second and the first moment of features that are twice the operand."""
    (x,) = operands
    second = jnp.einsum("n,nski,nskj->kij", weights, 2 * x, 2 * x)
    return second, jnp.einsum("n,nski->ki", weights, 2 * x)


def features():
    return jnp.asarray(normal(N, S, STACK, ROWS) * ACTIVE[..., None])


def patches():
    x = jnp.asarray(normal(N, S, STACK, ROWS - 1) * ACTIVE[..., None])
    bias = 3.0 * ACTIVE[..., None]
    return Patches(Features(jnp.concatenate([2 * x, bias], axis=-1)), (x,), moments, 3.0)


def rows():
    numbers = np.random.default_rng(0).integers(-1, ROWS, size=(N, S, STACK))
    return Rows(jnp.asarray(np.where(ACTIVE > 0, numbers, -1)), ROWS, jnp.zeros(()).dtype)


SIDES = {
    "features": lambda: Features(features()),
    "patches": patches,
    "rows": rows,
    "cotangents": lambda: Cotangents(jnp.asarray(normal(N, R, S, STACK, ROWS))),
}


def counting(reduce):
    examples, inputs, active = map(jnp.asarray, (WEIGHTS, INPUT_WEIGHTS, ACTIVE))
    return Counting(examples, inputs, active, reduce)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("name", SIDES)
def test_a_second_moment_is_that_of_the_vectors(name, text, reduce):
    if (name, reduce) == ("rows", True) and text not in ("diagonal", "identity"):
        pytest.skip("rows have a diagonal factor")
    side, kind = SIDES[name](), kind_of(text)
    x = np.asarray(side.features())
    weights = WEIGHTS if name == "cotangents" else INPUT_WEIGHTS
    if reduce:
        x = x.sum(axis=2, keepdims=True)
        if name != "cotangents":
            x = x / np.maximum(ACTIVE.sum(axis=1), 1.0)[:, None, None, :, None]
    exact = np.einsum("n,nrski,nrskj->kij", weights, x, x)
    expected = kind.finished(kind.of_matrix(jnp.asarray(exact)))
    found = kind.finished(side.second_moment(kind, counting(reduce)))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert side.num_positions == S


@pytest.mark.parametrize("text", KINDS)
def test_without_cotangents_there_is_the_identity(text):
    kind, none = kind_of(text), Cotangents(jnp.zeros((N, 0, S, STACK, OUT)))
    found = kind.finished(none.second_moment(kind, counting(False)))
    count = np.einsum("n,nsk->k", INPUT_WEIGHTS, ACTIVE)
    expected = kind.finished(kind.identity(jnp.asarray(count), OUT))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("name", ["features", "patches", "rows"])
def test_products_with_the_gradients(name, exchanged):
    """<G, V> and sums of G, for matrices G = sum_t a_t g_t^T of examples and columns."""
    pulled = Cotangents(jnp.asarray(normal(N, R, S, STACK, OUT, seed=1)))
    sides = (pulled, SIDES[name]()) if exchanged else (SIDES[name](), pulled)
    use = LayerIO(sides[0], sides[1], jnp.asarray(ACTIVE))
    assert use.num_columns == R
    assert use.num_positions == S
    a, g = (np.asarray(side.features()) for side in (use.inputs, use.gradients))
    a, g = (np.broadcast_to(x, (N, R, *x.shape[2:])) for x in (a, g))
    gradients = np.einsum("nrski,nrsko->nrkio", a, g)
    v = jnp.asarray(normal(7, STACK, *gradients.shape[-2:], seed=2))
    expected = np.einsum("nrkio,vkio->nrvk", gradients, v)
    np.testing.assert_allclose(use.inner(v), expected, **CLOSE)
    weights = jnp.asarray(normal(N, R, 7, STACK, seed=3))
    expected = np.einsum("nrvk,nrkio->vkio", weights, gradients)
    np.testing.assert_allclose(use.weighted_sum(weights), expected, **CLOSE)


def test_kinds_of_both_sides_and_the_count():
    use = LayerIO(SIDES["rows"](), SIDES["cotangents"](), jnp.asarray(ACTIVE))
    inputs, outputs, count = use.second_moments(
        (kind_of("diagonal"), kind_of("dense")), counting(False)
    )
    assert inputs.shape == (STACK, ROWS)
    assert outputs.shape == (STACK, ROWS, ROWS)
    np.testing.assert_allclose(count, np.einsum("n,nsk->k", INPUT_WEIGHTS, ACTIVE))
    reduced = replace(counting(False), reduce=True)
    np.testing.assert_allclose(reduced.total(), np.full(STACK, INPUT_WEIGHTS.sum()))


@pytest.mark.parametrize("name", SIDES)
def test_vectors_in_a_basis(name):
    u = np.linalg.qr(normal(ROWS, ROWS, seed=5))[0]
    side = SIDES[name]()
    np.testing.assert_allclose(side.rotated(basis_of(u)), side.features() @ u, **CLOSE)


@pytest.mark.parametrize("text", KINDS)
def test_gradients_of_parameters(text):
    kind, g = kind_of(text), normal(N, R, ROWS)
    found = ParameterIO(jnp.asarray(g)).second_moment(kind, jnp.asarray(WEIGHTS))
    exact = np.einsum("n,nri,nrj->ij", WEIGHTS, g, g)
    expected = jax.tree.map(lambda x: x[0], kind.of_matrix(jnp.asarray(exact[None])))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_second_moments_of_a_matrix_without_a_use():
    g = normal(N, R, ROWS, OUT)
    record = jax.vmap(lambda x: MatrixIO.of(x.reshape(R, -1), ROWS))(jnp.asarray(g))
    counting = Counting(
        jnp.asarray(WEIGHTS), jnp.asarray(INPUT_WEIGHTS), record.active, reduce=False
    )
    dense = kind_of("dense"), kind_of("dense")
    rows, columns, count = record.second_moments(dense, counting)
    weighted = WEIGHTS[:, None, None, None] * g
    found = (rows, columns, count)
    exact = (
        np.einsum("nrio,nrjo->ij", weighted, g)[None],
        np.einsum("nrio,nrip->op", weighted, g)[None],
        np.sum(weighted * g)[None],
    )
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, **CLOSE)
    inputs, gradients = record.inputs.features()[:, 0, :, 0], record.gradients.features()[..., 0, :]
    np.testing.assert_allclose(np.einsum("nsi,nrso->nrio", inputs, gradients), g, rtol=1e-12)
    none = jax.vmap(lambda x: MatrixIO.of(x, ROWS))(jnp.zeros((N, 0, ROWS * OUT)))
    rows, columns, count = none.second_moments(dense, counting)
    np.testing.assert_allclose(np.asarray(rows[0]), WEIGHTS.sum() * np.eye(ROWS))
    np.testing.assert_allclose(np.asarray(columns[0] / count), np.eye(OUT))
