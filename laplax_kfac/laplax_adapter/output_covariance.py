"""The covariance of the outputs at one input, in the form that laplax's pushforward works with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import laplax.util.mv
import numpy as np
from jaxtyping import Array, Float, Int

from laplax_kfac.posterior.posterior import Posterior


@dataclass(frozen=True)
class OutputCovariance:
    """Covariance of the outputs at one input, as a product with vectors.

    Attributes:
        shape: Shape of the model's output.
        variance: Makes the variances of the raveled output, (C,).
        covariance: Makes their covariance, (C, C).
    """

    shape: tuple[int, ...]
    variance: Callable[[], Float[Array, " C"]]
    covariance: Callable[[], Float[Array, "C C"]]

    def __call__(
        self, vector: Float[Array, "..."] | Float[np.ndarray, "..."]
    ) -> Float[Array, "..."]:
        """The product with a vector like the output."""
        flat = jnp.reshape(vector, -1)
        product = jnp.matmul(self.covariance(), flat, precision=jax.lax.Precision.HIGHEST)
        return product.reshape(self.shape)

    def to_dense(self) -> Float[Array, "..."]:
        """The covariance with its second axis in the shape of the output, all axes reversed."""
        dense = self.covariance()
        return dense.reshape(len(dense), *self.shape).transpose()


class Numbered(NamedTuple):
    """Stands for one input of a dataset, or for all of them."""

    number: Int[Array, "*N"]


@dataclass(frozen=True)
class Tabulated:
    """The state of a posterior, and the output variances or covariances at all inputs of a dataset.

    Attributes:
        posterior: The posterior.
        shape: Shape of the model's output.
        spreads: Variances of the raveled output, (N, C), or covariances, (N, C, C).
    """

    posterior: Posterior
    shape: tuple[int, ...]
    spreads: Float[Array, "N C"] | Float[Array, "N C C"]

    def at(self, x: Numbered) -> OutputCovariance:
        """Covariance of the outputs at one input."""
        spread = self.spreads[x.number]
        diagonal = spread if spread.ndim == 1 else jnp.diagonal(spread)
        return OutputCovariance(self.shape, lambda: diagonal, lambda: spread)


def answer_at_once() -> None:
    """Let laplax's functions of products take variances and covariances as they are."""

    def diagonal(mv: OutputCovariance, *_: object, **__: object) -> Float[Array, " C"]:
        return mv.variance()

    def to_dense(mv: OutputCovariance, *_: object, **__: object) -> Float[Array, "..."]:
        return mv.to_dense()

    laplax.util.mv.diagonal.register(OutputCovariance)(diagonal)
    laplax.util.mv.to_dense.register(OutputCovariance)(to_dense)
