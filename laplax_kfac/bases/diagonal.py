"""Diagonal sides: entries that do not mix, such as rows of a table that data pick."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import pytrees
from laplax_kfac.bases.contract import Basis, Features, Kind, Side, Sum
from laplax_kfac.bases.eigh import Eigh
from laplax_kfac.gram import Symmetric, whole


@dataclass(frozen=True)
class Diagonal(Kind):
    """A diagonal matrix: its entries."""

    name = "diagonal"
    generality = 1

    def sum(self, x: Features, weights: Float[Array, "..."]) -> Sum:
        """Weighted sums of squares; of absolute values where vectors are complex."""
        squares = jnp.real(weights * x * jnp.conj(x))
        return jnp.sum(squares, axis=tuple(range(x.ndim - 2)))

    def of_matrix(self, matrix: Symmetric) -> Sum:
        """The diagonal."""
        return jnp.diagonal(whole(matrix), axis1=-2, axis2=-1)

    def of_diagonal(self, values: Float[Array, "*stack p"]) -> Sum:
        """The entries themselves."""
        return values

    def cross(self, x: Features, y: Features, axis: int | None = None) -> Sum:
        """Sums of products."""
        stack, last = (-2, -1) if axis is None else (-3, axis)
        kept = {x.ndim + stack, x.ndim + last}
        return jnp.sum(x * y, axis=tuple(k for k in range(x.ndim) if k not in kept))

    def times(self, x: Features, total: Sum, axis: int | None = None) -> Features:
        """Entries times entries."""
        return x * (total if axis is None else jnp.expand_dims(total, -3 - axis))

    def diagonal(self, total: Sum) -> Float[Array, "*stack p"]:
        """All that there is."""
        return total

    def num_elements(self, size: int) -> int:
        """The entries on the diagonal."""
        return size

    def matrices(self, total: Sum) -> list[Float[Array, "... _ _"]]:
        """None: the axes are eigenvectors."""
        return []

    def eigenbasis(self, total: Sum, found: Sequence[Eigh]) -> Side:
        """The entries, and the axes."""
        return total, Unrotated(self)

    def promote(self, basis: Basis, size: int) -> "Unrotated":
        """The axes."""
        return Unrotated(self)

    def basis_of(self, arrays: Sequence[Float[Array, "..."]]) -> "Unrotated":
        """The axes, which are stored in nothing."""
        return Unrotated(self)

    def num_in_basis(self, size: int) -> int:
        """None."""
        return 0


@pytrees.register
@dataclass(frozen=True)
class Unrotated(Basis):
    """The coordinate axes: eigenvectors of all diagonal matrices.

    Attributes:
        of: The kind of matrices that they are the eigenvectors of.
    """

    of: Kind = field(default=Diagonal(), metadata={"static": True})

    @property
    def kind(self) -> Kind:
        """The kind of the matrices that they diagonalise."""
        return self.of

    def rotate(self, x: Features, axis: int | None = None) -> Features:
        """The vectors as they are."""
        return x

    def rotate_back(self, x: Features, axis: int | None = None) -> Features:
        """The vectors as they are."""
        return x

    def squared(self) -> "Unrotated":
        """Ones and zeros stay what they are."""
        return self

    def times(self, other: "Unrotated") -> "Unrotated":
        """The identity matrix."""
        return self

    def matrix(self, values: Float[Array, "*stack p"]) -> Sum:
        """The diagonal matrix, or what is of the kind in it."""
        return self.of.of_diagonal(values)


UNROTATED = Unrotated()
