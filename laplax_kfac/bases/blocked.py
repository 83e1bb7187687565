"""Block-diagonal sides: neighbouring features in blocks of one size, the last one of what is left.

A dense factor of n features has n^2 numbers and an eigendecomposition of n^3 operations; in blocks
of k, it has n k and n k^2. Each block is a dense side, and the blocks of a side are a stack of
these: all is left to `DenseBasis`, with the axis of the blocks behind that of the stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import pytrees
from laplax_kfac.bases.contract import Basis, Features, Kind, Side, Sum
from laplax_kfac.bases.dense import Dense, DenseBasis
from laplax_kfac.bases.eigh import Eigh
from laplax_kfac.gram import Symmetric, whole

DENSE = Dense()
Blocks = tuple[Float[Array, "... _ _ _"], ...]
"""The blocks of k features, (*stack, blocks, k, k), and then, if some are left, that of these."""


def spans(width: int, size: int) -> list[tuple[int, int, int]]:
    """(first, last, size) of the features in whole blocks, and of those that are left."""
    cut = width // size * size
    found = [(0, cut, size), (cut, width, width - cut)]
    return [span for span in found if span[0] < span[1]]


def split(x: Features, size: int, axis: int | None = None) -> list[Features]:
    """Vectors by blocks: with an axis of blocks behind that of the stack; see the contract."""
    along = axis or -1
    parts = []
    for first, last, each in spans(x.shape[along], size):
        part = x[..., first:last, :] if along == -2 else x[..., first:last]
        part = part.reshape(*part.shape[: x.ndim + along], -1, each, *x.shape[x.ndim + along + 1 :])
        parts.append(jnp.moveaxis(part, -2, -3) if axis == -1 else part)
    return parts


def joined(parts: Sequence[Features], axis: int | None = None) -> Features:
    """The vectors of which these are the parts."""
    found = []
    for part in parts:
        moved = jnp.moveaxis(part, -3, -2) if axis == -1 else part
        blocks = moved.ndim - (3 if axis == -2 else 2)
        found.append(moved.reshape(*moved.shape[:blocks], -1, *moved.shape[blocks + 2 :]))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=axis or -1)


def as_stack(x: Features, behind: int) -> Features:
    """The stack and the blocks as one axis, with so many axes behind it."""
    return x.reshape(*x.shape[: -behind - 2], -1, *x.shape[-behind:])


def rotated(
    x: Features, matrices: Blocks, size: int, axis: int | None, *, back: bool = False
) -> Features:
    """Vectors times the matrices of their blocks, transposed; not transposed if back."""
    found = []
    for part, matrix in zip(split(x, size, axis), matrices, strict=True):
        vectors = matrix.swapaxes(-1, -2) if back else matrix
        if axis is None and matrix.ndim == 4:
            flat = DenseBasis(vectors.reshape(-1, *vectors.shape[-2:])).rotate(as_stack(part, 1))
            found.append(flat.reshape(part.shape))
        else:
            found.append(DenseBasis(vectors).rotate(part, axis))
    return joined(found, axis)


@dataclass(frozen=True)
class Blocked(Kind):
    """A block-diagonal matrix.

    Attributes:
        size: Features of a block.
    """

    size: int = 64
    name = "blocked"
    generality = 2

    def __post_init__(self) -> None:
        """Refuse blocks without features.

        Raises:
            ValueError: If there are none.
        """
        if self.size < 1:
            msg = f"a block needs at least one feature, found {self.size}"
            raise ValueError(msg)

    @property
    def text(self) -> str:
        """With the size of the blocks."""
        return f"{self.name}:{self.size}"

    def sum(self, x: Features, weights: Float[Array, "..."]) -> Blocks:
        """The blocks of the weighted sum of ``x x^T``."""
        found = []
        for part in split(x, self.size):
            blocks, each = part.shape[-2:]
            of_block = weights if weights.shape[-2] == 1 else jnp.repeat(weights, blocks, axis=-2)
            total = whole(DENSE.sum(as_stack(part, 1), of_block))
            found.append(total.reshape(-1, blocks, each, each))
        return tuple(found)

    def of_matrix(self, matrix: Symmetric) -> Blocks:
        """The blocks on the diagonal."""
        matrix, found = whole(matrix), []
        for first, last, each in spans(matrix.shape[-1], self.size):
            part = matrix[..., first:last, first:last]
            part = part.reshape(*matrix.shape[:-2], -1, each, (last - first) // each, each)
            found.append(jnp.moveaxis(jnp.diagonal(part, axis1=-4, axis2=-2), -1, -3))
        return tuple(found)

    def of_diagonal(self, values: Float[Array, "*stack p"]) -> Blocks:
        """Blocks with these diagonals."""
        parts = split(values, self.size)
        return tuple(part[..., None] * jnp.eye(part.shape[-1], dtype=part.dtype) for part in parts)

    def cross(self, x: Features, y: Features, axis: int | None = None) -> Blocks:
        """The blocks of the sum of ``x y^T``."""
        found = []
        behind = 1 if axis is None else 2
        for u, v in zip(split(x, self.size, axis), split(y, self.size, axis), strict=True):
            total = DENSE.cross(as_stack(u, behind), as_stack(v, behind), axis)
            blocks = u.shape[-behind - 1]
            found.append(total.reshape(-1, blocks, *total.shape[1:]))
        return tuple(found)

    def edge(self, total: Blocks) -> list[Float[Array, "..."]]:
        """The first row of every block."""
        return [block[..., 0, :] for block in total]

    def times(self, x: Features, total: Blocks, axis: int | None = None) -> Features:
        """Products of the blocks with their vectors."""
        return rotated(x, total, self.size, axis)

    def diagonal(self, total: Blocks) -> Float[Array, "*stack p"]:
        """The diagonals of the blocks."""
        return joined([DENSE.diagonal(block) for block in total])

    def num_elements(self, size: int) -> int:
        """All entries of the blocks."""
        return sum((last - first) * each for first, last, each in spans(size, self.size))

    def decomposed(self, size: int) -> list[tuple[int, int]]:
        """The whole blocks, and what is left."""
        return [(each, (last - first) // each) for first, last, each in spans(size, self.size)]

    def matrices(self, total: Blocks) -> list[Float[Array, "... _ _"]]:
        """The blocks."""
        return list(total)

    def eigenbasis(self, total: Blocks, found: Sequence[Eigh]) -> Side:
        """Eigenvalues and eigenvectors of all blocks."""
        basis = BlockedBasis(tuple(vectors for _, vectors in found), self)
        return joined([values for values, _ in found]), basis

    def promote(self, basis: Basis, size: int) -> "BlockedBasis":
        """The axes of every block, for a kind without blocks has no other vectors."""
        if isinstance(basis, BlockedBasis):
            return basis
        return BlockedBasis(self.of_diagonal(jnp.ones(size)), self)

    def basis_of(self, arrays: Sequence[Float[Array, "..."]]) -> "BlockedBasis":
        """The basis with these vectors."""
        return BlockedBasis(tuple(arrays), self)

    def num_in_basis(self, size: int) -> int:
        """A matrix of vectors for every block."""
        return self.num_elements(size)


@pytrees.register
@dataclass(frozen=True)
class BlockedBasis(Basis):
    """Vectors that are zero outside a block.

    Attributes:
        vectors: The vectors of every block, in columns.
        of: The kind of matrices that they are the eigenvectors of.
    """

    vectors: Blocks
    of: Blocked = field(metadata={"static": True})

    @property
    def kind(self) -> Blocked:
        """The kind of the matrices that it diagonalises."""
        return self.of

    def rotate(self, x: Features, axis: int | None = None) -> Features:
        """Coordinates ``U^T x`` of vectors."""
        return rotated(x, self.vectors, self.of.size, axis)

    def rotate_back(self, x: Features, axis: int | None = None) -> Features:
        """The vectors ``U x`` with these coordinates."""
        return rotated(x, self.vectors, self.of.size, axis, back=True)

    def squared(self) -> "BlockedBasis":
        """With squared entries."""
        return BlockedBasis(tuple(u * u for u in self.vectors), self.of)

    def times(self, other: "BlockedBasis") -> "BlockedBasis":
        """``U^T V``, block by block."""
        pairs = zip(self.vectors, other.vectors, strict=True)
        products = (DenseBasis(u).times(DenseBasis(v)).vectors for u, v in pairs)
        return BlockedBasis(tuple(products), self.of)

    def matrix(self, values: Float[Array, "*stack p"]) -> Sum:
        """``U diag(values) U^T``, block by block."""
        pairs = zip(self.vectors, split(values, self.of.size), strict=True)
        return tuple(DenseBasis(u).matrix(part) for u, part in pairs)
