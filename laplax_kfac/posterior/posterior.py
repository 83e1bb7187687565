"""Prior and curvature make a Gaussian posterior; all of it is functions of eigenvalues.

Posterior precision: ``(sigma_squared * curvature + prior_prec * I) / loss_scaling_factor``, the
convention of laplax's own curvature types; an empirical Fisher matrix is multiplied by
``sigma_squared ** 2``. No factorisation happens here: the curvature's eigendecomposition serves
every prior, so everything is differentiable in the hyperparameters.
Frozen parameters have infinite precision: no variance, and no part in the determinant.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac import machine, pytrees
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_flags,
    require_key,
    require_positive,
)
from laplax_kfac.blocks.blocks import BlockDiagonal, rotate_back
from laplax_kfac.blocks.merging import add, require_curvature
from laplax_kfac.blocks.operators import linear_operator
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.posterior.prior import (
    Hyperparameters,
    PriorPrecision,
    Scalar,
    loss_factor,
    per_block,
    precision_matrix,
    prior_distance,
)
from laplax_kfac.progress import awaited, meter, showing

if TYPE_CHECKING:
    import lineax


@pytrees.register
@dataclass(frozen=True)
class Posterior:
    """A Gaussian on the parameters.

    Attributes:
        precision: Its precision matrix.
        mean: The trained parameters, if it was made with them.
    """

    precision: BlockDiagonal
    mean: PyTree = None

    def summary_lines(self) -> list[str]:
        """What printing shows: the layers of the precision."""
        heading, *lines = self.precision.summary_lines()
        return [heading.replace(type(self.precision).__name__, type(self).__name__, 1), *lines]

    @on_automatic_axes
    def covariance_mv(self, v: PyTree) -> PyTree:
        """Covariance times a pytree like the parameters."""
        return self.precision.map(jnp.reciprocal).mv(v)

    @no_type_check
    def as_linear_operator(self) -> "lineax.FunctionLinearOperator":
        """The covariance as an operator of lineax; the precision's own is its inverse.

        ``posterior.precision.as_linear_operator()`` is the inverse where nothing is frozen.

        Raises:
            ImportError: If lineax is not installed.
            ValueError: If some parameters are no real numbers.
        """
        return linear_operator(self.covariance_mv, self.precision.space)

    @on_automatic_axes
    def scale_mv(self, v: PyTree) -> PyTree:
        """A square root of the covariance times ``v``: scale scale^T = covariance.

        The entries of ``v`` are coordinates in the eigenbases, so that one rotation is enough.
        """
        precision = self.precision
        parts = [
            rotate_back(b, x / jnp.sqrt(b.eigenvalues))
            for b, x in zip(precision.blocks, precision.read(v), strict=True)
        ]
        return jax.tree.map(
            lambda out, x: out.astype(jnp.result_type(x)), precision.write(parts), v
        )

    @on_automatic_axes
    def covariance_diagonal(self) -> PyTree:
        """Marginal variances, as a pytree like the parameters; 0 where frozen."""
        return self.precision.map(jnp.reciprocal).diagonal()

    @on_automatic_axes
    def to_dense(self) -> Float[Array, "P P"]:
        """The covariance, in laplax's flat order: `jax.tree.leaves`, each raveled; 0 if frozen."""
        return self.precision.map(jnp.reciprocal).to_dense()

    @on_automatic_axes
    def log_determinant(self) -> Float[Array, ""]:
        """Log-determinant of the *precision*."""
        return self.precision.log_determinant()

    @on_automatic_axes
    def log_prob(self, params: PyTree, mean: PyTree = None) -> Float[Array, ""]:
        """Log-density at some parameters; frozen ones have no part in it.

        Args:
            params: The parameters.
            mean: The posterior's mean; its own by default.

        Raises:
            ValueError: If there is no mean, or one has another structure than the parameters.
        """
        volume = self.log_determinant() - self.precision.num_free() * math.log(2 * math.pi)
        return 0.5 * volume - self.penalty(params, mean)

    @on_automatic_axes
    def standard_deviation(self) -> PyTree:
        """Marginal standard deviations, as a pytree like the parameters; 0 where frozen."""
        space = self.precision.space
        return space.unflatten([jnp.sqrt(x) for x in space.flatten(self.covariance_diagonal())])

    @on_automatic_axes
    def penalty(self, params: PyTree, mean: PyTree = None) -> Float[Array, ""]:
        """``0.5 (params - mean)^T precision (params - mean)``: this posterior as the next prior.

        Added to the negative log-likelihood of the next task, it is the quadratic penalty of
        continual learning (Ritter et al. 2018, arXiv 1805.07810, Eq. 7); its gradient is a product
        with the precision. Frozen parameters have no part in it.

        Args:
            params: The parameters.
            mean: The posterior's mean: the parameters that were trained before; its own by
                default.

        Raises:
            ValueError: If there is no mean, or one has another structure or other shapes than the
                parameters.
        """
        mean = self.mean_or(mean)
        return 0.5 * prior_distance(self.precision, self.precision, params, mean)

    def mean_or(self, given: PyTree) -> PyTree:
        """The mean that is given, or else the posterior's own.

        Raises:
            ValueError: If there is neither.
        """
        if given is None and self.mean is None:
            msg = (
                "`params` is needed, for the posterior does not know its mean: pass the trained "
                "parameters here, or make it with them, by make_posterior(curvature, prior_prec, "
                "params=params)."
            )
            raise ValueError(msg)
        return self.mean if given is None else given

    @no_type_check
    @on_automatic_axes
    def sample(
        self,
        key: Key[Array, ""],
        num_samples: int,
        params: PyTree = None,
        *,
        start: int | Array = 0,
        mean: PyTree = None,
        progress: bool = False,
    ) -> PyTree:
        """Draw parameters; sample i depends on ``key`` and i alone, not on ``num_samples``.

        Args:
            key: Random key.
            num_samples: Number of samples n.
            params: The posterior mean, the trained parameters; its own by default.
            start: Number of the first sample, so that many may be drawn in parts.
            mean: Another name of ``params``.
            progress: Whether to show a progress bar, which takes several calls of what is compiled.

        Returns:
            Samples ``start``, ``start + 1``, ... stacked in front of every leaf, in the leaves'
            dtypes. Integer leaves keep their value.

        Raises:
            ValueError: If there is no mean, or two, or it has another structure or other shapes
                than the parameters, or ``num_samples`` is not a positive integer.
            TypeError: If ``key`` is no random key.
        """
        num_samples = positive_integer("num_samples", num_samples)
        require_key("key", key)
        require_flags(progress=progress)
        if not isinstance(start, jax.core.Tracer):
            start = positive_integer("start", start, least=0)
        if params is not None and mean is not None:
            msg = "`mean` is another name of `params`: pass one of them."
            raise ValueError(msg)
        precision = self.precision
        name = "params" if mean is None else "mean"
        mean = self.mean_or(mean if params is None else params)
        leaves = precision.space.flatten(mean, name=name)

        together = max(1, machine.MACHINE.samples_together // precision.space.size)
        if "rbg" in str(jax.random.key_impl(key)):
            together = 1  # its numbers under vmap are those of another key
        draw = functools.partial(_draw, precision, leaves, key)
        if not progress:
            return precision.space.unflatten(draw(start, num_samples, together))
        at_once, parts = max(1, min(together, num_samples // 10)), []
        with showing(True), meter("samples", "sample", num_samples) as bar:
            for first in range(0, num_samples, at_once):
                number = min(at_once, num_samples - first)
                parts.append(awaited(draw(start + first, number, min(together, number))))
                bar.update(number)
        whole = [jnp.concatenate(leaves) for leaves in zip(*parts, strict=True)]
        return precision.space.unflatten(whole)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _draw(
    precision: BlockDiagonal,
    mean: list[Array],
    key: Key[Array, ""],
    start: int | Array,
    num_samples: int,
    together: int,
) -> list[Array]:
    """Samples of all leaves, ``together`` at once."""

    def one(number: Array) -> list[Array]:
        noise = _noise(jax.random.fold_in(key, number), precision)
        parts = [
            rotate_back(b, z / jnp.sqrt(b.eigenvalues))
            for b, z in zip(precision.blocks, noise, strict=True)
        ]
        return [
            (x + d).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x
            for x, d in zip(mean, precision.space.flatten(precision.write(parts)), strict=True)
        ]

    numbers = start + jnp.arange(num_samples)
    if together == 1:
        return jax.lax.map(one, numbers)
    if together >= num_samples:
        return jax.vmap(one)(numbers)
    return jax.lax.map(one, numbers, batch_size=together)


def _noise(key: Key[Array, ""], precision: BlockDiagonal) -> list[Array]:
    """Standard normal numbers in the shapes of the blocks.

    One draw for all blocks, for compiling a generator for each takes seconds; zeros where frozen.
    """
    layers = precision.layers
    dtype = jnp.result_type(*(b.eigenvalues for b in precision.blocks))
    ends = np.cumsum([0 if layer.frozen else layer.size for layer in layers])

    numbers = jax.random.normal(key, (int(ends[-1]),), dtype)
    return [
        jnp.zeros(layer.shape, dtype) if layer.frozen else part.reshape(layer.shape)
        for layer, part in zip(layers, jnp.split(numbers, ends[:-1]), strict=True)
    ]


def as_prior(prior_prec: PriorPrecision | Posterior) -> PriorPrecision:
    """The precision of a posterior that is passed as the prior; any other prior as it is."""
    prior_prec, _ = Hyperparameters.split(prior_prec, None)
    return prior_prec.precision if isinstance(prior_prec, Posterior) else prior_prec


def prior_mean_of(prior_prec: PriorPrecision | Posterior, prior_mean: PyTree) -> PyTree:
    """The mean of the prior: that of a posterior that is passed as the prior, if none is given."""
    known = isinstance(prior_prec, Posterior) and prior_mean is None
    return prior_prec.mean if known else prior_mean


@no_type_check
@on_automatic_axes
def make_posterior(
    curvature: BlockDiagonal,
    prior_prec: PriorPrecision | Posterior,
    *,
    params: PyTree = None,
    noise_variance: Scalar | None = None,
    sigma_squared: Scalar | None = None,
    loss_scaling_factor: Scalar = 1.0,
) -> Posterior:
    """The posterior of a curvature and a Gaussian prior.

    Args:
        curvature: Curvature of the loss, a sum over the data.
        prior_prec: Prior precision: a positive scalar, an array with one value a layer, or a
            pytree prefix of the parameters. Or a matrix, which is added by the rules of `merge`: a
            pytree with one value for every parameter, or the posterior of an earlier task. Or what
            `tune` or `marglik_training` returned, with the noise variance that belongs to it.
        params: The trained parameters, which become the posterior's mean.
        noise_variance: Variance s of the Gaussian noise, for ``mse`` alone: the loss is the
            negative log-likelihood of s = 1/2, which is the default.
        sigma_squared: Factor of the loss, positive, in place of ``noise_variance``: 1 / (2 s). The
            curvature is multiplied by it; an empirical Fisher matrix, by its square. 1 by default.
            A likelihood of temperature T, to the power 1/T beside the prior, is 1 / T here.
        loss_scaling_factor: Factor by which the loss was scaled, positive.

    Raises:
        ValueError: If ``prior_prec`` is of another form, not positive, or on other layers, if a
            factor is not positive and finite, or if the noise is given twice.
        TypeError: If one is no number.
    """
    require_curvature("curvature", curvature)
    dtype = jnp.result_type(*(block.eigenvalues for block in curvature.blocks))
    temperature = Hyperparameters.temperature_of(prior_prec, None)
    prior_prec, noise_variance = Hyperparameters.split(prior_prec, noise_variance)
    factor = loss_factor(sigma_squared, noise_variance, dtype)
    factor = factor if temperature is None else factor / temperature
    require_positive("loss_scaling_factor", loss_scaling_factor, shape=(), dtype=dtype)
    prior = as_prior(prior_prec)
    scaled = curvature.of_scaled_loss(factor)
    matrix = precision_matrix(prior, curvature)
    if matrix is not None:
        total = add(scaled, matrix).blocks
    else:
        pairs = zip(scaled.blocks, per_block(prior, curvature), strict=True)
        total = tuple(replace(b, eigenvalues=b.eigenvalues + value) for b, value in pairs)
    blocks = []
    for block, layer in zip(total, curvature.layers, strict=True):
        eigenvalues = block.eigenvalues / loss_scaling_factor
        if layer.frozen:
            eigenvalues = jnp.full_like(eigenvalues, jnp.inf)
        blocks.append(replace(block, eigenvalues=eigenvalues))
    if params is not None:
        curvature.space.flatten(params, name="params")
    return Posterior(BlockDiagonal(tuple(blocks), curvature.layers, curvature.space), params)
