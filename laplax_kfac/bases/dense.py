"""Dense sides: any symmetric matrix; its eigenvectors in the columns of one matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import pytrees
from laplax_kfac.bases.contract import Basis, Features, Kind, Side, Sum
from laplax_kfac.bases.eigh import Eigh
from laplax_kfac.gram import Symmetric, Tiled, first_rows, upper_tiles, weighted_product, whole

_HIGHEST = jax.lax.Precision.HIGHEST


@pytrees.register
@dataclass(frozen=True)
class DenseBasis(Basis):
    """Vectors of any direction.

    Attributes:
        vectors: The vectors, in columns.
    """

    vectors: Float[Array, "*stack p p"]

    @property
    def kind(self) -> "Dense":
        """The kind of the matrices that it diagonalises."""
        return Dense()

    def rotate(self, x: Features, axis: int | None = None) -> Features:
        """Coordinates ``U^T x`` of vectors."""
        if axis is None:
            return _times_features(x, self.vectors)
        return _times_matrices(x, self.vectors, axis)

    def rotate_back(self, x: Features, axis: int | None = None) -> Features:
        """The vectors ``U x`` with these coordinates."""
        return DenseBasis(self.vectors.swapaxes(-1, -2)).rotate(x, axis)

    def squared(self) -> "DenseBasis":
        """With squared entries."""
        return DenseBasis(self.vectors * self.vectors)

    def times(self, other: "DenseBasis") -> "DenseBasis":
        """``U^T V``."""
        transposed = self.vectors.swapaxes(-1, -2)
        return DenseBasis(jnp.matmul(transposed, other.vectors, precision=_HIGHEST))

    def matrix(self, values: Float[Array, "*stack p"]) -> Sum:
        """``U diag(values) U^T``."""
        columns = self.vectors * values[..., None, :]
        return jnp.matmul(columns, self.vectors.swapaxes(-1, -2), precision=_HIGHEST)


@dataclass(frozen=True)
class Dense(Kind):
    """Any symmetric matrix; wide ones are summed by the tiles on and above their diagonals."""

    name = "dense"
    generality = 3
    holds_all = True

    def sum(self, x: Features, weights: Float[Array, "..."]) -> Sum:
        """Weighted sum of x[n, k] x[n, k]^T for every stack index k."""
        if x.shape[-2] == 1:  # a plain matrix product is faster than a batch of one
            product = weighted_product(x[..., 0, :], weights[..., 0, :])
            return jax.tree.map(lambda tile: tile[None], product)
        y = (weights * x).reshape(-1, *x.shape[-2:])
        return upper_tiles(jnp.einsum("nkp,nkq->kpq", y, x.reshape(y.shape), precision=_HIGHEST))

    def of_matrix(self, matrix: Symmetric) -> Sum:
        """All of the matrix."""
        return matrix if isinstance(matrix, Tiled) else upper_tiles(matrix)

    def of_diagonal(self, values: Float[Array, "*stack p"]) -> Sum:
        """The diagonal matrix."""
        return upper_tiles(values[..., None] * jnp.eye(values.shape[-1], dtype=values.dtype))

    def cross(self, x: Features, y: Features, axis: int | None = None) -> Sum:
        """Sum of ``x y^T``."""
        equation = {None: "nkp,nkq->kpq", -2: "nkpi,nkqi->kpq", -1: "nkip,nkiq->kpq"}[axis]
        shape = x.shape[-2:] if axis is None else x.shape[-3:]
        pair = (z.reshape(-1, *shape) for z in (x, y))
        return jnp.einsum(equation, *pair, precision=_HIGHEST)

    def aligned(self, total: Sum) -> Sum:
        """By the tiles that a product has."""
        return upper_tiles(total) if isinstance(total, Tiled) else total

    def edge(self, total: Sum) -> list[Float[Array, "..."]]:
        """The first row."""
        return first_rows(total)

    def finished(self, total: Sum) -> Sum:
        """The whole matrix."""
        return whole(total)

    def times(self, x: Features, total: Sum, axis: int | None = None) -> Features:
        """Products of a matrix with vectors."""
        if axis is None:
            return jnp.einsum("...kp,kpq->...kq", x, total, precision=_HIGHEST)
        return _times_matrices(x, total, axis)

    def diagonal(self, total: Sum) -> Float[Array, "*stack p"]:
        """The diagonal of a matrix."""
        return jnp.diagonal(total, axis1=-2, axis2=-1)

    def num_elements(self, size: int) -> int:
        """All entries."""
        return size**2

    def decomposed(self, size: int) -> list[tuple[int, int]]:
        """All of it."""
        return [(size, 1)]

    def matrices(self, total: Sum) -> list[Float[Array, "... _ _"]]:
        """The matrix itself."""
        return [total]

    def eigenbasis(self, total: Sum, found: Sequence[Eigh]) -> Side:
        """Eigenvalues and eigenvectors of the matrix."""
        ((values, vectors),) = found
        return values, DenseBasis(vectors)

    def promote(self, basis: Basis, size: int) -> DenseBasis:
        """The vectors of any basis, written out."""
        if isinstance(basis, DenseBasis):
            return basis
        return DenseBasis(basis.rotate_back(jnp.eye(size), axis=-2))

    def basis_of(self, arrays: Sequence[Float[Array, "..."]]) -> DenseBasis:
        """The basis with these vectors."""
        return DenseBasis(*arrays)

    def num_in_basis(self, size: int) -> int:
        """A matrix of vectors."""
        return size**2


def _times_features(x: Features, matrix: Float[Array, "*stack p q"]) -> Features:
    if matrix.ndim == 2:  # not as a batch of one, of which XLA transposes the product
        return jnp.matmul(x, matrix, precision=_HIGHEST)
    return jnp.einsum("...ki,kij->...kj", x, matrix, precision=_HIGHEST)


def _times_matrices(x: Features, matrix: Float[Array, "*stack p q"], axis: int) -> Features:
    if axis == -1:
        return jnp.matmul(x, matrix, precision=_HIGHEST)
    return jnp.matmul(matrix.swapaxes(-1, -2), x, precision=_HIGHEST)
