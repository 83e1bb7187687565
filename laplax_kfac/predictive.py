"""Closed-form linearised predictive: output covariances without a parameter-sized vector.

Inputs are worked on in parts of bounded memory, and all their Jacobians stay in the eigenbases of
the blocks (`jacobians`). Functional samples need no Jacobian: one product with it a sample.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac import jaxprs
from laplax_kfac.blocks import BlockDiagonal
from laplax_kfac.capture import map_examples, record_size
from laplax_kfac.curvature import DEFAULT_BATCH_SIZE, RECORD_BYTES
from laplax_kfac.data import batch_size as size_of
from laplax_kfac.data import first_example, pad, positive_integer, to_arrays
from laplax_kfac.jacobians import Jacobian, covariance, numbers, of_example, variance
from laplax_kfac.matching import parse_like
from laplax_kfac.parser import ModelFn, Program, per_example
from laplax_kfac.posterior import make_posterior
from laplax_kfac.prior import PriorPrecision, Scalar, require_positive

EVALUATIONS = 2048
"""Most pairs of an input and a weight sample that the network is evaluated at together."""


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
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
    what does not depend on them is then computed once. Wrap it in ``jax.jit`` to call it often.

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
    program, arrays = _linearised(
        curvature, model_fn, params, inputs, prior_prec, sigma_squared, vmap_over_data
    )
    size = _part_size(program, batch_size)
    return _compiled(_covariances, program, size)(arrays, to_arrays({"input": inputs})["input"])


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
    program, arrays = _linearised(
        curvature, model_fn, params, inputs, prior_prec, sigma_squared, vmap_over_data
    )
    size = _part_size(program, batch_size)
    return _compiled(_variances, program, size)(arrays, to_arrays({"input": inputs})["input"])


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
    program, arrays = _linearised(
        curvature, model_fn, params, inputs, prior_prec, sigma_squared, vmap_over_data
    )
    mine = to_arrays({"input": inputs})
    theirs = mine if others is None else to_arrays({"input": others})
    if others is not None and _shapes(first_example(theirs)) != _shapes(first_example(mine)):
        msg = (
            "`others` must be like `inputs`, apart from their number: expected examples "
            f"{first_example(mine)}, found {first_example(theirs)}."
        )
        raise ValueError(msg)
    size = _part_size(program, batch_size, pairs=True)
    function = _compiled(_joint_covariances, program, size)
    return function(arrays, mine["input"], None if others is None else theirs["input"])


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
    function = _raveled(per_example(model_fn, vmap_over_data=vmap_over_data))
    if linearised:
        closed = jaxprs.trace(function, params, first_example(batch))[0]
        push = _push_by_vjp if jaxprs.has_custom_vjp(closed) else _push_forward
        of_samples = functools.partial(push, function)
    else:
        of_samples = functools.partial(_evaluate, function)
    count = size_of(batch)
    each = min(
        _numbers_that_fit() // (3 * curvature.space.size), EVALUATIONS // min(count, batch_size)
    )

    @jax.jit
    def draw(posterior: Any, params: PyTree, inputs: PyTree, key: Key[Array, ""]) -> Array:
        # Deviations from the mean: the samples themselves would have them rounded.
        mean = jax.tree.map(jnp.zeros_like, params) if linearised else params

        def some(numbers: Array) -> Array:
            samples = posterior.sample(key, len(numbers), mean, start=numbers[0])

            def at(part: PyTree) -> Array:
                one = functools.partial(of_samples, params, samples)
                return map_examples(one, part)

            return _in_parts(at, inputs, batch_size).swapaxes(0, 1)

        return _in_parts(some, jnp.arange(num_samples), max(1, each))

    return draw(posterior, params, batch["input"], key)


# -- functions of weight samples, for one example ------------------------------------------------


def _raveled(single: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], Array]:
    def function(params: PyTree, x: PyTree) -> Array:
        leaves = jax.tree.leaves(single(params, x))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    return function


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


class _Arrays(NamedTuple):
    """What a pass works on; arguments, so that nothing is compiled in."""

    leaves: list[Array]
    consts: list[Array]
    variances: list[Array]  # in the bases of the blocks
    blocks: tuple[Any, ...]


def _compiled(function: Callable[..., Any], program: Program, size: int) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, program, size))


def _linearised(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    prior_prec: PriorPrecision,
    sigma_squared: Scalar,
    vmap_over_data: bool,
) -> tuple[Program, _Arrays]:
    """The parsed model and the arrays of its posterior."""
    precision = make_posterior(curvature, prior_prec, sigma_squared=sigma_squared).precision
    batch = to_arrays({"input": inputs})
    size_of(batch)
    program = parse_like(
        curvature, model_fn, params, first_example(batch), vmap_over_data=vmap_over_data
    )
    variances = [1.0 / block.eigenvalues for block in precision.blocks]
    return program, _Arrays(jax.tree.leaves(params), program.consts, variances, precision.blocks)


def _jacobians(
    program: Program, arrays: _Arrays, inputs: PyTree
) -> tuple[Float[Array, "n C"], dict[int, Jacobian]]:
    """Outputs of a batch, and Jacobians of the layers that influence them, by number."""

    def one(x: PyTree, *, sequential: bool = False) -> tuple[Array, dict[int, Jacobian]]:
        output, jacobians = of_example(
            program, arrays.leaves, arrays.blocks, x, consts=arrays.consts, sequential=sequential
        )
        return jnp.concatenate([jnp.ravel(o) for o in jax.tree.leaves(output)]), jacobians

    return map_examples(one, inputs)


def _covariances(program: Program, size: int, arrays: _Arrays, inputs: PyTree) -> Predictive:
    def of_part(part: PyTree) -> Predictive:
        mean, jacobians = _jacobians(program, arrays, part)
        total = jnp.zeros((*mean.shape, mean.shape[-1]))
        for number, jacobian in jacobians.items():
            product = functools.partial(covariance, variances=arrays.variances[number])
            total = total + jax.vmap(product)(jacobian, jacobian)
        return Predictive(mean, total)

    return _in_parts(of_part, inputs, size)


def _variances(program: Program, size: int, arrays: _Arrays, inputs: PyTree) -> Marginals:
    def of_part(part: PyTree) -> Marginals:
        mean, jacobians = _jacobians(program, arrays, part)
        total = jnp.zeros(mean.shape)
        for number, jacobian in jacobians.items():
            product = functools.partial(variance, variances=arrays.variances[number])
            total = total + jax.vmap(product)(jacobian)
        return Marginals(mean, total)

    return _in_parts(of_part, inputs, size)


def _joint_covariances(
    program: Program, size: int, arrays: _Arrays, inputs: PyTree, others: PyTree | None
) -> Float[Array, "N C M C"]:
    def of_rows(part: PyTree) -> Float[Array, "n M C C"]:
        mean, mine = _jacobians(program, arrays, part)

        def of_columns(other: PyTree) -> Float[Array, "m n C C"]:
            theirs = mine if other is part else _jacobians(program, arrays, other)[1]
            total = jnp.zeros(())
            for number, jacobian in mine.items():
                product = functools.partial(covariance, variances=arrays.variances[number])
                by_row = jax.vmap(product, in_axes=(0, None))
                total = total + jax.vmap(by_row, in_axes=(None, 0))(jacobian, theirs[number])
            shape = (size_of({"input": other}), *mean.shape, mean.shape[-1])
            return jnp.broadcast_to(total, shape)

        columns = inputs if others is None else others
        return _in_parts(of_columns, columns, size).swapaxes(0, 1)

    return _in_parts(of_rows, inputs, size).swapaxes(1, 2)


def _in_parts(function: Callable[[PyTree], Any], batch: PyTree, most: int) -> Any:
    """Apply a function of a batch to equal parts of at most ``most`` examples, in turn."""
    count = size_of({"input": batch})
    parts = math.ceil(count / most)
    if parts == 1:
        return function(batch)
    each = math.ceil(count / parts)
    padded, _ = pad({"input": batch}, each * parts)
    split = jax.tree.map(lambda x: x.reshape(parts, each, *x.shape[1:]), padded["input"])
    # Recomputed in the backward pass, so that a gradient takes the memory of one part as well.
    results = lax.map(jax.checkpoint(function, prevent_cse=False), split)
    return jax.tree.map(lambda x: x.reshape(parts * each, *x.shape[2:])[:count], results)


def _part_size(program: Program, batch_size: int, *, pairs: bool = False) -> int:
    """Most inputs whose Jacobians and products fit into `RECORD_BYTES`; at least one."""
    outputs = sum(math.prod(o.shape) for o in jax.tree.leaves(program.output))
    linear = square = 0
    for resolved in program.resolved:
        jacobian, product = numbers(resolved, outputs)
        linear += record_size(resolved.layer, outputs) + jacobian
        square += product
    room = _numbers_that_fit()
    if pairs:  # n on either side: 2 linear n + square n^2 numbers
        fitting = (math.sqrt(linear**2 + square * room) - linear) / max(square, 1)
    else:
        fitting = room / max(linear + square, 1)
    return max(1, min(positive_integer("batch_size", batch_size), int(fitting)))


def _numbers_that_fit() -> int:
    return RECORD_BYTES // jnp.dtype(jnp.result_type(float)).itemsize


def _shapes(example: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(example)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
