"""Blocks against dense linear algebra: Kronecker, stacked, dense, diagonal, none, scattered."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support.matrices import (
    AS,
    BS,
    LAYERS,
    SOME,
    SPACE,
    A,
    B,
    D,
    P,
    basis_of,
    dense_matrix,
    kronecker_block,
    matrix,
    normal,
    tree,
)  # fmt: skip
from support.tolerances import tolerance

from laplax_kfac.blocks.blocks import (
    Block,
    BlockDiagonal,
    apply,
    dense_block,
    diagonal,
    diagonal_block,
    rotate,
    rotate_back,
)

pytestmark = pytest.mark.usefixtures("x64")


# -- one block ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A block, and the dense matrices (one for each stack index) that it stands for."""

    name: str
    make: Callable[[], Block]
    shape: tuple[int, ...]
    dense: np.ndarray

    def __str__(self) -> str:
        return self.name


LOW_RANK = normal(6, 2, seed=5) @ normal(6, 2, seed=5).T
CASES = [
    Case("kronecker", lambda: kronecker_block(A, B), (4, 3), np.kron(A, B)[None]),
    Case(
        "stack of kronecker",
        lambda: kronecker_block(AS, BS),
        (2, 4, 3),
        np.stack([np.kron(a, b) for a, b in zip(AS, BS, strict=True)]),
    ),
    Case(
        "stack of one",
        lambda: kronecker_block(AS[:1], BS[:1]),
        (1, 4, 3),
        np.kron(AS[0], BS[0])[None],
    ),
    Case(
        "kronecker with a diagonal side",
        lambda: Block(
            (basis_of(None), basis_of(jnp.linalg.eigh(B)[1])), D[:, None] * jnp.linalg.eigh(B)[0]
        ),
        (5, 3),
        np.kron(np.diag(D), B)[None],
    ),
    Case("dense", lambda: dense_block(jnp.asarray(P)), (6,), P[None]),
    Case("singular dense", lambda: dense_block(jnp.asarray(LOW_RANK)), (6,), LOW_RANK[None]),
    Case("stack of dense", lambda: dense_block(jnp.asarray(AS)), (2, 4), AS),
    Case("diagonal", lambda: diagonal_block(jnp.asarray(D)), (5,), np.diag(D)[None]),
    Case("none", lambda: diagonal_block(jnp.zeros(5)), (5,), np.zeros((1, 5, 5))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_is_its_dense_matrix(case):
    stack, p, _ = case.dense.shape
    v = normal(*case.shape)

    @jax.jit
    def everything(v):
        block = case.make()
        back = rotate_back(block, rotate(block, v))
        return apply(block, v), diagonal(block), rotate(block, v), back, block.eigenvalues

    product, diag, rotated, back, eigenvalues = everything(v)
    flat = v.reshape(stack, p)
    expected = np.einsum("kij,kj->ki", case.dense, flat).reshape(case.shape)
    np.testing.assert_allclose(product, expected, **tolerance(jnp.float64))
    expected = np.einsum("kii->ki", case.dense).reshape(case.shape)
    np.testing.assert_allclose(diag, expected, **tolerance(jnp.float64))
    assert eigenvalues.shape == case.shape
    expected = np.linalg.eigvalsh(case.dense)
    found = np.sort(eigenvalues.reshape(stack, p))
    np.testing.assert_allclose(found, expected, atol=1e-12 * expected.max() + 1e-12, rtol=1e-9)
    # The basis is orthogonal: it keeps lengths, and back is the inverse.
    np.testing.assert_allclose(np.linalg.norm(rotated), np.linalg.norm(v), rtol=1e-12)
    np.testing.assert_allclose(back, v, **tolerance(jnp.float64))


# -- all blocks of a model ---------------------------------------------------------------------


def test_segments_of_the_example_are_of_all_kinds():
    kinds = {type(s.place).__name__ for one in LAYERS for s in one.segments}
    assert kinds == {"Contiguous", "Scattered"}
    assert SPACE.size == 6 + 6 + 3 + 12 + 11 + 24 + 1 + 5


def test_to_dense_is_in_the_flat_order_of_the_leaves():
    found = jax.jit(BlockDiagonal.to_dense)(matrix())
    np.testing.assert_allclose(found, dense_matrix(), **tolerance(jnp.float64))


def test_mv_diagonal_and_trace_agree_with_the_dense_matrix():
    v = normal(SPACE.size)
    product, diag, trace = jax.jit(lambda m, v: (m.mv(v), m.diagonal(), m.trace()))(
        matrix(), tree(v)
    )
    dense = dense_matrix()
    for result in (product, diag):
        assert jax.tree.all(jax.tree.map(lambda x, p: x.shape == p.shape, result, tree(v)))
    np.testing.assert_allclose(ravel_pytree(product)[0], dense @ v, **tolerance(jnp.float64))
    np.testing.assert_allclose(ravel_pytree(diag)[0], np.diag(dense), **tolerance(jnp.float64))
    np.testing.assert_allclose(trace, np.trace(dense), **tolerance(jnp.float64))


def test_log_determinant_is_that_of_the_dense_matrix():
    assert matrix().log_determinant() == -np.inf  # blocks of zeros
    shifted = matrix().map(lambda e: 2.0 * e + 0.3)
    expected = np.linalg.slogdet(2.0 * dense_matrix() + 0.3 * np.eye(SPACE.size))
    assert expected[0] == 1
    np.testing.assert_allclose(shifted.log_determinant(), expected[1], **tolerance(jnp.float64))


def test_map_is_a_function_of_the_matrix():
    values, vectors = np.linalg.eigh(dense_matrix())
    values = np.clip(values, 0.0, None)
    expected = (vectors * np.exp(-values)) @ vectors.T
    found = jax.jit(lambda m: m.map(lambda e: jnp.exp(-e)).to_dense())(matrix())
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_read_and_write_are_inverse_and_in_the_shapes_of_the_blocks():
    v = tree(normal(SPACE.size))
    parts = matrix().read(v)
    assert [p.shape for p in parts] == [(4, 3), (5, 3), (6,), (5,), (2, 4, 3), (1,), (5,)]
    np.testing.assert_array_equal(parts[0][2:], v["fused"]["q"])
    np.testing.assert_array_equal(parts[1][-1], v["joint"]["b"])  # the bias is the last row
    np.testing.assert_array_equal(parts[2], v["mixed"][SOME])
    np.testing.assert_array_equal(parts[4][1], v["stack"][:, 1])
    back = matrix().write(parts)
    for got, want in zip(*map(jax.tree.leaves, (back, v)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_have_the_dtypes_of_the_vector(dtype):
    v = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(normal(SPACE.size)))
    v["vector"] = v["vector"].astype(jnp.float64)
    product = matrix().mv(v)
    assert jax.tree.map(jnp.result_type, product) == jax.tree.map(jnp.result_type, v)
    exact = dense_matrix() @ np.asarray(ravel_pytree(jax.tree.map(np.float64, v))[0])
    found = np.asarray(ravel_pytree(jax.tree.map(np.float64, product))[0])
    # Rounding of the result alone: the computation is in float64.
    np.testing.assert_allclose(found, exact, rtol=float(jnp.finfo(dtype).eps))


def test_a_matrix_goes_through_vmap_and_grad():
    scales = jnp.asarray([0.5, 2.0])
    v = tree(normal(SPACE.size))
    products = jax.jit(jax.vmap(lambda s: matrix().map(lambda e: s * e).mv(v)))(scales)
    dense = dense_matrix()
    for k, scale in enumerate(scales):
        got = ravel_pytree(jax.tree.map(lambda x, k=k: x[k], products))[0]
        np.testing.assert_allclose(
            got, scale * dense @ ravel_pytree(v)[0], **tolerance(jnp.float64)
        )
    gradient = jax.grad(lambda s: matrix().map(lambda e: s * e).trace())(1.0)
    np.testing.assert_allclose(gradient, np.trace(dense), **tolerance(jnp.float64))


@pytest.mark.parametrize(
    "v",
    [
        {**tree(normal(SPACE.size)), "vector": np.zeros(4)},
        {**tree(normal(SPACE.size)), "more": np.zeros(4)},
        np.zeros(SPACE.size),
    ],
    ids=["shape", "structure", "flat"],
)
def test_vectors_of_another_structure_are_refused(v):
    message = "`v` must be a pytree with the structure and shapes of `params`"
    with pytest.raises(ValueError, match=message):
        matrix().mv(v)
