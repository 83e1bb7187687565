"""Functional samples of the predictive: one product with the Jacobian a sample, and no Jacobian."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac import jaxprs, machine
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_flags,
    require_key,
)
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import batch_size as size_of
from laplax_kfac.capture.batches import first_example
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.curvature.matching import checked_inputs
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing import cache_keys as fingerprint
from laplax_kfac.parsing.program import ModelFn, per_example, require_model
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.posterior.prior import PriorPrecision, Scalar
from laplax_kfac.predictive.jacobians import in_chunks, num_that_fit
from laplax_kfac.progress import awaited, meter, showing


@no_type_check
@on_automatic_axes
def predictive_samples(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    inputs: PyTree,
    key: Key[Array, ""],
    num_samples: int,
    *,
    prior_prec: PriorPrecision,
    noise_variance: Scalar | None = None,
    sigma_squared: Scalar | None = None,
    linearised: bool = True,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: bool = False,
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
        prior_prec: Prior precision, or what `tune` returned; see `make_posterior`.
        noise_variance: Variance of the Gaussian noise, for ``mse``; see `make_posterior`.
        sigma_squared: In place of it, 1 / (2 noise_variance).
        linearised: Whether to sample the linearised network, ``f(x) + J (theta_s - theta)``, whose
            covariance is `predictive_covariance`, or the network itself, ``f(x; theta_s)``.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most inputs that are worked on at once.
        progress: Whether to show a progress bar, which takes several calls of what is compiled.

    Returns:
        Shape (n, N, C), with outputs raveled.

    Raises:
        ValueError: If ``params`` are not the curvature's, or a number is no positive integer.
        TypeError: If an argument is of an unsupported type.
    """
    num_samples = positive_integer("num_samples", num_samples)
    batch_size = positive_integer("batch_size", batch_size)
    require_key("key", key)
    require_model(model_fn)
    require_flags(linearised=linearised, vmap_over_data=vmap_over_data, progress=progress)
    posterior = make_posterior(
        curvature, prior_prec, noise_variance=noise_variance, sigma_squared=sigma_squared
    )
    batch = checked_inputs(curvature, params, inputs)
    function = per_example(model_fn, vmap_over_data=vmap_over_data)
    jaxpr, consts, _ = jaxprs.trace(function, params, first_example(batch))
    held = num_that_fit(machine.MACHINE.record_bytes) // (3 * curvature.space.size)
    evaluated = machine.MACHINE.evaluations // min(size_of(batch), batch_size)
    at_once = math.ceil(num_samples / 10) if progress else num_samples
    sizes = at_once, max(1, min(held, evaluated)), batch_size
    draw = fingerprint.kept(
        model_fn,
        consts,
        ("samples", fingerprint.of_jaxpr(jaxpr, consts), linearised, sizes),
        lambda: jax.jit(Sampler(jaxpr, linearised, *sizes)),
    )
    if not progress:
        return draw(posterior, consts, params, batch["input"], key)
    parts = []
    with showing(True), meter("sampled functions", "function", num_samples) as bar:
        for first in range(0, num_samples, at_once):
            parts.append(awaited(draw(posterior, consts, params, batch["input"], key, first)))
            bar.update(min(at_once, num_samples - first))
    return jnp.concatenate(parts)[:num_samples]


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws sampled functions of a traced model; compiled once for a model and these numbers.

    Attributes:
        jaxpr: The model for one example; inputs are constants, parameters, example.
        linearised: Whether to sample the linearised network.
        num_samples: Number of functions.
        together: How many weight samples are held at once.
        batch_size: Most inputs that are worked on at once.
    """

    jaxpr: Jaxpr
    linearised: bool
    num_samples: int
    together: int
    batch_size: int

    def __call__(
        self,
        posterior: Posterior,
        consts: Sequence[ArrayLike],
        params: PyTree,
        inputs: PyTree,
        key: Key[Array, ""],
        first: int | Array = 0,
    ) -> Float[Array, "n N C"]:
        """The sampled functions at all inputs, from the first number on."""

        def function(params: PyTree, x: PyTree) -> Array:
            found = eval_jaxpr(
                self.jaxpr, [], *consts, *jax.tree.leaves(params), *jax.tree.leaves(x)
            )
            return jnp.concatenate([jnp.ravel(leaf) for leaf in found])

        if self.linearised:
            push = _push_by_vjp if jaxprs.has_custom_vjp(self.jaxpr) else _push_forward
            of_samples = functools.partial(push, function)
        else:
            of_samples = functools.partial(_evaluate, function)
        # Deviations from the mean: the samples themselves would have them rounded.
        mean = jax.tree.map(jnp.zeros_like, params) if self.linearised else params

        def some(numbers: Array) -> Array:
            samples = posterior.sample(key, len(numbers), mean, start=numbers[0])

            def at(part: PyTree) -> Array:
                return map_examples(functools.partial(of_samples, params, samples), part)

            return in_chunks(at, inputs, self.batch_size, traced=True).swapaxes(0, 1)

        numbers = first + jnp.arange(self.num_samples)
        return in_chunks(some, numbers, self.together, traced=True)


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
