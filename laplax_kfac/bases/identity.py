"""Sides that are a multiple of the identity: one number, the mean of the diagonal.

The output side of ``forward_only`` is one, for nothing is pulled back to it. The multiple of the
identity that is nearest to a matrix S in Frobenius norm is ``trace(S) / p``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import pytrees
from laplax_kfac.bases.contract import Basis, Features, Kind, Side, Sum
from laplax_kfac.bases.diagonal import Diagonal, Unrotated
from laplax_kfac.bases.eigh import Eigh
from laplax_kfac.gram import Symmetric


@pytrees.register
@dataclass(frozen=True)
class Multiple:
    """Multiples of the identity.

    Attributes:
        scale: How much of it.
        size: Its width p.
    """

    scale: Float[Array, "*stack"]
    size: int = field(metadata={"static": True})


@dataclass(frozen=True)
class Identity(Kind):
    """A multiple of the identity: the mean of the diagonal."""

    name = "identity"
    generality = 0

    def sum(self, x: Features, weights: Float[Array, "..."]) -> Sum:
        """The mean over the diagonal of the weighted sum of ``x x^T``."""
        return self.of_diagonal(Diagonal().sum(x, weights))

    def of_matrix(self, matrix: Symmetric) -> Sum:
        """The mean of the diagonal."""
        return self.of_diagonal(Diagonal().of_matrix(matrix))

    def of_diagonal(self, values: Float[Array, "*stack p"]) -> Multiple:
        """The mean of the diagonal."""
        return Multiple(jnp.mean(values, axis=-1), values.shape[-1])

    def cross(self, x: Features, y: Features, axis: int | None = None) -> Sum:
        """The mean over the diagonal of the sum of ``x y^T``."""
        return self.of_diagonal(Diagonal().cross(x, y, axis))

    def inner(self, first: Multiple, second: Multiple) -> Float[Array, " stack"]:
        """``trace(a I b I) = a b p``."""
        return first.scale * second.scale * first.size

    def times(self, x: Features, total: Multiple, axis: int | None = None) -> Features:
        """All entries times one number."""
        return x * total.scale.reshape(*total.scale.shape, *[1] * (1 if axis is None else 2))

    def diagonal(self, total: Multiple) -> Float[Array, "*stack p"]:
        """The number, p times."""
        return total.scale[..., None] * jnp.ones(total.size, total.scale.dtype)

    def num_elements(self, size: int) -> int:
        """One."""
        return 1

    def matrices(self, total: Multiple) -> list[Float[Array, "... _ _"]]:
        """None: the axes are eigenvectors."""
        return []

    def eigenbasis(self, total: Multiple, found: Sequence[Eigh]) -> Side:
        """The number, p times, and the axes."""
        return self.diagonal(total), Unrotated(self)

    def promote(self, basis: Basis, size: int) -> Unrotated:
        """The axes."""
        return Unrotated(self)

    def basis_of(self, arrays: Sequence[Float[Array, "..."]]) -> Unrotated:
        """The axes, which are stored in nothing."""
        return Unrotated(self)

    def num_in_basis(self, size: int) -> int:
        """None."""
        return 0
