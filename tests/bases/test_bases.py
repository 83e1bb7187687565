"""What every kind of side promises, against dense matrices in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal
from support.tolerances import tolerance

from laplax_kfac import bases
from laplax_kfac.bases import KINDS, Dense, Diagonal, Identity, common_kind, kind_of

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
N, STACK, SIZE, OTHER = 5, 2, 7, 3
TEXTS = ["identity", "diagonal", "blocked:3", "blocked:7", "blocked:64", "blocked:1", "dense"]
MASKS = {
    text: np.kron(np.eye(20), np.ones((size, size)))[:SIZE, :SIZE]
    for text, size in [("blocked:3", 3), ("blocked:7", 7), ("blocked:64", 64), ("blocked:1", 1)]
} | {"dense": np.ones((SIZE, SIZE)), "diagonal": np.eye(SIZE)}
kinds = pytest.mark.parametrize("text", TEXTS)


def restricted(text, matrix):
    """The projection onto the kind's matrices."""
    if text == "identity":
        trace = np.trace(matrix, axis1=-2, axis2=-1)
        return trace[..., None, None] / SIZE * np.eye(SIZE)
    return matrix * MASKS[text]


def features(seed=0):
    return jnp.asarray(normal(N, 2, STACK, SIZE, seed=seed))


def dense(kind, total):
    """A finished sum, by its products with unit vectors."""
    units = jnp.eye(SIZE)[:, None] * jnp.ones((STACK, 1))  # (units, stack, size)
    return np.moveaxis(np.asarray(kind.times(units, total)), 0, -2)


def summed(text, seed=0):
    kind, x = kind_of(text), features(seed)
    weights = jnp.asarray(np.abs(normal(N, 2, STACK, 1, seed=seed + 10)))
    total = kind.finished(kind.sum(x, weights))
    exact = np.einsum("nsk,nski,nskj->kij", weights[..., 0], x, x)
    return kind, total, exact


def test_every_kind_is_among_the_cases():
    assert {text.split(":")[0] for text in TEXTS} == set(KINDS)


@kinds
def test_a_sum_is_the_restricted_sum(text):
    kind, total, exact = summed(text)
    np.testing.assert_allclose(dense(kind, total), restricted(text, exact), **CLOSE)
    found = kind.finished(kind.aligned(kind.of_matrix(jnp.asarray(exact))))
    np.testing.assert_allclose(dense(kind, found), restricted(text, exact), **CLOSE)
    diagonal = np.diagonal(restricted(text, exact), axis1=-2, axis2=-1)
    np.testing.assert_allclose(kind.diagonal(total), diagonal, **CLOSE)
    for leaf in jax.tree.leaves(total):
        assert leaf.shape[0] == STACK  # the stack is in front
    assert kind.num_elements(SIZE) * STACK == sum(x.size for x in jax.tree.leaves(total))
    one = jax.tree.map(lambda x: x[:1], total)
    shared = kind.finished(kind.sum(features()[:, :, :1], jnp.ones((1, 1, 1, 1))))
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, shared)


@kinds
def test_sums_of_rows_and_of_the_identity(text):
    kind = kind_of(text)
    rows = jnp.asarray([[[0, 3], [6, -1]], [[3, 3], [0, 2]]])
    weights = jnp.asarray(np.abs(normal(2, 2, STACK)))
    one_hot = jax.nn.one_hot(rows, SIZE)
    exact = np.einsum("nsk,nski,nskj->kij", weights, one_hot, one_hot)
    found = kind.finished(kind.sum_rows(rows, SIZE, weights))
    np.testing.assert_allclose(dense(kind, found), restricted(text, exact), **CLOSE)
    counts = jnp.asarray([2.0, 3.0])
    found = kind.finished(kind.identity(counts, SIZE))
    np.testing.assert_allclose(dense(kind, found), counts[:, None, None] * np.eye(SIZE), **CLOSE)


@kinds
@pytest.mark.parametrize("stacked", [True, False])
def test_a_sum_becomes_a_basis(text, stacked):
    kind, total, exact = summed(text)
    exact = restricted(text, exact)
    if not stacked:
        total, exact = jax.tree.map(lambda x: x[0], total), exact[0]
    values, basis = jax.jit(kind.decompose)(total)
    assert basis.kind == kind
    assert values.shape == exact.shape[:-1]
    assert float(values.min()) >= 0.0
    again = basis.matrix(values)
    assert str(jax.tree.structure(again)) == str(jax.tree.structure(total))
    for found, expected in zip(*map(jax.tree.leaves, (again, total)), strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)
    assert basis.num_elements == kind.num_in_basis(SIZE) * (STACK if stacked else 1)
    np.testing.assert_allclose(basis.squared().rotate_back(values), kind.diagonal(total), **CLOSE)
    back = kind.basis_of([jnp.asarray(np.asarray(x)) for x in jax.tree.leaves(basis)])
    assert str(jax.tree.structure(back)) == str(jax.tree.structure(basis))
    # All three orders of vectors, and their inverses.
    written = bases.Dense().promote(basis, SIZE).vectors
    u = np.broadcast_to(written, (STACK, SIZE, SIZE)) if stacked else np.asarray(written)
    x = features() if stacked else features()[:, :, 0]
    letters = "...ki,kij->...kj" if stacked else "...i,ij->...j"
    np.testing.assert_allclose(basis.rotate(x), np.einsum(letters, x, u), **CLOSE)
    np.testing.assert_allclose(basis.rotate_back(basis.rotate(x)), x, **CLOSE)
    m = jnp.asarray(normal(N, *[STACK] * stacked, SIZE, OTHER, seed=2))
    np.testing.assert_allclose(basis.rotate(m, -2), np.swapaxes(u, -1, -2) @ m, **CLOSE)
    np.testing.assert_allclose(basis.rotate_back(m, -2), u @ m, **CLOSE)
    m = m.swapaxes(-1, -2)
    np.testing.assert_allclose(basis.rotate(m, -1), m @ u, **CLOSE)
    np.testing.assert_allclose(basis.rotate_back(m, -1), m @ np.swapaxes(u, -1, -2), **CLOSE)
    np.testing.assert_allclose(u @ np.swapaxes(u, -1, -2), np.zeros_like(u) + np.eye(SIZE), **CLOSE)


@kinds
def test_products_within_the_kind(text):
    kind, total, exact = summed(text)
    _, other, theirs = summed(text, seed=1)
    exact, theirs = restricted(text, exact), restricted(text, theirs)
    np.testing.assert_allclose(
        kind.inner(total, other), np.einsum("kij,kij->k", exact, theirs), **CLOSE
    )
    x, y = features(3), features(4)
    np.testing.assert_allclose(kind.times(x, total), np.einsum("nski,kij->nskj", x, exact), **CLOSE)
    np.testing.assert_allclose(
        kind.form(x, total), np.einsum("nski,kij,nskj->nsk", x, exact, x), **CLOSE
    )
    products = np.einsum("nski,nskj->kij", x, y) + np.einsum("nski,nskj->kij", y, x)
    found = dense(kind, kind.cross(x, y)) + dense(kind, kind.cross(y, x))
    np.testing.assert_allclose(found, restricted(text, products), **CLOSE)
    m = jnp.asarray(normal(N, STACK, SIZE, OTHER, seed=2))
    expected = restricted(text, np.einsum("nkip,nkjp->kij", m, m))
    np.testing.assert_allclose(dense(kind, kind.cross(m, m, -2)), expected, **CLOSE)
    np.testing.assert_allclose(kind.times(m, total, -2), exact @ m, **CLOSE)
    m = m.swapaxes(-1, -2)
    np.testing.assert_allclose(dense(kind, kind.cross(m, m, -1)), expected, **CLOSE)
    np.testing.assert_allclose(kind.times(m, total, -1), m @ exact, **CLOSE)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(TEXTS, 2)))
def test_two_kinds_have_one_that_contains_both(first, second):
    kind = common_kind(kind_of(first), kind_of(second))
    assert kind == common_kind(kind_of(second), kind_of(first))
    for text in (first, second):
        mine, total, exact = summed(text)
        values, basis = mine.decompose(total)
        promoted = kind.promote(basis, SIZE)
        assert promoted.kind == kind
        if kind != Identity():
            again = dense(kind, jax.tree.map(jnp.asarray, promoted.matrix(values)))
            np.testing.assert_allclose(again, restricted(text, exact), **CLOSE)


@kinds
def test_inner_products_of_vectors(text):
    kind, total, _ = summed(text)
    ours, theirs = kind.decompose(total)[1], kind.decompose(summed(text, seed=1)[1])[1]
    u, v = (Dense().promote(b, SIZE).vectors for b in (ours, theirs))
    found = Dense().promote(ours.times(theirs), SIZE).vectors
    np.testing.assert_allclose(found, np.swapaxes(u, -1, -2) @ v, **CLOSE)


@kinds
def test_texts_come_back(text):
    kind = kind_of(text)
    assert kind.text == text
    assert kind_of(kind.text) == kind
    assert hash(kind) == hash(kind_of(text))


@pytest.mark.parametrize("text", ["", "kronecker", "dense:4", "blocked:0", "blocked:x", 3, None])
def test_other_texts_are_refused(text):
    kinds = "'identity', 'diagonal', 'blocked:64', 'dense'"
    message = f"is no kind of factor; the kinds of `factor_kinds` are {kinds}"
    with pytest.raises(ValueError, match=message):
        kind_of(text)


def test_the_diagonal_of_complex_vectors_is_real():
    x = jnp.asarray([[[1.0 + 2.0j, 3.0j]]])
    np.testing.assert_allclose(Diagonal().sum(x, jnp.ones((1, 1, 1))), [[5.0, 9.0]])
