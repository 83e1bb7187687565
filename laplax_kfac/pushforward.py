"""The closed-form predictive in the form that laplax's pushforward works with.

laplax asks for the covariance of the outputs at one input as a product with vectors, made anew for
every input and every prior. `closed_form` gives it the contraction of the layers' Jacobians. A
`Dataset` works out the predictions for all inputs together, and hands them to laplax by number;
what does not depend on the prior, the Jacobians in the eigenbases, is then worked out once for a
whole grid of priors.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac.blocks import BlockDiagonal
from laplax_kfac.capture import map_examples, record_size
from laplax_kfac.data import Batch, batch_size
from laplax_kfac.jacobians import Jacobian, covariance, numbers, of_example, variance
from laplax_kfac.matching import parse_like
from laplax_kfac.parser import ModelFn, Program
from laplax_kfac.posterior import Posterior

TABLE_BYTES = 2**28
"""Most memory for the predictions of a dataset, and for the Jacobians kept for a grid of priors."""

MOST_INPUTS = 64
"""Most inputs that are worked on at once; fewer if their Jacobians are large."""

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linearised:
    """The Jacobian at one input in the bases of the blocks, by number of the layer; no prior."""

    jacobians: dict[int, Jacobian]


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
    leaves = jax.tree.leaves(params)
    linear = _with_or_without_vmap(
        functools.partial(_linearise, program, leaves, posterior.precision), x
    )
    values = posterior.precision.map(jnp.reciprocal)
    return OutputCovariance(
        program.output.shape,
        lambda: _contract(program, linear, values, diagonal=True),
        lambda: _contract(program, linear, values, diagonal=False),
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


def _linearise(
    program: Program,
    leaves: Sequence[Array],
    matrix: BlockDiagonal,
    x: PyTree,
    *,
    sequential: bool = False,
) -> Linearised:
    consts = program.consts
    return Linearised(
        of_example(program, leaves, matrix.blocks, x, consts=consts, sequential=sequential)[1]
    )


def _contract(
    program: Program, linear: Linearised, values: BlockDiagonal, *, diagonal: bool
) -> Float[Array, "C *C"]:
    """``J Sigma J^T`` or its diagonal, with Sigma in the bases of the Jacobians."""
    total = jnp.zeros((program.output.size,) * (1 if diagonal else 2))
    for number, jacobian in linear.jacobians.items():
        eigenvalues = values.blocks[number].eigenvalues
        if diagonal:
            total = total + variance(jacobian, eigenvalues)
        else:
            total = total + covariance(jacobian, jacobian, eigenvalues)
    return total


def _with_or_without_vmap(function: Callable[..., Any], x: PyTree) -> Any:
    """A function of one example; without vmap where a primitive of the model has no rule for it."""
    try:
        return function(x)
    except NotImplementedError:
        return function(x, sequential=True)


# -- all inputs of a dataset -------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbered:
    """Stands for one input of a dataset, or for all of them."""

    number: Int[Array, "*N"]


@jax.tree_util.register_dataclass
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

        def outputs(params: PyTree, xs: PyTree) -> Array:
            def one(x: PyTree, *, sequential: bool = False) -> Array:
                del sequential
                return self.model_fn(input=x, params=params)

            return map_examples(one, xs, MOST_INPUTS)

        return jax.jit(outputs)(self.params, self.batch["input"])

    def predict(self, input: Any, params: PyTree) -> Any:
        """The model, on inputs and on their numbers."""
        if isinstance(input, Numbered):
            return self.outputs[input.number]
        return self.model_fn(input=input, params=params)

    def linearise(self) -> PyTree:
        """What is kept for a grid of priors: Jacobians at all inputs, or the inputs if too large.

        It goes to `posterior_fn` as the prior argument `LINEARISED`.
        """
        xs, leaves = self.batch["input"], jax.tree.leaves(self.params)

        def linearise(leaves: list[Array], matrix: BlockDiagonal, xs: PyTree) -> Linearised:
            function = functools.partial(_linearise, self.program, leaves, matrix)
            return map_examples(function, xs, self._part)

        kept = jax.eval_shape(linearise, leaves, self.matrix, xs)
        if sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) > TABLE_BYTES:
            return xs
        return jax.jit(linearise)(leaves, self.matrix, xs)

    def posterior_fn(self, prior_arguments: Any, loss_scaling_factor: Any = 1.0) -> Any:
        """laplax's posterior, with the predictions at all inputs in its state."""  # noqa: D403
        arguments = dict(prior_arguments)
        linear = arguments.pop(LINEARISED, self.batch["input"])
        posterior = self.own_posterior_fn(arguments, loss_scaling_factor)
        spreads = jax.jit(self._spreads)(
            jax.tree.leaves(self.params), posterior.state.precision, linear
        )
        return replace(
            posterior,
            state=Tabulated(posterior.state, spreads),
            cov_mv=lambda state: posterior.cov_mv(state.posterior),
            scale_mv=lambda state: posterior.scale_mv(state.posterior),
        )

    def _spreads(
        self, leaves: list[Array], precision: BlockDiagonal, linear: PyTree
    ) -> Float[Array, "N C *C"]:
        """Variances or covariances, from the linearised model or from the inputs."""
        values = precision.map(jnp.reciprocal)
        contract = functools.partial(_contract, self.program, values=values, diagonal=self.diagonal)

        def one(x: PyTree, *, sequential: bool = False) -> Array:
            if isinstance(x, Linearised):
                return contract(x)
            return contract(_linearise(self.program, leaves, precision, x, sequential=sequential))

        return map_examples(one, linear, self._part)

    @property
    def _part(self) -> int:
        """How many inputs are worked on at once."""
        outputs = self.program.output.size
        each = sum(
            record_size(r.layer, outputs) + sum(numbers(r, outputs)) for r in self.program.resolved
        )
        return max(1, min(MOST_INPUTS, len(self), math.floor(TABLE_BYTES / (_ITEM * max(each, 1)))))


_ITEM = 8  # bytes of a number, at most
