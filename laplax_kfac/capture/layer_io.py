"""What capture hands on of every use of a layer: its inputs, and the gradients at its output.

For every example n, vector r that is pulled back, and position t that shares the weight, a use has
inputs a and gradients g in the layer's own orientation and scale, so that

    sum_t a_nrt g_nrt^T  ==  d(loss_nr)/dW.

One side, `Cotangents`, differs between vectors; the other, what the model computed, does not. For a
transposed use, as of a weight tied to the output, it is the inputs that are cotangents. What the
model computed is `Features`; or `Patches` of convolutions, whose second moment takes less work from
what they are made of; or `Rows`, numbers that stand for one-hot vectors. Each is a type that knows
its second moment, of whatever kind the side's factor is, and its coordinates in a basis.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, Num, Shaped

from laplax_kfac import pytrees
from laplax_kfac.bases import Basis, Kind, Sum, sum_into_rows
from laplax_kfac.gram import bordered
from laplax_kfac.patterns import Moments, one_hot

_HIGHEST = jax.lax.Precision.HIGHEST
Values = Num[Array, "*batch columns S stack _"]
"""Vectors of a side; one column where the side is the same for all that are pulled back."""


def accumulate(x: Num[Array, "*axes"]) -> Inexact[Array, "*axes"]:
    """In a dtype to sum in: float32, or float64 where x64 is on."""
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


@pytrees.register
@dataclass(frozen=True)
class Counting:
    """What examples and positions count in second moments of a batch.

    Attributes:
        examples: What every example counts.
        inputs: What its inputs count; zeros where records have columns of an example that are not
            the first of it: what the model computed is the same for all.
        active: 1 where the use was evaluated.
        reduce: Whether positions are summed up first, over inputs as a mean (Eschenhagen et al.
            2023, Eq. 22), or count as examples do (Eq. 17).
    """

    examples: Float[Array, " N"]
    inputs: Float[Array, " N"]
    active: Float[Array, "N S stack"]
    reduce: bool = field(metadata={"static": True})

    def positions(self) -> Float[Array, "N 1 stack"]:
        """Positions at which the use was evaluated, at least one."""
        return jnp.maximum(jnp.sum(self.active, axis=1, keepdims=True), 1.0)

    def total(self) -> Float[Array, " stack"]:
        """How many examples, or positions of them, there are."""
        counts = jnp.max(self.active, axis=1, keepdims=True) if self.reduce else self.active
        return jnp.einsum("n,nsk->k", self.inputs, counts.astype(self.inputs.dtype))


class SideIO(ABC):
    """One side of a use, for one example or for many of them in front."""

    @property
    @abstractmethod
    def num_positions(self) -> int:
        """Positions S that share the weight."""

    @abstractmethod
    def features(self) -> Values:
        """The vectors, in the model's dtype."""

    @abstractmethod
    def second_moment(self, kind: Kind, counting: Counting) -> Sum:
        """Weighted sum of ``x x^T`` over examples, columns and positions, of a kind."""

    def rotated(self, basis: Basis) -> Inexact[Array, "*batch columns S stack _"]:
        """Coordinates of the vectors in a basis."""
        return basis.rotate(accumulate(self.features()))


@pytrees.register
@dataclass(frozen=True)
class Features(SideIO):
    """What the model computed.

    Attributes:
        values: One vector for every position and stack index.
    """

    values: Num[Array, "*batch S stack p"]

    @property
    def num_positions(self) -> int:
        """Positions S that share the weight."""
        return self.values.shape[-3]

    def features(self) -> Values:
        """The vectors, for all columns."""
        return self.values[..., None, :, :, :]

    def second_moment(self, kind: Kind, counting: Counting) -> Sum:
        """Of the vectors, or of their means over positions."""
        a = accumulate(self.values)
        if counting.reduce:
            a = jnp.sum(a, axis=1, keepdims=True) / counting.positions()[..., None]
        return kind.sum(a, counting.inputs[:, None, None, None])


@pytrees.register
@dataclass(frozen=True)
class Patches(SideIO):
    """Features whose second moment has a way of its own, which never forms them.

    Attributes:
        values: The vectors.
        operands: What they are made of.
        moments: See `patterns.Pattern.moments`.
        joint_bias: The last entry of all vectors, if the layer has a bias.
    """

    values: Features
    operands: tuple[Shaped[Array, "..."], ...]
    moments: Moments = field(metadata={"static": True})
    joint_bias: float | None = field(metadata={"static": True})

    @property
    def num_positions(self) -> int:
        """Positions S that share the weight."""
        return self.values.num_positions

    def features(self) -> Values:
        """The vectors, for all columns."""
        return self.values.features()

    def second_moment(self, kind: Kind, counting: Counting) -> Sum:
        """From the operands where all entries of it count."""
        if counting.reduce or not kind.holds_all:
            return self.values.second_moment(kind, counting)
        second, first = self.moments(tuple(map(accumulate, self.operands)), counting.inputs)
        if self.joint_bias is not None:
            corner = self.joint_bias**2 * counting.total()[:, None]
            border = jnp.concatenate([self.joint_bias * first, corner], axis=-1)
            second = bordered(second, border)
        return kind.of_matrix(second)


@pytrees.register
@dataclass(frozen=True)
class Rows(SideIO):
    """Row numbers, which stand for one-hot vectors.

    Attributes:
        numbers: The numbers, -1 for none: a vector of zeros.
        size: How many rows there are.
        dtype: Of the vectors.
    """

    numbers: Int[Array, "*batch S stack"]
    size: int = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})

    @property
    def num_positions(self) -> int:
        """Positions S that share the weight."""
        return self.numbers.shape[-2]

    def features(self) -> Values:
        """The one-hot vectors, for all columns."""
        return one_hot(self.numbers[..., None], self.size, self.dtype)[..., None, :, :, :]

    def same(self) -> Float[Array, "*batch S S stack"]:
        """1 where two positions of one example pick the same row."""
        pairs = self.numbers[..., :, None, :] == self.numbers[..., None, :, :]
        return pairs.astype(jnp.result_type(float))

    def second_moment(self, kind: Kind, counting: Counting) -> Sum:
        """How often every row is picked; by the mean over positions, as far as it is diagonal."""
        shares = jnp.ones_like(counting.active)
        if counting.reduce:
            shares = jnp.sum(self.same(), axis=2) / counting.positions() ** 2
        return kind.sum_rows(self.numbers, self.size, counting.inputs[:, None, None] * shares)

    def sum_into(
        self, values: Num[Array, "N S stack *out"]
    ) -> Num[Array, "stack {self.size} *out"]:
        """Add the values of all positions to the rows that these pick."""
        return sum_into_rows(self.size, self.numbers, values)


@pytrees.register
@dataclass(frozen=True)
class Cotangents(SideIO):
    """What is pulled back.

    Attributes:
        values: One vector for every column, position and stack index.
    """

    values: Float[Array, "*batch R S stack p"]

    @property
    def num_positions(self) -> int:
        """Positions S that share the weight."""
        return self.values.shape[-3]

    def features(self) -> Values:
        """The vectors, for every column."""
        return self.values

    def second_moment(self, kind: Kind, counting: Counting) -> Sum:
        """Of the vectors, or of their sums over positions; the identity if nothing is pulled back.

        With no columns at all (``forward_only``; Benzing 2022, arXiv 2201.12250; Petersen et al.
        2023, arXiv 2305.00604) it stands for ``sum_r g g^T`` at every position.
        """
        g = accumulate(self.values)
        if g.shape[1] == 0:
            return kind.identity(counting.total(), g.shape[-1])
        if counting.reduce:
            g = jnp.sum(g, axis=2, keepdims=True)
        return kind.sum(g, counting.examples[:, None, None, None, None])


@pytrees.register
@dataclass(frozen=True)
class LayerIO:
    """What one use of a layer saw, for one example or for many of them in front.

    Attributes:
        inputs: Vectors a of the layer's rows; a joint bias is the last.
        gradients: Vectors g of the layer's outputs.
        active: 1 where the use was evaluated, 0 where a cond did not take it.
        imaginary: Whether its positions are those of another use, which has the real part of the
            same complex numbers.
    """

    inputs: SideIO
    gradients: SideIO
    active: Float[Array, "*batch S stack"]
    imaginary: bool = field(default=False, metadata={"static": True})

    @property
    def num_positions(self) -> int:
        """Positions S that share the weight."""
        return self.active.shape[-2]

    @property
    def num_columns(self) -> int:
        """Vectors R that are pulled back."""
        found: int = self._by_origin()[1].values.shape[-4]
        return found

    def second_moments(
        self, kinds: tuple[Kind, ...], counting: Counting
    ) -> tuple[Sum, Sum, Float[Array, " stack"]]:
        """Second moments A and B of both sides, and the count M of what they are sums over."""
        inputs, outputs = kinds
        return (
            self.inputs.second_moment(inputs, counting),
            self.gradients.second_moment(outputs, counting),
            counting.total(),
        )

    def _by_origin(self) -> tuple[SideIO, Cotangents, bool]:
        """What the model computed, what is pulled back, and whether the latter are the inputs."""
        if isinstance(self.inputs, Cotangents):
            return self.gradients, self.inputs, True
        assert isinstance(self.gradients, Cotangents)
        return self.inputs, self.gradients, False

    def inner(self, matrices: Num[Array, "V stack rows out"]) -> Num[Array, "N R V stack"]:
        """``<G_nr, V>`` for the share G of this use in every example's gradient."""
        computed, pulled, exchanged = self._by_origin()
        matrices = matrices.swapaxes(-1, -2) if exchanged else matrices
        if isinstance(computed, Rows):
            rows = computed.numbers
            outputs = matrices[:, jnp.arange(rows.shape[-1]), rows] * (rows >= 0)[..., None]
            outputs = jnp.moveaxis(outputs, 0, 1)
        else:
            a = computed.features()[:, 0]
            outputs = jnp.einsum("nski,vkio->nvsko", a, matrices, precision=_HIGHEST)
        return jnp.einsum("nvsko,nrsko->nrvk", outputs, pulled.values, precision=_HIGHEST)

    def weighted_sum(self, weights: Num[Array, "N R V stack"]) -> Num[Array, "V stack rows out"]:
        """``sum_nr weights_nr G_nr`` for the share G of this use in every example's gradient."""
        computed, pulled, exchanged = self._by_origin()
        g = jnp.einsum("nrvk,nrsko->nvsko", weights, pulled.values, precision=_HIGHEST)
        if isinstance(computed, Rows):
            total = jnp.moveaxis(computed.sum_into(jnp.moveaxis(g, 1, -2)), -2, 0)
        else:
            a = computed.features()[:, 0]
            total = jnp.einsum("nski,nvsko->vkio", a, g, precision=_HIGHEST)
        return total.swapaxes(-1, -2) if exchanged else total


@pytrees.register
@dataclass(frozen=True)
class ParameterIO:
    """What a zero perturbation of parameters saw, for one example or for many of them in front.

    Attributes:
        gradients: Cotangents of the parameters: the exact per-example gradients.
    """

    gradients: Inexact[Array, "*batch R p"]

    def second_moment(self, kind: Kind, weights: Float[Array, " N"]) -> Sum:
        """Weighted sum of ``g g^T`` over examples and columns; the identity without columns."""
        return sum_of_gradients(self.gradients, kind, weights)


def sum_of_gradients(
    gradients: Inexact[Array, "N R p"], kind: Kind, weights: Float[Array, " N"]
) -> Sum:
    """Weighted sum of ``g g^T`` over examples and columns; the identity without columns."""
    g, weights = accumulate(gradients), accumulate(weights)
    if g.shape[1] == 0:
        total = kind.identity(jnp.sum(weights)[None], g.shape[-1])
    else:
        total = kind.sum(g[..., None, :], weights[:, None, None, None])
    return jax.tree.map(lambda x: x[0], total)


Record = tuple[LayerIO, ...] | ParameterIO | None
"""Of one layer: that of every use, or of its parameters; None if it plays no part."""
