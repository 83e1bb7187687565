"""Curvature blocks: an orthogonal basis, and eigenvalues in it.

Every block, whatever its kind, is a *rotated diagonal*: a vector in the block is an array with one
or two axes, ``basis`` holds one orthogonal matrix per axis (None: the identity), ``eigenvalues``
has the array's shape. Everything downstream is then one code path: rotate, apply a function of
the eigenvalues, rotate back. A stack of blocks has one more axis in front, everywhere.

=============================  ==============  ==========================================
block                          basis           eigenvalues
=============================  ==============  ==========================================
Kronecker                      (U_A, U_B)      outer(alpha, beta), shape (rows, out)
Kronecker, a side diagonal     (None, U_B)     the same
dense                          (U,)            (p,)
diagonal                       (None,)         (p,)
=============================  ==============  ==========================================
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from laplax_kfac import pytrees
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Segment


@pytrees.register
@dataclass(frozen=True)
class Block:
    """A symmetric matrix ``U diag(eigenvalues) U^T`` with ``U`` the product of ``basis``.

    Attributes:
        basis: One orthogonal matrix (stack..., n, n) per axis, eigenvectors in its columns; or
            None for the identity.
        eigenvalues: Shape (stack..., n) or (stack..., n, m): one for every basis vector.
    """

    basis: tuple[Float[Array, "*stack _ _"] | None, ...]
    eigenvalues: Float[Array, "*stack_and_axes"]


Matrix = TypeVar("Matrix", bound="BlockDiagonal")
Side = tuple[Float[Array, "... _"], Float[Array, "... _ _"] | None]
"""Eigenvalues and eigenvectors of a symmetric matrix; None: those of a diagonal one."""
_SMALL = 512
"""Width up to which matrices are decomposed in one program, and together if of one width."""


def block_of_sides(sides: Sequence[Side]) -> Block:
    """The Kronecker product of one or two matrices from their eigendecompositions."""
    (eigenvalues, _), *rest = sides
    for more, _ in rest:
        eigenvalues = eigenvalues[..., :, None] * more[..., None, :]
    return Block(tuple(basis for _, basis in sides), eigenvalues)


def dense_block(matrix: Float[Array, "*stack p p"]) -> Block:
    """The block of a dense positive semi-definite matrix."""
    return block_of_sides([eigh(matrix)])


def diagonal_block(diagonal: Float[Array, "*stack p"]) -> Block:
    """The block of a diagonal matrix."""
    return Block((None,), diagonal)


def eigh(
    matrix: Float[Array, "*stack n n"],
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n n"]]:
    """Eigenvalues, clipped at zero, and eigenvectors of a positive semi-definite matrix."""
    eigenvalues, vectors = _eigh(0.5 * (matrix + matrix.swapaxes(-1, -2)))
    return jnp.clip(eigenvalues, 0.0), vectors


def eigh_each(matrices: Sequence[Float[Array, "... _ _"]]) -> list[Side]:
    """`eigh` of several matrices: wide ones one after the other, small ones in one program.

    Of a program, a CPU decomposes several at the same time, and the threads of LAPACK, which has
    work for all of them in one wide matrix, wait for each other: up to twice the processor time.
    """
    small = iter(_eigh_of_small([x for x in matrices if x.shape[-1] <= _SMALL]))
    return [next(small) if x.shape[-1] <= _SMALL else _eigh_of_wide(x) for x in matrices]


@jax.jit
def _eigh_of_small(matrices: Sequence[Float[Array, "... _ _"]]) -> list[Side]:
    """Those of one width are decomposed together, by one call that is compiled."""
    found: dict[int, Side] = {}
    for n in {x.shape[-1] for x in matrices}:
        numbers = [k for k, x in enumerate(matrices) if x.shape[-1] == n]
        stacks = [matrices[k].reshape(-1, n, n) for k in numbers]
        cuts = np.cumsum([len(x) for x in stacks])[:-1]
        parts = zip(*(jnp.split(y, cuts) for y in eigh(jnp.concatenate(stacks))), strict=True)
        for k, (values, vectors) in zip(numbers, parts, strict=True):
            shape = matrices[k].shape
            found[k] = values.reshape(shape[:-1]), vectors.reshape(shape)
    return [found[k] for k in range(len(matrices))]


_eigh_of_wide = jax.jit(eigh)


@jax.custom_jvp
def _eigh(matrix: Float[Array, "*stack n n"]) -> tuple[Array, Array]:
    if matrix.ndim == 2:
        return _eigh_of_one(matrix)
    # On a CPU, XLA spreads a batch over the threads that it also waits for it with: two batches
    # at once can stop for ever (jaxlib 0.10.2). A loop has one matrix at a time.
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    values, vectors = jax.lax.platform_dependent(
        flat, cpu=functools.partial(jax.lax.map, _eigh_of_one), default=_eigh_of_one
    )
    return values.reshape(matrix.shape[:-1]), vectors.reshape(matrix.shape)


def _eigh_of_one(matrix: Float[Array, "*stack n n"]) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@_eigh.defjvp
def _eigh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    """Derivative that leaves the basis within an eigenspace alone.

    JAX's own divides by the gaps between eigenvalues, which are rounding errors in the null space
    of a factor. No function of the matrix depends on the basis within an eigenspace.
    """
    (matrix,), (tangent,) = primals, tangents
    values, vectors = _eigh(matrix)
    inner = vectors.swapaxes(-1, -2) @ tangent @ vectors
    gaps = values[..., None, :] - values[..., :, None]
    largest = jnp.max(jnp.abs(values), axis=-1)[..., None, None]
    close = jnp.abs(gaps) <= 100 * jnp.finfo(values.dtype).eps * largest
    weights = jnp.where(close, 0.0, 1.0 / jnp.where(close, 1.0, gaps))
    change = jnp.diagonal(inner, axis1=-2, axis2=-1), vectors @ (weights * inner)
    return (values, vectors), change


def rotate(block: Block, v: Float[Array, "*stack_and_axes"]) -> Float[Array, "*stack_and_axes"]:
    """Coordinates of a vector in the block's basis: ``U^T v``."""
    return _rotate(block, v, transpose=True)


def rotate_back(
    block: Block, v: Float[Array, "*stack_and_axes"]
) -> Float[Array, "*stack_and_axes"]:
    """The vector with these coordinates in the block's basis: ``U v``."""
    return _rotate(block, v, transpose=False)


def _rotate(block: Block, v: Float[Array, "..."], *, transpose: bool) -> Float[Array, "..."]:
    axes = len(block.basis)
    for axis, matrix in enumerate(block.basis):
        if matrix is None:
            continue
        rotation = matrix.swapaxes(-1, -2) if transpose else matrix
        if axis == axes - 1 and axes == 2:  # V @ U^T acts on columns
            v = jnp.matmul(v, rotation.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)
        elif axes == 2:
            v = jnp.matmul(rotation, v, precision=jax.lax.Precision.HIGHEST)
        else:
            v = jnp.matmul(rotation, v[..., None], precision=jax.lax.Precision.HIGHEST)[..., 0]
    return v


def apply(block: Block, v: Float[Array, "*stack_and_axes"]) -> Float[Array, "*stack_and_axes"]:
    """The block times a vector."""
    return rotate_back(block, block.eigenvalues * rotate(block, v))


def diagonal(block: Block) -> Float[Array, "*stack_and_axes"]:
    """Diagonal of the block, as an array like a vector in it."""
    squares = [None if u is None else u * u for u in block.basis]
    return _rotate(Block(tuple(squares), block.eigenvalues), block.eigenvalues, transpose=False)


# -- all blocks of a model ---------------------------------------------------------------------


@pytrees.register
@dataclass(frozen=True)
class BlockDiagonal:
    """A symmetric matrix on the parameters, with one block per layer.

    Attributes:
        blocks: The blocks, one per layer.
        layers: Which parameters each block is on.
        space: Structure of the parameters.
    """

    blocks: tuple[Block, ...]
    layers: tuple[Layer, ...] = field(metadata={"static": True})
    space: ParameterSpace = field(metadata={"static": True})

    def read(self, v: PyTree) -> list[Float[Array, "..."]]:
        """View a pytree like the parameters in every block: arrays of the blocks' shapes."""
        leaves = self.space.flatten(v)
        return [_read(self.space, layer, leaves) for layer in self.layers]

    def write(self, parts: Sequence[Float[Array, "..."]]) -> PyTree:
        """Assemble a pytree like the parameters from arrays of the blocks' shapes."""
        pieces = []
        for layer, part in zip(self.layers, parts, strict=True):
            pieces += _pieces(layer, part)
        return self.space.unflatten(self.space.write(pieces))

    def map(self: Matrix, function: Callable[[Array], Array]) -> Matrix:
        """The matrix with a function applied to every eigenvalue."""
        blocks = tuple(replace(b, eigenvalues=function(b.eigenvalues)) for b in self.blocks)
        return replace(self, blocks=blocks)

    def num_free(self) -> int:
        """Number of parameters that are not frozen."""
        return sum(layer.size for layer in self.layers if not layer.frozen)

    def mv(self, v: PyTree) -> PyTree:
        """Matrix-vector product.

        Args:
            v: Pytree like the parameters.

        Returns:
            The product, in the dtypes of ``v``.

        Raises:
            ValueError: If ``v`` has another structure or other shapes than the parameters.
        """
        parts = [apply(b, x) for b, x in zip(self.blocks, self.read(v), strict=True)]
        return jax.tree.map(lambda out, x: out.astype(jnp.result_type(x)), self.write(parts), v)

    def to_dense(self) -> Float[Array, "P P"]:
        """The whole matrix in laplax's flat order: `jax.tree.leaves`, each raveled."""
        dtype = jnp.result_type(*(b.eigenvalues for b in self.blocks))
        dense = jnp.zeros((self.space.size, self.space.size), dtype)
        for block, layer in zip(self.blocks, self.layers, strict=True):
            rows = [self.space.ids(segment) for segment in layer.segments]
            ids = np.concatenate(rows, axis=-2 if rows[0].ndim > 1 else 0).ravel()
            eye = jnp.eye(layer.size, dtype=dtype).reshape(layer.size, *layer.shape)
            columns = jax.vmap(lambda v, b=block: apply(b, v))(eye)
            columns = columns.reshape(layer.size, layer.size)
            dense = dense.at[ids[:, None], ids[None, :]].set(columns)
        return dense

    def diagonal(self) -> PyTree:
        """Diagonal of the matrix, as a pytree like the parameters."""
        return self.write([diagonal(b) for b in self.blocks])

    def trace(self) -> Float[Array, ""]:
        """Trace of the matrix."""
        return sum((jnp.sum(b.eigenvalues) for b in self.blocks), jnp.zeros(()))

    def quadratic_form(self, v: PyTree) -> Float[Array, ""]:
        """``v^T M v``, with M the matrix, on all but frozen parameters.

        It is exact, and costs half a product with the matrix. A sum of several Kronecker blocks,
        which has no eigendecomposition of its own, is a sum of these.

        Args:
            v: Pytree like the parameters.

        Raises:
            ValueError: If ``v`` has another structure or other shapes than the parameters.
        """
        total = jnp.zeros(())
        for block, layer, part in zip(self.blocks, self.layers, self.read(v), strict=True):
            if not layer.frozen:
                total = total + jnp.sum(block.eigenvalues * jnp.abs(rotate(block, part)) ** 2)
        return total

    def log_determinant(self) -> Float[Array, ""]:
        """Logarithm of the determinant on all but frozen parameters; -inf if singular."""
        pairs = zip(self.blocks, self.layers, strict=True)
        logs = [jnp.sum(jnp.log(b.eigenvalues)) for b, layer in pairs if not layer.frozen]
        return sum(logs, jnp.zeros(()))


def _read(space: ParameterSpace, layer: Layer, leaves: Sequence[Array]) -> Num[Array, "..."]:
    rows = [space.read(segment, leaves) for segment in layer.segments]
    if not layer.is_matrix:
        return rows[0]
    matrix = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)
    return matrix.reshape(layer.shape)


def _pieces(layer: Layer, part: Float[Array, "..."]) -> list[tuple[Segment, Array]]:
    if not layer.is_matrix:
        return [(layer.segments[0], part)]
    matrix = part.reshape(layer.stack, layer.rows, layer.out_features)
    cuts = np.cumsum([s.shape[1] for s in layer.segments])[:-1]
    return list(zip(layer.segments, jnp.split(matrix, cuts, axis=1), strict=True))
