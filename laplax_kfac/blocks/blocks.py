"""Curvature blocks: an orthogonal basis, and eigenvalues in it.

Every block, whatever its kind, is a *rotated diagonal*: a vector in the block is an array with one
or two axes, ``sides`` holds a basis for each, ``eigenvalues`` has the array's shape. Everything
downstream is then one code path: rotate, apply a function of the eigenvalues, rotate back. A stack
of blocks has one more axis in front, everywhere.

=============================  ========================  ====================================
block                          sides                     eigenvalues
=============================  ========================  ====================================
Kronecker                      (U_A, U_B), of any kinds  outer(alpha, beta), shape (rows, out)
dense                          (U,)                      (p,)
diagonal                       (UNROTATED,)              (p,)
=============================  ========================  ====================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PyTree

from laplax_kfac import jaxprs, machine, pytrees, summaries
from laplax_kfac.arguments import no_type_check
from laplax_kfac.bases import UNROTATED, Basis, Dense, Side
from laplax_kfac.blocks.operators import linear_operator
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.layer import Layer, Repeated
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Segment

if TYPE_CHECKING:
    import lineax


@pytrees.register
@dataclass(frozen=True)
class Block:
    """A symmetric matrix ``U diag(eigenvalues) U^T`` with ``U`` the product of the sides' bases.

    Attributes:
        sides: One basis for every axis of a vector in the block.
        eigenvalues: Shape (stack..., n) or (stack..., n, m): one for every basis vector.
    """

    sides: tuple[Basis, ...]
    eigenvalues: Float[Array, "*stack_and_axes"]


Matrix = TypeVar("Matrix", bound="BlockDiagonal")


def block_of_sides(sides: Sequence[Side]) -> Block:
    """The Kronecker product of one or two matrices from their eigendecompositions."""
    (eigenvalues, _), *rest = sides
    for more, _ in rest:
        eigenvalues = eigenvalues[..., :, None] * more[..., None, :]
    return Block(tuple(basis for _, basis in sides), eigenvalues)


def dense_block(matrix: Float[Array, "*stack p p"]) -> Block:
    """The block of a dense positive semi-definite matrix."""
    return block_of_sides([Dense().decompose(matrix)])


def diagonal_block(diagonal: Float[Array, "*stack p"]) -> Block:
    """The block of a diagonal matrix."""
    return Block((UNROTATED,), diagonal)


def rotate(block: Block, v: Num[Array, "*axes"]) -> Num[Array, "*axes"]:
    """Coordinates of a vector in the block's basis: ``U^T v``."""
    return along_axes(block.sides, v, lambda basis, x, axis: basis.rotate(x, axis))


def rotate_back(block: Block, v: Num[Array, "*axes"]) -> Num[Array, "*axes"]:
    """The vector with these coordinates in the block's basis: ``U v``."""
    return along_axes(block.sides, v, lambda basis, x, axis: basis.rotate_back(x, axis))


def along_axes(
    sides: tuple[Basis, ...],
    v: Num[Array, "*axes"],
    function: Callable[[Basis, Array, int], Array],
) -> Num[Array, "*axes"]:
    """Apply a function of matrices whose vectors lie along an axis, -2 or -1, to every axis."""
    if len(sides) == 1:
        return function(sides[0], v[..., None], -2)[..., 0]
    return function(sides[1], function(sides[0], v, -2), -1)


def apply(block: Block, v: Num[Array, "*axes"]) -> Num[Array, "*axes"]:
    """The block times a vector."""
    return rotate_back(block, block.eigenvalues * rotate(block, v))


def diagonal(block: Block) -> Float[Array, "*stack_and_axes"]:
    """Diagonal of the block, as an array like a vector in it."""
    squares = Block(tuple(basis.squared() for basis in block.sides), block.eigenvalues)
    return rotate_back(squares, block.eigenvalues)


# -- all blocks of a model ---------------------------------------------------------------------


@jax.jit
def are_finite(arrays: Sequence[Num[Array, "..."]]) -> list[Bool[Array, ""]]:
    """Whether all entries of each array are finite."""
    return [jnp.all(jnp.isfinite(x)) for x in arrays]


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

    def summary_lines(self) -> list[str]:
        """What printing shows: how many layers and parameters, and a line a layer."""
        covered = [layer for layer in self.layers if not layer.frozen]
        frozen = self.space.size - self.num_free()
        heading = (
            f"{type(self).__name__} of {len(covered)} layers, {self.num_free():,} parameters"
            f"{f' ({frozen:,} frozen)' if frozen else ''}"
        )
        rows = [
            (like.label, layer.block, layer.size_text, f"{layer.size:,} parameters")
            for like in Repeated.among(covered)
            for layer in like.layers[:1]
        ]
        return [heading, *summaries.aligned(rows)]

    def read(self, v: PyTree) -> list[Num[Array, "..."]]:
        """View a pytree like the parameters in every block: arrays of the blocks' shapes."""
        leaves = self.space.flatten(v)
        return [read(self.space, layer, leaves) for layer in self.layers]

    def write(self, parts: Sequence[Num[Array, "..."]]) -> PyTree:
        """Assemble a pytree like the parameters from arrays of the blocks' shapes."""
        pieces = []
        for layer, part in zip(self.layers, parts, strict=True):
            pieces += _pieces(layer, part)
        return self.space.unflatten(self.space.write(pieces))

    def map(self: Matrix, function: Callable[[Array], Array]) -> Matrix:
        """The matrix with a function applied to every eigenvalue."""
        blocks = tuple(replace(b, eigenvalues=function(b.eigenvalues)) for b in self.blocks)
        return replace(self, blocks=blocks)

    def of_scaled_loss(self: Matrix, factor: Float[Array, ""] | float | int) -> Matrix:
        """The matrix of a loss that is so many times this one: as many times the matrix."""
        return self.map(lambda values: factor * values)

    def nonfinite_layers(self) -> list[str]:
        """Names of the layers with eigenvalues that are NaN or infinite; none while traced."""
        covered = [(ly, b) for ly, b in zip(self.layers, self.blocks, strict=True) if not ly.frozen]
        values = [block.eigenvalues for _, block in covered]
        if jaxprs.is_traced(values):
            return []
        # NumPy has nothing to compile, and a CPU's arrays are its own.
        finite = [np.isfinite(x).all() for x in values] if machine.on_cpu() else are_finite(values)
        return [layer.name for (layer, _), flag in zip(covered, finite, strict=True) if not flag]

    def is_zero(self) -> bool:
        """Whether all layers with a block have eigenvalues of zero; False while traced."""
        pairs = zip(self.layers, self.blocks, strict=True)
        values = [block.eigenvalues for layer, block in pairs if layer.block != "none"]
        if not values or jaxprs.is_traced(values):
            return False
        anything = np.any if machine.on_cpu() else jnp.any
        return not any(bool(anything(x)) for x in values)

    def num_free(self) -> int:
        """Number of parameters that are not frozen."""
        return sum(layer.size for layer in self.layers if not layer.frozen)

    @on_automatic_axes
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

    @no_type_check
    def as_linear_operator(self) -> "lineax.FunctionLinearOperator":
        """The matrix as an operator of lineax, symmetric and positive semi-definite.

        A flat one, of vectors in laplax's order, is
        ``lambda v: ravel(operator.mv(unravel(v)))``, with `jax.flatten_util.ravel_pytree`.

        Raises:
            ImportError: If lineax is not installed.
            ValueError: If some parameters are no real numbers.
        """
        return linear_operator(self.mv, self.space)

    @on_automatic_axes
    def to_dense(self) -> Float[Array, "P P"]:
        """The whole matrix in laplax's flat order: `jax.tree.leaves`, each raveled.

        A complex number is two parameters in this order, its real and its imaginary part.
        """
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

    @on_automatic_axes
    def diagonal(self) -> PyTree:
        """Diagonal of the matrix, as a pytree like the parameters."""
        return self.write([diagonal(b) for b in self.blocks])

    @on_automatic_axes
    def trace(self) -> Float[Array, ""]:
        """Trace of the matrix."""
        return sum((jnp.sum(b.eigenvalues) for b in self.blocks), jnp.zeros(()))

    @on_automatic_axes
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

    @on_automatic_axes
    def log_determinant(self) -> Float[Array, ""]:
        """Logarithm of the determinant on all but frozen parameters; -inf if singular."""
        pairs = zip(self.blocks, self.layers, strict=True)
        logs = [jnp.sum(jnp.log(b.eigenvalues)) for b, layer in pairs if not layer.frozen]
        return sum(logs, jnp.zeros(()))


def read(space: ParameterSpace, layer: Layer, leaves: Sequence[Array]) -> Num[Array, "..."]:
    """View leaves like the parameters in the block of a layer: an array of its shape."""
    rows = [space.read(segment, leaves) for segment in layer.segments]
    if not layer.is_matrix:
        return rows[0]
    matrix = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)
    return matrix.reshape(layer.shape)


def _pieces(layer: Layer, part: Num[Array, "..."]) -> list[tuple[Segment, Array]]:
    if not layer.is_matrix:
        return [(layer.segments[0], part)]
    matrix = part.reshape(layer.stack, layer.rows, layer.out_features)
    cuts = np.cumsum([s.shape[1] for s in layer.segments])[:-1]
    return list(zip(layer.segments, jnp.split(matrix, cuts, axis=1), strict=True))
