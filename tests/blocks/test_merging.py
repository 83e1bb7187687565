"""Sums of curvatures against dense matrices, and against the nearest Kronecker product by SVD."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models
from support.matrices import (
    basis_of,
    dense_matrix,
    kronecker_block,
    matrix,
    normal,
    positive,
    vectors_of,
)
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.bases import UNROTATED
from laplax_kfac.blocks.blocks import Block, BlockDiagonal, apply, dense_block
from laplax_kfac.blocks.merging import add_blocks

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
ROWS, OUT = 4, 3


def dense(block: Block) -> np.ndarray:
    """The matrix of a block without a stack."""
    shape = block.eigenvalues.shape
    eye = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.asarray(jax.vmap(lambda v: apply(block, v))(eye)).reshape(len(eye), -1)


def corrected(seed: int) -> Block:
    """A Kronecker eigenbasis with eigenvalues that are no outer product, as EKFAC has them."""
    block = kronecker_block(positive(ROWS, seed=seed), positive(OUT, seed=seed + 1))
    return replace(block, eigenvalues=jnp.asarray(normal(ROWS, OUT, seed=seed) ** 2))


def one_side_diagonal(seed: int) -> Block:
    inputs = jnp.asarray(normal(ROWS, seed=seed) ** 2)
    return kronecker_block(inputs, positive(OUT, seed=seed + 1), (True, False))


def nearest_kronecker(total: np.ndarray) -> np.ndarray:
    """By the largest singular vectors of the rearranged matrix (Van Loan & Pitsianis 1993)."""
    pairs = total.reshape(ROWS, OUT, ROWS, OUT).transpose(0, 2, 1, 3).reshape(ROWS**2, OUT**2)
    u, s, vt = np.linalg.svd(pairs)
    return s[0] * np.kron(u[:, 0].reshape(ROWS, ROWS), vt[0].reshape(OUT, OUT))


PAIRS = {
    "Kronecker": lambda s: kronecker_block(positive(ROWS, seed=s), positive(OUT, seed=s + 1)),
    "corrected": corrected,
    "one side diagonal": one_side_diagonal,
}


@pytest.mark.parametrize("kind", PAIRS)
def test_kronecker_blocks_have_the_basis_of_the_nearest_product(kind):
    first, second = PAIRS[kind](1), PAIRS[kind](5)
    found = add_blocks(first, second)
    exact = dense(first) + dense(second)
    nearest = nearest_kronecker(exact)
    vectors = dense(replace(found, eigenvalues=jnp.ones_like(found.eigenvalues)))
    np.testing.assert_allclose(vectors, np.eye(ROWS * OUT), **CLOSE)  # the basis is orthogonal
    bases = [vectors_of(u, n) for u, n in zip(found.sides, (ROWS, OUT), strict=True)]
    rotation = np.kron(*bases)
    rotated = rotation.T @ nearest @ rotation
    np.testing.assert_allclose(rotated - np.diag(np.diag(rotated)), 0.0, atol=1e-9)
    expected = np.diag(rotation.T @ exact @ rotation)
    np.testing.assert_allclose(found.eigenvalues.ravel(), expected, **CLOSE)
    np.testing.assert_allclose(found.eigenvalues.sum(), np.trace(exact), **CLOSE)
    ours, theirs = (np.linalg.norm(exact - m) for m in (dense(found), nearest))
    assert ours < 0.999 * theirs  # and farther than nothing: the sum is no Kronecker product
    assert ours > 1e-3


def shuffled(block: Block) -> Block:
    """The same matrix, with eigenvectors in another order and of other signs."""
    order = np.asarray([2, 0, 3, 1])
    u, v = block.sides
    return Block((basis_of(-vectors_of(u, ROWS)[:, order]), v), block.eigenvalues[order])


def test_what_is_exact_stays_exact():
    block = corrected(1)
    multiple = Block((UNROTATED, UNROTATED), jnp.full((ROWS, OUT), 0.7))
    one_axis = [dense_block(jnp.asarray(positive(6, seed=s))) for s in (1, 2)]
    cases = {
        "a basis in another order": (block, shuffled(corrected(1))),
        "a multiple of the identity": (block, multiple),
        "nothing": (block, replace(corrected(5), eigenvalues=jnp.zeros((ROWS, OUT)))),
        "a factor in common": (
            kronecker_block(positive(ROWS, seed=1), positive(OUT, seed=2)),
            kronecker_block(positive(ROWS, seed=3), positive(OUT, seed=2)),
        ),
        "dense": one_axis,
        "dense and diagonal": (one_axis[0], Block((UNROTATED,), jnp.arange(1.0, 7.0))),
    }
    for name, (first, second) in cases.items():
        for found in (add_blocks(first, second), add_blocks(second, first)):
            np.testing.assert_allclose(
                dense(found), dense(first) + dense(second), err_msg=name, **CLOSE
            )


def test_stacks_are_added_one_by_one():
    def block(seed: int) -> Block:
        return kronecker_block(positive(2, ROWS, seed=seed), positive(2, OUT, seed=seed + 1))

    first, second = block(1), block(5)
    found = add_blocks(first, second)
    for k in range(2):
        a, b, total = (jax.tree.map(lambda x, k=k: x[k], m) for m in (first, second, found))
        np.testing.assert_allclose(dense(total), dense(add_blocks(a, b)), **CLOSE)


def test_every_block_of_a_matrix_is_added():
    doubled = laplax_kfac.merge(matrix(), matrix().map(lambda x: 2.0 * x))
    np.testing.assert_allclose(doubled.to_dense(), 3.0 * dense_matrix(), **CLOSE)


# -- curvatures of models ----------------------------------------------------------------------


@functools.cache
def tasks() -> tuple[laplax_kfac.Curvature, laplax_kfac.Curvature]:
    """Curvatures of one model at the parameters of two tasks."""
    model_fn, params, inputs, n_out = models.by_name("mlp").make()
    data = inputs, jnp.zeros((len(inputs), n_out))
    moved = jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), params)
    first = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    accumulate = laplax_kfac.accumulator(model_fn, moved, loss_fn="mse")
    return first, accumulate.finalize(accumulate.update(accumulate.init(), data))


def test_merged_curvatures_are_curvatures():
    first, second = tasks()
    merged = laplax_kfac.merge(first, second)
    assert isinstance(merged, laplax_kfac.Curvature)
    assert merged.layers == first.layers
    np.testing.assert_allclose(merged.trace(), first.trace() + second.trace(), **CLOSE)
    exact = first.to_dense() + second.to_dense()
    error = np.linalg.norm(merged.to_dense() - exact) / np.linalg.norm(exact)
    assert error < 0.3
    np.testing.assert_allclose(
        laplax_kfac.merge(second, first).to_dense(), merged.to_dense(), **CLOSE
    )
    jitted = jax.jit(laplax_kfac.merge)(first, second)
    np.testing.assert_allclose(jitted.to_dense(), merged.to_dense(), **CLOSE)


def test_numbers_of_positions_may_differ():
    first, second = tasks()
    longer = replace(second, layers=tuple(replace(ly, positions=9) for ly in second.layers))
    merged = laplax_kfac.merge(first, longer)
    assert merged.layers == first.layers


def test_frozen_parameters_stay_frozen():
    model_fn, params, inputs, n_out = models.by_name("mlp").make()
    data = inputs, jnp.zeros((len(inputs), n_out))
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", params_filter="lin2")
    merged = laplax_kfac.merge(curvature, curvature)
    np.testing.assert_allclose(merged.to_dense(), 2.0 * curvature.to_dense(), **CLOSE)
    precision = laplax_kfac.make_posterior(
        curvature, laplax_kfac.make_posterior(curvature, 0.5)
    ).precision
    expected = laplax_kfac.make_posterior(merged, 0.5).precision
    for ours, theirs in zip(precision.blocks, expected.blocks, strict=True):
        np.testing.assert_allclose(ours.eigenvalues, theirs.eigenvalues, **CLOSE)


def test_other_layers_are_refused():
    first, _ = tasks()
    other = BlockDiagonal(matrix().blocks, matrix().layers, matrix().space)
    with pytest.raises(ValueError, match=r"must be of the same layers; found .'lin1', 'lin2'. and"):
        laplax_kfac.merge(first, other)
    with pytest.raises(ValueError, match="must be of the same layers"):
        laplax_kfac.merge(replace(first, layers=first.layers[::-1]), first)


def test_an_empirical_fisher_matrix_is_not_added_to_another_curvature():
    first, second = tasks()
    empirical = replace(second, degree=2)
    with pytest.raises(ValueError, match="two curvatures of one Fisher type; found an empirical"):
        laplax_kfac.merge(first, empirical)
    assert laplax_kfac.merge(empirical, empirical).degree == 2


@pytest.mark.parametrize("what", ["posterior", "statistics"])
def test_what_is_no_curvature_is_refused(what):
    first, _ = tasks()
    model_fn, params, *_ = models.by_name("mlp").make()
    others: dict[str, Any] = {
        "posterior": laplax_kfac.make_posterior(first, 1.0),
        "statistics": laplax_kfac.accumulator(model_fn, params, loss_fn="mse").init(),
    }
    with pytest.raises(TypeError, match=f"`second` must be a curvature.*found a {what.title()}"):
        laplax_kfac.merge(first, others[what])
