"""Closed-form linearised predictive: output covariances without a parameter-sized vector.

Inputs are worked on in parts of bounded memory, and all their Jacobians stay in the eigenbases of
the blocks (`jacobians`). Functional samples need no Jacobian: one product with it a sample.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac import jaxprs, pytrees
from laplax_kfac.arguments import no_type_check, positive_integer
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import batch_size as size_of
from laplax_kfac.capture.batches import first_example, to_arrays
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.curvature.kfac import DEFAULT_BATCH_SIZE, RECORD_BYTES
from laplax_kfac.curvature.matching import parse_like
from laplax_kfac.parsing import cache_keys as fingerprint
from laplax_kfac.parsing.program import ModelFn, Program, per_example
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.posterior.prior import PriorPrecision, Scalar, require_positive
from laplax_kfac.predictive.jacobians import (
    Expansion,
    Linearised,
    compiled_linearise,
    in_chunks,
    joint_output_covariances,
    most_inputs,
    num_that_fit,
    output_covariances,
)

EVALUATIONS = 2048
"""Most pairs of an input and a weight sample that the network is evaluated at together."""


@pytrees.register
@dataclass(frozen=True)
class Predictive:
    """Gaussian over the model's outputs, one for each input.

    Attributes:
        mean: The model's outputs, raveled: shape (N, C).
        covariance: Shape (N, C, C).
    """

    mean: Float[Array, "N C"]
    covariance: Float[Array, "N C C"]

    @property
    def variance(self) -> Float[Array, "N C"]:
        """Diagonal of the covariances."""
        return jnp.diagonal(self.covariance, axis1=-2, axis2=-1)

    def with_noise(self, noise_variance: ArrayLike) -> "Predictive":
        """The predictive of noisy observations: adds Gaussian noise to every output.

        For ``loss_fn="mse"`` and noise of variance s the curvature belongs to the likelihood with
        ``sigma_squared = 1 / (2 s)``.

        Args:
            noise_variance: Variance of the noise, positive; one number, or one for every output.

        Raises:
            ValueError: If it is not positive.
        """
        noise = jnp.asarray(noise_variance)
        require_positive("noise_variance", noise)
        noise = jnp.broadcast_to(noise, self.mean.shape[-1:])
        return Predictive(self.mean, self.covariance + jnp.diag(noise))


@pytrees.register
@dataclass(frozen=True)
class Marginals:
    """A Gaussian for every single output of the model, for each input.

    Attributes:
        mean: The model's outputs, raveled: shape (N, C).
        variance: Shape (N, C).
    """

    mean: Float[Array, "N C"]
    variance: Float[Array, "N C"]

    def with_noise(self, noise_variance: ArrayLike) -> "Marginals":
        """The predictive of noisy observations; see `Predictive.with_noise`.

        Args:
            noise_variance: Variance of the noise, positive; one number, or one for every output.

        Raises:
            ValueError: If it is not positive.
        """
        noise = jnp.asarray(noise_variance)
        require_positive("noise_variance", noise)
        return Marginals(self.mean, self.variance + noise)


@no_type_check
def predictive_covariance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    *,
    prior_prec: PriorPrecision,
    sigma_squared: Scalar = 1.0,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Predictive:
    """Covariance ``J Sigma J^T`` of the linearised model at new inputs (Immer et al. 2021).

    Works under ``jit``, and under ``grad`` and ``vmap`` in ``prior_prec`` and ``sigma_squared``;
    what does not depend on them is then computed once. Outside of these it is compiled once for a
    model and inputs of one shape.

    Args:
        curvature: What `kfac` or `ekfac` returned for this model.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        prior_prec: Prior precision.
        sigma_squared: Factor of the curvature.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most inputs that are worked on at once; fewer if their Jacobians are large.

    Raises:
        ValueError: If the curvature is of another model.
    """
    model = _Model.of(
        curvature, model_fn, params, inputs, prior_prec, sigma_squared, vmap_over_data
    )
    return Predictive(*model.spreads(batch_size, diagonal=False))


@no_type_check
def predictive_variance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    *,
    prior_prec: PriorPrecision,
    sigma_squared: Scalar = 1.0,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Marginals:
    """Variances of the linearised model: the diagonals of `predictive_covariance`.

    Cheaper where there are many outputs, for no C x C matrix is formed.

    Args:
        curvature: As for `predictive_covariance`, and so are all other arguments.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        prior_prec: Prior precision.
        sigma_squared: Factor of the curvature.
        vmap_over_data: Whether ``model_fn`` takes one example or a batch.
        batch_size: Most inputs that are worked on at once.

    Raises:
        ValueError: If the curvature is of another model.
    """
    model = _Model.of(
        curvature, model_fn, params, inputs, prior_prec, sigma_squared, vmap_over_data
    )
    return Marginals(*model.spreads(batch_size, diagonal=True))


@no_type_check
def joint_covariance(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    others: PyTree | None = None,
    *,
    prior_prec: PriorPrecision,
    sigma_squared: Scalar = 1.0,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Float[Array, "N C M C"]:
    """Covariance between the outputs at different inputs: the linearised model's GP kernel.

    The predictive of all inputs together is Gaussian, and this is its covariance.

    Args:
        curvature: As for `predictive_covariance`.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        others: Inputs with a leading axis M; ``inputs`` themselves by default.
        prior_prec: Prior precision.
        sigma_squared: Factor of the curvature.
        vmap_over_data: Whether ``model_fn`` takes one example or a batch.
        batch_size: Most inputs of either side that are worked on at once.

    Returns:
        Shape (N, C, M, C), with outputs raveled.

    Raises:
        ValueError: If the curvature is of another model, or ``others`` are not like ``inputs``.
    """
    model = _Model.of(
        curvature, model_fn, params, inputs, prior_prec, sigma_squared, vmap_over_data
    )
    if others is not None:
        others = to_arrays({"input": others})["input"]
        mine, theirs = (first_example({"input": x}) for x in (model.inputs, others))
        if _shapes(mine) != _shapes(theirs):
            msg = (
                "`others` must be like `inputs`, apart from their number: expected examples "
                f"{mine}, found {theirs}."
            )
            raise ValueError(msg)
    return model.joint(others, batch_size)


@no_type_check
def predictive_samples(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    key: Key[Array, ""],
    num_samples: int,
    *,
    prior_prec: PriorPrecision,
    sigma_squared: Scalar = 1.0,
    linearised: bool = True,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Float[Array, "n N C"]:
    """Sampled functions, at all inputs: one weight sample each, so that they are smooth.

    The weights are those that `Curvature.sample` draws from the same key. Streams over samples and
    inputs: no more weights are held than fit in a bounded memory.

    Args:
        curvature: What `kfac` or `ekfac` returned for this model.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        inputs: Inputs, with a leading axis N.
        key: Random key.
        num_samples: Number of functions n.
        prior_prec: Prior precision.
        sigma_squared: Factor of the curvature.
        linearised: Whether to sample the linearised network, ``f(x) + J (theta_s - theta)``, whose
            covariance is `predictive_covariance`, or the network itself, ``f(x; theta_s)``.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most inputs that are worked on at once.

    Returns:
        Shape (n, N, C), with outputs raveled.

    Raises:
        ValueError: If ``params`` are not those of the curvature, or ``num_samples`` or
            ``batch_size`` is not a positive integer.
    """
    num_samples = positive_integer("num_samples", num_samples)
    batch_size = positive_integer("batch_size", batch_size)
    posterior = make_posterior(curvature, prior_prec, sigma_squared=sigma_squared)
    curvature.space.flatten(params, name="params")
    batch = to_arrays({"input": inputs})
    function = per_example(model_fn, vmap_over_data=vmap_over_data)
    jaxpr, consts, _ = jaxprs.trace(function, params, first_example(batch))
    each = min(
        num_that_fit(RECORD_BYTES) // (3 * curvature.space.size),
        EVALUATIONS // min(size_of(batch), batch_size),
    )
    sizes = num_samples, max(1, each), batch_size
    draw = fingerprint.kept(
        model_fn,
        consts,
        ("samples", fingerprint.of_jaxpr(jaxpr, consts), linearised, sizes),
        lambda: jax.jit(functools.partial(_draw, jaxpr, linearised, sizes)),
    )
    return draw(posterior, consts, params, batch["input"], key)


def _draw(
    jaxpr: Jaxpr,
    linearised: bool,
    sizes: tuple[int, int, int],
    posterior: Posterior,
    consts: Sequence[ArrayLike],
    params: PyTree,
    inputs: PyTree,
    key: Key[Array, ""],
) -> Float[Array, "n N C"]:
    num_samples, together, batch_size = sizes

    def function(params: PyTree, x: PyTree) -> Array:
        found = eval_jaxpr(jaxpr, [], *consts, *jax.tree.leaves(params), *jax.tree.leaves(x))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in found])

    if linearised:
        push = _push_by_vjp if jaxprs.has_custom_vjp(jaxpr) else _push_forward
        of_samples = functools.partial(push, function)
    else:
        of_samples = functools.partial(_evaluate, function)
    # Deviations from the mean: the samples themselves would have them rounded.
    mean = jax.tree.map(jnp.zeros_like, params) if linearised else params

    def some(numbers: Array) -> Array:
        samples = posterior.sample(key, len(numbers), mean, start=numbers[0])

        def at(part: PyTree) -> Array:
            return map_examples(functools.partial(of_samples, params, samples), part)

        return in_chunks(at, inputs, batch_size, traced=True).swapaxes(0, 1)

    return in_chunks(some, jnp.arange(num_samples), together, traced=True)


# -- functions of weight samples, for one example ------------------------------------------------


def _map_samples(function: Callable[[PyTree], Array], samples: PyTree, sequential: bool) -> Array:
    return lax.map(function, samples) if sequential else jax.vmap(function)(samples)


def _evaluate(
    function: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    samples: PyTree,
    x: PyTree,
    *,
    sequential: bool = False,
) -> Float[Array, "n C"]:
    """The network at every weight sample."""
    del params
    return _map_samples(lambda sample: function(sample, x), samples, sequential)


def _push_forward(
    function: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    samples: PyTree,
    x: PyTree,
    *,
    sequential: bool = False,
) -> Float[Array, "n C"]:
    """The linearised network at every deviation of the weights."""
    split, merge = _inexact(params)
    moved = lambda values: function(merge(values), x)  # noqa: E731
    output, jvp = jax.linearize(moved, split(params))
    return output + _map_samples(lambda sample: jvp(split(sample)), samples, sequential)


def _push_by_vjp(
    function: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    samples: PyTree,
    x: PyTree,
    *,
    sequential: bool = False,
) -> Float[Array, "n C"]:
    """The same for models with custom_vjp rules, which have no forward mode: J is (J^T)^T."""
    split, merge = _inexact(params)
    output, pullback = jax.vjp(lambda values: function(merge(values), x), split(params))
    _, transpose = jax.vjp(pullback, jnp.zeros_like(output))
    return output + _map_samples(lambda sample: transpose((split(sample),))[0], samples, sequential)


def _inexact(
    params: PyTree,
) -> tuple[Callable[[PyTree], list[Array]], Callable[[list[Array]], PyTree]]:
    """Functions that take the leaves with derivatives out of a pytree, and put them back."""
    leaves, treedef = jax.tree.flatten(params)
    moved = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def merge(values: list[Array]) -> PyTree:
        everything = list(leaves)
        for k, value in zip(moved, values, strict=True):
            everything[k] = value
        return jax.tree.unflatten(treedef, everything)

    return lambda tree: [jax.tree.leaves(tree)[k] for k in moved], merge


# -- passes over the inputs ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """The model, linearised at its inputs, and its posterior."""

    program: Program
    linearise: Callable[[Expansion, PyTree], Linearised]
    expansion: Expansion
    variances: list[Array]  # in the bases of the blocks
    inputs: PyTree

    @classmethod
    def of(
        cls,
        curvature: BlockDiagonal,
        model_fn: ModelFn,
        params: PyTree,
        inputs: PyTree,
        prior_prec: PriorPrecision,
        sigma_squared: Scalar,
        vmap_over_data: bool,
    ) -> "_Model":
        """Parse the model and make its posterior."""
        precision = make_posterior(curvature, prior_prec, sigma_squared=sigma_squared).precision
        batch = to_arrays({"input": inputs})
        size_of(batch)
        program = parse_like(
            curvature, model_fn, params, first_example(batch), vmap_over_data=vmap_over_data
        )
        return cls(
            program,
            compiled_linearise(model_fn, program),
            Expansion(jax.tree.leaves(params), program.consts, precision.blocks),
            [1.0 / block.eigenvalues for block in precision.blocks],
            batch["input"],
        )

    def at(self, inputs: PyTree) -> Linearised:
        """Outputs and Jacobians at some inputs."""
        return self.linearise(self.expansion, inputs)

    @no_type_check
    def spreads(self, batch_size: int, *, diagonal: bool) -> tuple[Array, Array]:
        """Outputs, and their covariances or variances."""
        traced = jaxprs.is_traced((self.expansion, self.variances, self.inputs))
        most = most_inputs(self.program, batch_size, traced=traced)

        def of_part(part: PyTree) -> tuple[Array, Array]:
            linear = self.at(part)
            return linear.output, output_covariances(linear, self.variances, diagonal=diagonal)

        return in_chunks(of_part, self.inputs, most, traced=traced)

    @no_type_check
    def joint(self, others: PyTree | None, batch_size: int) -> Float[Array, "N C M C"]:
        """Covariances between inputs."""
        traced = jaxprs.is_traced((self.expansion, self.variances, self.inputs, others))
        most = most_inputs(self.program, batch_size, traced=traced, pairs=True)

        def of_rows(part: PyTree) -> Float[Array, "n M C C"]:
            mine = self.at(part)

            def of_columns(other: PyTree) -> Float[Array, "m n C C"]:
                theirs = mine if other is part else self.at(other)
                return joint_output_covariances(mine, theirs, self.variances)

            columns = self.inputs if others is None else others
            return in_chunks(of_columns, columns, most, traced=traced).swapaxes(0, 1)

        return in_chunks(of_rows, self.inputs, most, traced=traced).swapaxes(1, 2)


def _shapes(example: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(example)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
