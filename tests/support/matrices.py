"""A block-diagonal matrix with one block of each kind, and the same matrix written out densely."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laplax_kfac.bases import UNROTATED, Basis, Dense, Diagonal
from laplax_kfac.blocks.blocks import (
    Block,
    BlockDiagonal,
    block_of_sides,
    dense_block,
    diagonal_block,
)
from laplax_kfac.parsing.layer import BlockKind, Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import make_segment


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def positive(*shape: int, seed: int = 0) -> Any:
    """Random positive definite matrices, the last axis twice."""
    root = normal(*shape, shape[-1], seed=seed)
    return root @ root.swapaxes(-1, -2)


def kronecker_block(
    inputs: Any,
    outputs: Any,
    diagonal: tuple[bool, bool] = (False, False),
) -> Block:
    """The block that takes a matrix V (rows, out) to ``inputs @ V @ outputs``.

    Args:
        inputs: Shape (stack..., rows, rows), or (stack..., rows) if it is diagonal.
        outputs: Shape (stack..., out, out), or (stack..., out) if it is diagonal.
        diagonal: Whether each of the two is diagonal.
    """
    factors = jnp.asarray(inputs), jnp.asarray(outputs)
    kinds = [Diagonal() if is_diagonal else Dense() for is_diagonal in diagonal]
    return block_of_sides([kind.decompose(x) for kind, x in zip(kinds, factors, strict=True)])


def basis_of(vectors: Any) -> Basis:
    """Of orthonormal vectors in columns; None stands for the axes."""
    return UNROTATED if vectors is None else Dense().basis_of([jnp.asarray(vectors)])


def vectors_of(basis: Basis, size: int) -> Any:
    """The vectors of a basis, in columns."""
    return Dense().promote(basis, size).rotate_back(jnp.eye(size), axis=-2)


A, B, P = positive(4, seed=1), positive(3, seed=2), positive(6, seed=3)
D = np.abs(normal(5, seed=4))
AS, BS = positive(2, 4, seed=6), positive(2, 3, seed=7)
A5 = positive(5, seed=8)

PARAMS = {
    "fused": {"k": np.zeros((2, 3)), "q": np.zeros((2, 3))},  # one weight of two leaves
    "joint": {"b": np.zeros(3), "w": np.zeros((4, 3))},
    "mixed": np.zeros(11),  # holds a dense block on scattered ids, and an idle rest
    "stack": np.zeros((4, 2, 3)),  # stack axis in the middle
    "step": np.zeros((), np.int32),
    "vector": np.zeros(5),
}
SPACE = ParameterSpace.of(PARAMS)
K, Q, JOINT_B, JOINT_W, MIXED, STACK, STEP, VECTOR = (SPACE.leaf_ids(k) for k in range(8))
SOME = np.asarray([7, 1, 3, 4, 10, 0])
REST = np.asarray([2, 5, 6, 8, 9])


def layer(
    name: str,
    block: BlockKind,
    segments: list[Any],
    rows: int,
    out: int = 1,
    *,
    stack: int = 1,
    bias: bool = False,
) -> Layer:
    return Layer(
        name, "test", (name,), block, rows, out, stack=stack, bias=bias,
        segments=tuple(make_segment(s) for s in segments),
    )  # fmt: skip


LAYERS = (
    layer("fused", "kronecker", [np.concatenate([K, Q])[None]], 4, 3),
    layer("joint", "kronecker", [JOINT_W[None], JOINT_B[None, None]], 4, 3, bias=True),
    layer("some", "dense", [MIXED[SOME]], 6),
    layer("rest", "none", [MIXED[REST]], 5),
    layer("stack", "kronecker", [STACK.transpose(1, 0, 2)], 4, 3, stack=2),
    layer("step", "none", [STEP.ravel()], 1),
    layer("vector", "diagonal", [VECTOR], 5),
)


@functools.cache
def matrix() -> BlockDiagonal:
    """One block of each kind."""
    with jax.ensure_compile_time_eval():  # it may be called while something is traced
        return BlockDiagonal(
            (
                kronecker_block(A, B),
                kronecker_block(A5, B),
                dense_block(jnp.asarray(P)),
                diagonal_block(jnp.zeros(5)),
                kronecker_block(AS, BS),
                diagonal_block(jnp.zeros(1)),
                diagonal_block(jnp.asarray(D)),
            ),
            LAYERS,
            SPACE,
        )


def dense_matrix() -> np.ndarray:
    """The same by fancy indexing: the position of every row of every block, written out."""
    dense = np.zeros((SPACE.size, SPACE.size))
    rows = np.concatenate([K, Q]).ravel()
    dense[np.ix_(rows, rows)] = np.kron(A, B)
    rows = np.concatenate([JOINT_W, JOINT_B[None]]).ravel()
    dense[np.ix_(rows, rows)] = np.kron(A5, B)
    dense[np.ix_(MIXED[SOME], MIXED[SOME])] = P
    for k in range(2):
        rows = STACK[:, k].ravel()
        dense[np.ix_(rows, rows)] = np.kron(AS[k], BS[k])
    dense[VECTOR, VECTOR] = D
    return dense


def tree(flat: Any) -> Any:
    """A flat vector as a pytree like PARAMS; the integer leaf as a float."""
    leaves = [
        jnp.asarray(part.reshape(s))
        for part, s in zip(np.split(flat, SPACE.offsets[1:-1]), SPACE.shapes, strict=True)
    ]
    return jax.tree.unflatten(SPACE.treedef, leaves)
