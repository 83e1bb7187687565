"""The closed-form predictive in the form that laplax's pushforward works with.

laplax asks for the covariance of the outputs at one input as a product with vectors, made anew for
every input and every prior. `closed_form` gives it the contraction of the layers' Jacobians. A
`Dataset` works out the predictions for all inputs together, and hands them to laplax by number;
what does not depend on the prior, the Jacobians in the eigenbases, is then worked out once for a
whole grid of priors.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac import jaxprs, pytrees
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import Batch, batch_size
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.curvature.kfac import DEFAULT_BATCH_SIZE
from laplax_kfac.curvature.matching import parse_like
from laplax_kfac.parsing.program import ModelFn, Program
from laplax_kfac.posterior.posterior import Posterior
from laplax_kfac.predictive.jacobians import (
    Expansion,
    Linearised,
    compiled_linearise,
    in_chunks,
    linearise,
    most_inputs,
    output_covariance,
    output_covariances,
    output_variance,
)

TABLE_BYTES = 2**28
"""Most memory for the predictions of a dataset, and for the Jacobians kept for a grid of priors."""

LINEARISED = "laplax_kfac_linearised"
"""The prior argument that carries the linearised model along a grid of priors."""


# -- one input ---------------------------------------------------------------------------------


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

    def __call__(self, vector: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product with a vector like the output."""
        flat = jnp.reshape(vector, -1)
        product = jnp.matmul(self.covariance(), flat, precision=jax.lax.Precision.HIGHEST)
        return product.reshape(self.shape)

    def to_dense(self) -> Float[Array, "..."]:
        """The covariance with its second axis in the shape of the output, all axes reversed."""
        dense = self.covariance()
        return dense.reshape(len(dense), *self.shape).transpose()


def closed_form(
    posterior: Posterior, model_fn: ModelFn, params: PyTree, x: PyTree
) -> OutputCovariance | None:
    """Covariance of the outputs at one input.

    Args:
        posterior: The posterior.
        model_fn: ``model_fn(input=, params=)``, for one example.
        params: The trained parameters.
        x: One input.

    Returns:
        None if there is no closed form: the model has not the layers of the posterior (it may be
        another function of the same parameters), or not one array as its output.
    """
    program = program_of(posterior.precision, model_fn, params, x)
    if program is None:
        return None
    blocks = posterior.precision.blocks
    linear = _with_or_without_vmap(
        functools.partial(linearise, program, jax.tree.leaves(params), program.consts, blocks), x
    )
    variances = [1.0 / block.eigenvalues for block in blocks]
    return OutputCovariance(
        program.output.shape,
        lambda: output_variance(linear, variances),
        lambda: output_covariance(linear, linear, variances),
    )


def program_of(
    matrix: BlockDiagonal, model_fn: ModelFn, params: PyTree, x: PyTree
) -> Program | None:
    """The model with the layers of a matrix and one output array; None if it is another."""
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), x)
    try:
        program = parse_like(matrix, model_fn, params, example)
    except ValueError:
        return None
    return program if hasattr(program.output, "shape") else None


def _with_or_without_vmap(function: Callable[..., Any], x: PyTree) -> Any:
    """A function of one example; without vmap where a primitive of the model has no rule for it."""
    try:
        return function(x)
    except NotImplementedError:
        return function(x, sequential=True)


# -- all inputs of a dataset -------------------------------------------------------------------


@pytrees.register
@dataclass(frozen=True)
class Numbered:
    """Stands for one input of a dataset, or for all of them."""

    number: Int[Array, "*N"]


@pytrees.register
@dataclass(frozen=True)
class Tabulated:
    """The state of a posterior, and the output variances or covariances at all inputs."""

    posterior: Posterior
    spreads: Float[Array, "N C *C"]

    def at(self, x: Numbered, shape: tuple[int, ...]) -> OutputCovariance:
        """Covariance of the outputs, of that shape, at one input."""
        spread = self.spreads[x.number]
        diagonal = spread if spread.ndim == 1 else jnp.diagonal(spread)
        return OutputCovariance(shape, lambda: diagonal, lambda: spread)


@dataclass(frozen=True)
class Dataset:
    """Predictions at all inputs of a dataset, for any prior.

    `posterior_fn` and `predict` take the place of a user's own in laplax, and `numbered` that of
    the data. Given a real input, they do what the user's own do.

    Attributes:
        own_posterior_fn: laplax's posterior function.
        model_fn: ``model_fn(input=, params=)``, for one example.
        params: The trained parameters.
        batch: The data.
        matrix: A posterior precision, for its bases.
        program: The model.
        diagonal: Whether variances are enough.
    """

    own_posterior_fn: Callable[..., Any]
    model_fn: ModelFn
    params: PyTree
    batch: Batch
    matrix: BlockDiagonal
    program: Program
    diagonal: bool

    @property
    def fits(self) -> bool:
        """Whether the predictions at all inputs take at most `TABLE_BYTES`."""
        outputs = self.program.output.size
        return _ITEM * len(self) * outputs * (1 if self.diagonal else outputs) <= TABLE_BYTES

    def __len__(self) -> int:
        return batch_size(self.batch)

    @functools.cached_property
    def numbered(self) -> Batch:
        """The data with a number for every input."""
        return {"input": Numbered(jnp.arange(len(self))), "target": self.batch["target"]}

    @functools.cached_property
    def outputs(self) -> Float[Array, "N *shape"]:
        """The model's outputs at all inputs."""

        @jax.jit
        def outputs(params: PyTree, xs: PyTree) -> Array:
            def one(x: PyTree, *, sequential: bool = False) -> Array:
                del sequential
                return self.model_fn(input=x, params=params)

            return map_examples(one, xs)

        most = self._most(traced=False)
        of_part = functools.partial(outputs, self.params)
        return in_chunks(of_part, self.batch["input"], most, traced=False)

    def predict(self, input: Any, params: PyTree) -> Any:
        """The model, on inputs and on their numbers."""
        if isinstance(input, Numbered):
            return self.outputs[input.number]
        return self.model_fn(input=input, params=params)

    def linearise(self) -> PyTree:
        """What is kept for a grid of priors: Jacobians at all inputs, or the inputs if too large.

        It goes to `posterior_fn` as the prior argument `LINEARISED`.
        """
        xs, at = self.batch["input"], functools.partial(self._linearise, self._expansion)
        kept = jax.eval_shape(at, xs)
        if sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) > TABLE_BYTES:
            return xs
        return in_chunks(at, xs, self._most(traced=False), traced=False)

    @functools.cached_property
    def _linearise(self) -> Callable[[Expansion, PyTree], Linearised]:
        return compiled_linearise(self.model_fn, self.program)

    @property
    def _expansion(self) -> Expansion:
        return Expansion(jax.tree.leaves(self.params), self.program.consts, self.matrix.blocks)

    def posterior_fn(self, prior_arguments: Any, loss_scaling_factor: Any = 1.0) -> Any:
        """laplax's posterior, with the predictions at all inputs in its state."""  # noqa: D403
        arguments = dict(prior_arguments)
        linear = arguments.pop(LINEARISED, self.batch["input"])
        posterior = self.own_posterior_fn(arguments, loss_scaling_factor)
        spreads = self._spreads(posterior.state.precision, linear)
        return replace(
            posterior,
            state=Tabulated(posterior.state, spreads),
            cov_mv=lambda state: posterior.cov_mv(state.posterior),
            scale_mv=lambda state: posterior.scale_mv(state.posterior),
        )

    def _spreads(self, precision: BlockDiagonal, linear: PyTree) -> Float[Array, "N C *C"]:
        """Variances or covariances, from the linearised model or from the inputs."""
        variances = [1.0 / block.eigenvalues for block in precision.blocks]
        expansion = self._expansion._replace(blocks=precision.blocks)
        traced = jaxprs.is_traced((expansion, variances, linear))

        def of_part(part: PyTree) -> Array:
            known = part if isinstance(part, Linearised) else self._linearise(expansion, part)
            return output_covariances(known, variances, diagonal=self.diagonal)

        return in_chunks(of_part, linear, self._most(traced=traced), traced=traced)

    def _most(self, *, traced: bool) -> int:
        """How many inputs are worked on at once."""
        return most_inputs(self.program, DEFAULT_BATCH_SIZE, traced=traced)


_ITEM = 8  # bytes of a number, at most
