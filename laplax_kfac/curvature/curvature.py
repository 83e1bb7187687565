"""The curvature of the loss at the trained parameters."""

from dataclasses import dataclass, field

from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import no_type_check, positive_integer
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.posterior.posterior import make_posterior
from laplax_kfac.posterior.prior import PriorPrecision, Scalar


@dataclass(frozen=True)
class Origin:
    """What a curvature was computed of.

    Attributes:
        loss: Name of the likelihood; empty where it is a callable, of which nothing is known.
        fisher_type: The Fisher type.
        input_ranks: How many axes the arrays of an example have; empty where examples differ.
    """

    loss: str
    fisher_type: str
    input_ranks: tuple[int, ...] = ()


@pytrees.register
@dataclass(frozen=True)
class Curvature(BlockDiagonal):
    """Curvature of the loss at the trained parameters: a sum over the data, without a prior.

    A pytree: it goes through ``jit``, ``vmap`` and ``grad``. `mv`, `to_dense`, `diagonal` and
    `trace` are of the curvature alone; the methods here add a prior, posterior precision being
    ``curvature + prior_prec * I``; ``prior_prec`` is a scalar, an array with one value a layer,
    or a pytree prefix of the parameters, or what `tune` returned; ``noise_variance`` is that of
    ``mse``, see `make_posterior`.

    Attributes:
        degree: Power of the loss that it scales with: 2 for an empirical Fisher matrix, a sum of
            products of gradients; 1 for all others.
        origin: What it was computed of; None if that is not known.
    """

    degree: int = field(default=1, metadata={"static": True})
    origin: Origin | None = field(default=None, metadata={"static": True})

    def of_scaled_loss(self, factor: Float[Array, ""] | float | int) -> "Curvature":
        """The curvature of a loss that is so many times this one."""
        return self.map(lambda values: factor**self.degree * values)

    @no_type_check
    @on_automatic_axes
    def inverse_mv(
        self, v: PyTree, *, prior_prec: PriorPrecision, noise_variance: Scalar | None = None
    ) -> PyTree:
        """Posterior covariance times a pytree like the parameters."""
        return make_posterior(self, prior_prec, noise_variance=noise_variance).covariance_mv(v)

    @no_type_check
    @on_automatic_axes
    def logdet(
        self, *, prior_prec: PriorPrecision, noise_variance: Scalar | None = None
    ) -> Float[Array, ""]:
        """Log-determinant of the posterior precision; `log_determinant` is the curvature's own."""
        return make_posterior(self, prior_prec, noise_variance=noise_variance).log_determinant()

    @no_type_check
    @on_automatic_axes
    def sample(
        self,
        key: Key[Array, ""],
        num_samples: int | None = None,
        params: PyTree = None,
        *,
        prior_prec: PriorPrecision,
        noise_variance: Scalar | None = None,
        n: int | None = None,
    ) -> PyTree:
        """Draw parameters from the posterior around ``params``, stacked in front.

        Args:
            key: Random key.
            num_samples: Number of samples.
            params: The trained parameters.
            prior_prec: Prior precision, or what `tune` returned.
            noise_variance: Variance of the Gaussian noise, for ``mse``; see `make_posterior`.
            n: Another name of ``num_samples``.

        Raises:
            ValueError: If the number is no positive integer, or there are two, or the parameters
                are not those of the curvature.
        """
        self.space.require_like(params, "params")
        name, number = ("num_samples", num_samples) if n is None else ("n", n)
        if n is not None and num_samples is not None:
            msg = "`n` is another name of `num_samples`: pass one of them."
            raise ValueError(msg)
        posterior = make_posterior(self, prior_prec, noise_variance=noise_variance)
        return posterior.sample(key, positive_integer(name, number), params)
