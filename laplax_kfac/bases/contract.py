"""The contract of one side of a block: the kind of its sum, and the eigenbasis that it becomes.

A Kronecker block has an input and an output side, a dense or diagonal block one side. A *kind* says
which symmetric matrices a side may be: any (`Dense`), block-diagonal, diagonal, a multiple of the
identity. Each is a linear space of matrices, so that sums over data stay in it, and what is summed
is restricted to it: projected onto it in Frobenius norm. An instance is one file beside this one.

Vectors of a side lie along one axis of an array, in one of two orders:

* ``axis=None``: ``(*n, stack, p)``, features, as the model computes them: along the last axis;
* ``axis=-2`` or ``-1``: ``(*n, stack, p, q)`` or ``(*n, stack, q, p)``, a matrix for every stack
  index, with vectors in its columns or in its rows.

A basis may be without the stack axis; so may be, then, what it rotates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PyTree

from laplax_kfac.bases.eigh import Eigh, eigh_each
from laplax_kfac.gram import Symmetric

Sum: TypeAlias = PyTree[Float[Array, "..."]]
"""A sum of one side: added entry by entry; every array in it has the stack axis in front."""
Features: TypeAlias = Num[Array, "..."]
BasisOrSame = TypeVar("BasisOrSame", bound="Basis")


class Basis(ABC):
    """Orthonormal vectors of one side, the columns of U: a pytree, with a stack of them as well."""

    @property
    @abstractmethod
    def kind(self) -> "Kind":
        """The kind of the matrices ``U diag(values) U^T``."""

    @abstractmethod
    def rotate(self, x: Features, axis: int | None = None) -> Features:
        """Coordinates ``U^T x`` of vectors."""

    @abstractmethod
    def rotate_back(self, x: Features, axis: int | None = None) -> Features:
        """The vectors ``U x`` with these coordinates."""

    @abstractmethod
    def squared(self: BasisOrSame) -> BasisOrSame:
        """With squared entries: its `rotate_back` takes eigenvalues to the matrix's diagonal."""

    @abstractmethod
    def times(self: BasisOrSame, other: BasisOrSame) -> BasisOrSame:
        """``U^T V`` for a basis V of the same kind: inner products of the vectors of both."""

    @abstractmethod
    def matrix(self, values: Float[Array, "*stack p"]) -> Sum:
        """``U diag(values) U^T``, as a sum of this kind."""

    @property
    def num_elements(self) -> int:
        """How many numbers it is stored in."""
        return sum(x.size for x in jax.tree.leaves(self))


Side = tuple[Float[Array, "... _"], Basis]
"""Eigenvalues, not negative, and eigenvectors of one side."""


class Kind(ABC):
    """What matrices one side of a block may be: frozen, hashable, without data.

    Attributes:
        name: Its name in texts.
        generality: Kinds are ordered: each contains the matrices of those that come before.
        holds_all: Whether it holds all entries of a matrix, so that sums x x^T that are found
            without x save work.
    """

    name: ClassVar[str]
    generality: ClassVar[int]
    holds_all: ClassVar[bool] = False

    @property
    def text(self) -> str:
        """The kind as text, for records and files; `kind_of` gives it back."""
        return self.name

    # -- sums ----------------------------------------------------------------------------------

    @abstractmethod
    def sum(self, x: Features, weights: Float[Array, "..."]) -> Sum:
        """Weighted sum of ``x x^T`` over all leading axes.

        Args:
            x: Features, shape (*n, stack, p).
            weights: Not negative; they broadcast against ``x``, with a last axis of one.
        """

    def sum_rows(
        self, rows: Int[Array, "N S stack"], size: int, weights: Float[Array, "N S stack"]
    ) -> Sum:
        """`sum` of one-hot vectors of that size, by row numbers; -1 stands for zeros."""
        return self.of_diagonal(sum_into_rows(size, rows, weights))

    @abstractmethod
    def of_matrix(self, matrix: Symmetric) -> Sum:
        """What is of this kind in a symmetric matrix (*stack, p, p)."""

    @abstractmethod
    def of_diagonal(self, values: Float[Array, "*stack p"]) -> Sum:
        """What is of this kind in a diagonal matrix."""

    def identity(self, counts: Float[Array, " stack"], size: int) -> Sum:
        """A multiple of the identity for every stack index."""
        return self.of_diagonal(counts[:, None] * jnp.ones(size, counts.dtype))

    @abstractmethod
    def cross(self, x: Features, y: Features, axis: int | None = None) -> Sum:
        """Sum of ``x y^T``, which is symmetric, over all axes but the stack and that of vectors."""

    def aligned(self, total: Sum) -> Sum:
        """The one form in which sums can be added, from whatever form they were made in."""
        return total

    def finished(self, total: Sum) -> Sum:
        """The sum with all its entries, where some were left out while it grew."""
        return total

    def edge(self, total: Sum) -> list[Float[Array, "..."]]:
        """Some entries of a sum: NaN or infinite wherever a vector was; all of them by default."""
        return jax.tree.leaves(total)

    def inner(self, first: Sum, second: Sum) -> Float[Array, " stack"]:
        """Inner products ``trace(first second)`` of finished sums."""
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        products = [
            jnp.einsum(
                "kp,kp->k", *(x.reshape(len(x), -1) for x in pair),
                precision=jax.lax.Precision.HIGHEST,
            )
            for pair in pairs
        ]  # fmt: skip
        return jnp.sum(jnp.stack(products), axis=0) if len(products) > 1 else products[0]

    @abstractmethod
    def times(self, x: Features, total: Sum, axis: int | None = None) -> Features:
        """Products of a finished sum with vectors, in their place."""

    def form(self, x: Features, total: Sum) -> Float[Array, "*n stack"]:
        """Quadratic forms ``x^T total x`` of features."""
        return jnp.sum(self.times(x, total) * x, axis=-1)

    @abstractmethod
    def diagonal(self, total: Sum) -> Float[Array, "*stack p"]:
        """The diagonal of a finished sum."""

    @abstractmethod
    def num_elements(self, size: int) -> int:
        """How many numbers a finished sum of vectors of that size has."""

    # -- bases ---------------------------------------------------------------------------------

    @abstractmethod
    def matrices(self, total: Sum) -> list[Float[Array, "... _ _"]]:
        """The matrices whose eigendecompositions `eigenbasis` needs."""

    def decomposed(self, size: int) -> list[tuple[int, int]]:
        """Width of the `matrices` for vectors of that size, and how many are one stack of them."""
        del size
        return []

    @abstractmethod
    def eigenbasis(self, total: Sum, found: Sequence[Eigh]) -> Side:
        """Eigenvalues and eigenvectors of a finished sum.

        Args:
            total: The sum, with or without the stack axis.
            found: Eigendecompositions of its `matrices`.
        """

    def decompose(self, total: Sum) -> Side:
        """Eigenvalues and eigenvectors of one finished sum, with or without the stack axis."""
        return self.eigenbasis(total, eigh_each(self.matrices(total)))

    @abstractmethod
    def promote(self, basis: Basis, size: int) -> Basis:
        """A basis of a less general kind as one of this kind."""

    @abstractmethod
    def basis_of(self, arrays: Sequence[Float[Array, "..."]]) -> Basis:
        """The basis with these arrays as its leaves, as read from a file."""

    @abstractmethod
    def num_in_basis(self, size: int) -> int:
        """How many numbers a basis for vectors of that size has."""


def sum_into_rows(
    size: int, rows: Int[Array, "N S stack"], values: Num[Array, "N S stack *out"]
) -> Num[Array, "stack {size} *out"]:
    """Add the values of all positions to the rows that these pick; -1 picks none."""
    stack = rows.shape[-1]
    total = jnp.zeros((stack, size, *values.shape[3:]), values.dtype)
    kept = jnp.where(rows < 0, size, rows)  # beyond the last row: dropped
    return total.at[jnp.arange(stack), kept].add(values, mode="drop")
