"""The Gaussian prior: a mean, and a precision for all parameters, a layer, or a group of leaves.

Or the precision is a matrix: one value for every parameter (a feature, a unit), or the precision
of the posterior of an earlier task.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from laplax_kfac import jaxprs
from laplax_kfac.arguments import no_type_check, numbers, require_positive, shown
from laplax_kfac.bases import UNROTATED, Unrotated
from laplax_kfac.blocks.blocks import Block, BlockDiagonal, read
from laplax_kfac.parsing.layout import ParameterSpace

Scalar = Float[Array, ""] | float | int
"""One number, known or traced."""
PriorPrecision = Any
"""A scalar, an array with one value a layer, a pytree prefix of the parameters (of scalars, or of
arrays of the parameters' shapes), a matrix; or `Hyperparameters`."""


class Hyperparameters:
    """A prior precision and the noise variance that belongs to it, as they were chosen together.

    What `tune` and `marglik_training` return are some. They go as a whole wherever a ``prior_prec``
    does, which then brings its noise variance with it.

    Attributes:
        prior_prec: The prior precision.
        noise_variance: The noise variance; None where the likelihood has none.
        temperature: That of the likelihood; None where it is 1.
    """

    prior_prec: PyTree
    noise_variance: Float[Array, ""] | None
    temperature: Scalar | None = None

    @staticmethod
    def split(prior_prec: Any, noise_variance: Any) -> tuple[Any, Any]:
        """A prior precision by itself and the noise variance, given in either way.

        Raises:
            ValueError: If there are two noise variances.
        """
        if not isinstance(prior_prec, Hyperparameters):
            return prior_prec, noise_variance
        if prior_prec.noise_variance is None:
            return prior_prec.prior_prec, noise_variance
        if noise_variance is not None:
            msg = (
                f"`prior_prec` is a {type(prior_prec).__name__} with a noise variance of its own "
                f"({shown(prior_prec.noise_variance)}): leave `noise_variance` out, or pass its "
                "`prior_prec` alone."
            )
            raise ValueError(msg)
        return prior_prec.prior_prec, prior_prec.noise_variance

    @staticmethod
    @no_type_check
    def temperature_of(prior_prec: Any, given: Scalar | None) -> Scalar | None:
        """The temperature that is given, or else that of the hyperparameters, if they have one.

        Raises:
            ValueError: If there are two, or it is not positive and finite.
            TypeError: If it is no number.
        """
        own = prior_prec.temperature if isinstance(prior_prec, Hyperparameters) else None
        if own is not None and given is not None:
            msg = (
                f"`prior_prec` is a {type(prior_prec).__name__} with a temperature of its own "
                f"({shown(own)}): leave `temperature` out, or pass its `prior_prec` alone."
            )
            raise ValueError(msg)
        found = given if own is None else own
        if found is not None:
            require_positive("temperature", found, shape=())
        return found


@no_type_check
def loss_factor(
    sigma_squared: Scalar | None, noise_variance: Scalar | None, dtype: DTypeLike
) -> Scalar:
    """By how much the negative log-likelihood is larger than the loss.

    Args:
        sigma_squared: The factor itself; 1 if both are None.
        noise_variance: Variance s of Gaussian noise, for ``mse``: the factor is 1 / (2 s).
        dtype: That of the curvature.

    Raises:
        ValueError: If both are given, or one is not positive and finite.
        TypeError: If one is no number.
    """
    if noise_variance is None:
        factor = 1.0 if sigma_squared is None else sigma_squared
        require_positive("sigma_squared", factor, shape=(), dtype=dtype)
        return factor
    require_positive("noise_variance", noise_variance, shape=(), dtype=dtype)
    if sigma_squared is not None:
        msg = (
            "`noise_variance` and `sigma_squared` say the same, sigma_squared = 1 / (2 "
            "noise_variance): pass one of them (the noise variance may be that of a `Tuned` or "
            "`Trained` passed as `prior_prec`)."
        )
        raise ValueError(msg)
    return 1.0 / (2 * jnp.asarray(noise_variance))


def per_block(
    prior_prec: PriorPrecision, matrix: BlockDiagonal
) -> tuple[Scalar | Float[Array, "*block"], ...]:
    """The prior precision of every block.

    Args:
        prior_prec: A positive scalar; or an array with one value for each layer of ``matrix`` that
            is not frozen, in their order; or a pytree prefix of the parameters, whose values hold
            for all leaves below them.
        matrix: The curvature.

    Returns:
        One scalar a block; 1 for frozen ones, which have no prior. For a diagonal block whose
        leaves differ, one value for every parameter of it.

    Raises:
        ValueError: If it is of another shape or structure, if it is not positive and finite in the
            dtype of the curvature, or if it differs between leaves that share a block.
        TypeError: If it is a function: of hyperparameters, which are not known here; or if it is
            made of anything but numbers.
    """
    if callable(prior_prec):
        msg = (
            "`prior_prec` is a function; call it with its hyperparameters here, or tune these by "
            "`tune(..., prior_prec=function, hyperparameters=start)`."
        )
        raise TypeError(msg)
    if _is_array(prior_prec):
        values = _from_array(prior_prec, matrix)
    else:
        values = _from_prefix(prior_prec, matrix)
    dtype = jnp.result_type(*(block.eigenvalues for block in matrix.blocks))
    for value in {id(value): value for value in values}.values():
        require_positive("prior_prec", value, shape=np.shape(value), dtype=dtype)
    return tuple(values)


def precision_matrix(prior_prec: PriorPrecision, matrix: BlockDiagonal) -> BlockDiagonal | None:
    """The prior precision as a matrix, where it is one; None where it is one scalar a block.

    Args:
        prior_prec: The prior precision.
        matrix: The curvature.

    Raises:
        ValueError: If it is known and not positive definite, or of another shape or structure.
    """
    if not isinstance(prior_prec, BlockDiagonal):
        if callable(prior_prec) or _is_array(prior_prec):
            return None
        leaves = _broadcast(prior_prec, matrix.space)
        if all(np.ndim(leaf) == 0 for leaf in leaves):
            return None
        dtype = jnp.result_type(float)
        space = matrix.space
        full = [
            jnp.broadcast_to(jnp.asarray(leaf, dtype), shape)
            for leaf, shape in zip(leaves, space.shapes, strict=True)
        ]
        pairs = [  # real and imaginary part of a number have one precision
            jnp.stack([x, x], axis=-1) if space.is_complex(k) else x for k, x in enumerate(full)
        ]
        parts = matrix.read(space.unflatten(pairs))
        blocks = [
            Block((UNROTATED,) * len(block.sides), part)
            for block, part in zip(matrix.blocks, parts, strict=True)
        ]
        prior_prec = BlockDiagonal(tuple(blocks), matrix.layers, matrix.space)
    require_definite(prior_prec)
    return prior_prec


def _is_array(x: object) -> bool:
    return isinstance(x, int | float | np.generic | np.ndarray | jax.Array)


def require_definite(precision: BlockDiagonal) -> None:
    """Refuse a precision matrix that is singular, as far as it is known.

    Raises:
        ValueError: If an eigenvalue is known and not positive.
    """
    for block, layer in zip(precision.blocks, precision.layers, strict=True):
        values = block.eigenvalues
        if isinstance(values, jax.core.Tracer) or layer.frozen:
            continue
        known = np.asarray(values)
        if np.all((known > 0) & np.isfinite(known)):
            continue
        msg = (
            "`prior_prec` must be positive and finite, as a matrix positive definite, or the prior "
            f"is improper; in layer {layer.name!r} it is not. A curvature alone seldom is: pass "
            "the posterior that it makes with a prior of its own, from make_posterior."
        )
        raise ValueError(msg)


def log_prior(
    prior_prec: PriorPrecision,
    matrix: BlockDiagonal,
    params: PyTree,
    prior_mean: PyTree | None = None,
) -> Float[Array, ""]:
    """Log-density of the prior at the parameters that are not frozen.

    Args:
        prior_prec: Prior precision, of any form.
        matrix: The curvature.
        params: The parameters.
        prior_mean: The prior's mean, a pytree like the parameters; zero by default.
    """
    determinant = log_prior_determinant(prior_prec, matrix)
    distance = prior_distance(prior_prec, matrix, params, prior_mean)
    return 0.5 * (determinant - distance - matrix.num_free() * jnp.log(2 * jnp.pi))


def log_prior_determinant(prior_prec: PriorPrecision, matrix: BlockDiagonal) -> Float[Array, ""]:
    """Log-determinant of the prior precision, on all but frozen parameters.

    Raises:
        ValueError: If it is of another form, or not positive.
    """
    precision = precision_matrix(prior_prec, matrix)
    if precision is not None:
        return precision.log_determinant()
    pairs = zip(per_block(prior_prec, matrix), matrix.layers, strict=True)
    logs = [layer.size * jnp.mean(jnp.log(value)) for value, layer in pairs if not layer.frozen]
    return sum(logs, jnp.zeros(()))


def prior_distance(
    prior_prec: PriorPrecision,
    matrix: BlockDiagonal,
    params: PyTree,
    prior_mean: PyTree | None = None,
) -> Float[Array, ""]:
    """``(params - prior_mean)^T precision (params - prior_mean)``, without frozen parameters."""
    leaves = matrix.space.flatten(params, name="params")
    mean = None if prior_mean is None else matrix.space.flatten(prior_mean, name="prior_mean")
    means = [0.0] * len(leaves) if mean is None else mean
    offsets = [_offset(jnp.asarray(x), m) for x, m in zip(leaves, means, strict=True)]
    precision = precision_matrix(prior_prec, matrix)
    if precision is not None:
        return precision.quadratic_form(matrix.space.unflatten(offsets))
    total = jnp.zeros(())
    for value, layer in zip(per_block(prior_prec, matrix), matrix.layers, strict=True):
        if layer.frozen:
            continue
        if np.ndim(value):
            total = total + jnp.sum(value * jnp.abs(read(matrix.space, layer, offsets)) ** 2)
            continue
        # By segment: joined to the block's matrix first, they would have to be moved.
        parts = [matrix.space.read(segment, offsets) for segment in layer.segments]
        total = total + value * sum(jnp.sum(jnp.abs(part) ** 2) for part in parts)
    return total


def _offset(leaf: Array, mean: Any) -> Array:
    """Distance of a leaf from the mean; integer leaves are no parameters and have none."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros(leaf.shape)
    return leaf - mean


def _from_array(prior_prec: Any, matrix: BlockDiagonal) -> list[Scalar]:
    if isinstance(prior_prec, np.generic | np.ndarray):
        prior_prec = jnp.asarray(prior_prec)
    if np.ndim(prior_prec) == 0:
        return [1.0 if layer.frozen else prior_prec for layer in matrix.layers]
    free = [layer.name for layer in matrix.layers if not layer.frozen]
    if np.shape(prior_prec) != (len(free),):
        msg = (
            f"`prior_prec` has shape {np.shape(prior_prec)}, but the curvature has {len(free)} "
            f"layers ({', '.join(free)}): pass a scalar, one value a layer, or a pytree prefix of "
            "`params`."
        )
        raise ValueError(msg)
    values = iter([prior_prec[k] for k in range(len(free))])
    return [1.0 if layer.frozen else next(values) for layer in matrix.layers]


def _broadcast(prior_prec: PyTree, space: ParameterSpace) -> list[Any]:
    """A pytree prefix of the parameters as one value, or one array, a leaf."""
    everything = jax.tree.unflatten(space.treedef, list(range(len(space.shapes))))
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(prior_prec, everything))
    except ValueError as error:
        msg = (
            "`prior_prec` must be a scalar, an array with one value a layer, or a pytree prefix of "
            f"`params`, found {jax.tree.structure(prior_prec)} for {space.treedef}."
        )
        raise ValueError(msg) from error
    for leaf in {id(leaf): leaf for leaf in leaves}.values():
        numbers("prior_prec", leaf, shape=None)
    for leaf, shape, path in zip(leaves, space.shapes, space.paths, strict=True):
        found = np.shape(leaf)
        fits = len(found) == len(shape) and all(
            n in (1, m) for n, m in zip(found, shape, strict=True)
        )
        if found and not fits:
            msg = (
                "`prior_prec` as a pytree prefix of `params` must have scalar leaves, or leaves of "
                f"the parameters' shapes; found {found} for {path} of shape {shape}."
            )
            raise ValueError(msg)
    return leaves


def _from_prefix(
    prior_prec: PyTree, matrix: BlockDiagonal
) -> list[Scalar | Float[Array, "*block"]]:
    """The value that the leaves of every block share; of a diagonal block, each its own.

    Raises:
        ValueError: If leaves of a block that couples them have several.
    """
    space = matrix.space
    leaves = _broadcast(prior_prec, space)
    number = {path: k for k, path in enumerate(space.paths)}
    found: list[Scalar | Float[Array, "*block"]] = []
    for block, layer in zip(matrix.blocks, matrix.layers, strict=True):
        first, *others = (1.0,) if layer.frozen else [leaves[number[p]] for p in layer.params]
        if all(value is first or not _may_differ(first, value) for value in others):
            found.append(first)
        elif all(isinstance(basis, Unrotated) for basis in block.sides):
            shapes = zip(leaves, space.real_shapes, strict=True)
            found.append(read(space, layer, [jnp.full(shape, x) for x, shape in shapes]))
        else:
            msg = (
                f"`prior_prec` differs between the parameters of layer {layer.name!r}, which share "
                "a block: give them one value, or fit with `separate_weight_and_bias=True` or "
                "`curvature='diagonal'`; or give arrays of the parameters' shapes, one value for "
                "every parameter, which takes an eigendecomposition for every prior."
            )
            raise ValueError(msg)
    return found


def _may_differ(first: Scalar, second: Scalar) -> bool:
    """Whether two values are different, or not known yet."""
    return jaxprs.is_traced((first, second)) or bool(first != second)
