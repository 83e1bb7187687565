"""Gaussians over the model's outputs: what a predictive is."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from laplax_kfac import pytrees
from laplax_kfac.arguments import no_type_check, require_positive, shown


@no_type_check
def checked_noise(noise_variance: ArrayLike, shape: tuple[int, ...]) -> Float[Array, "*outputs"]:
    """The variance of the noise of every output, from one for all or one for each.

    Args:
        noise_variance: One number, or one for every output, in their shape or raveled.
        shape: The shape of the model's output.

    Raises:
        ValueError: If one is not positive and finite, or there is another number of them.
        TypeError: If it is no number.
    """
    require_positive("noise_variance", noise_variance)
    noise = jnp.asarray(noise_variance)
    outputs = math.prod(shape)
    if noise.shape not in ((), (outputs,), shape):
        msg = (
            f"`noise_variance` must be one number, or one for each of the {outputs} outputs; found "
            f"shape {noise.shape}."
        )
        raise ValueError(msg)
    return noise.reshape(shape) if noise.ndim else jnp.broadcast_to(noise, shape)


@pytrees.register
@dataclass(frozen=True)
class Predictive:
    """Gaussian over the model's outputs, one for each input.

    Attributes:
        mean: The model's outputs, in their shape: (N, C) for a vector, (N, tokens, classes), ...;
            raveled where the model has several outputs.
        covariance: Between the C outputs, raveled: shape (N, C, C).
    """

    mean: Float[Array, "N *outputs"]
    covariance: Float[Array, "N C C"]

    @property
    def variance(self) -> Float[Array, "N *outputs"]:
        """Diagonal of the covariances, in the shape of the mean."""
        return jnp.diagonal(self.covariance, axis1=-2, axis2=-1).reshape(self.mean.shape)

    @no_type_check
    def with_noise(self, noise_variance: ArrayLike) -> "Predictive":
        """The predictive of noisy observations: adds Gaussian noise to every output.

        The covariance must belong to the same noise: pass it to `predictive_covariance`, too.

        Args:
            noise_variance: Variance of the noise, positive; one number, or one for every output.

        Raises:
            ValueError: If it is not positive and finite, or of another shape.
            TypeError: If it is no number.
        """
        noise = checked_noise(noise_variance, self.mean.shape[1:])
        return Predictive(self.mean, self.covariance + jnp.diag(noise.ravel()))


@pytrees.register
@dataclass(frozen=True)
class Marginals:
    """A Gaussian for every single output of the model, for each input.

    Attributes:
        mean: The model's outputs, in their shape, as in `Predictive`.
        variance: Of the same shape.
    """

    mean: Float[Array, "N *outputs"]
    variance: Float[Array, "N *outputs"]

    @no_type_check
    def with_noise(self, noise_variance: ArrayLike) -> "Marginals":
        """The predictive of noisy observations; see `Predictive.with_noise`.

        Args:
            noise_variance: Variance of the noise, positive; one number, or one for every output.

        Raises:
            ValueError: If it is not positive and finite, or of another shape.
            TypeError: If it is no number.
        """
        noise = checked_noise(noise_variance, self.mean.shape[1:])
        return Marginals(self.mean, self.variance + noise)


@no_type_check
def require_predictive(predictive: object) -> None:
    """Refuse what is no Gaussian over outputs.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(predictive, Predictive | Marginals):
        msg = (
            "`predictive` must be what `predictive_covariance` or `predictive_variance` returned, "
            f"found {shown(predictive)}."
        )
        raise TypeError(msg)
