"""Predictions at all inputs of a dataset, worked out together, in the form that laplax works with.

laplax makes predictions for one input at a time, and all of them anew for every prior. A `Dataset`
works them out together and hands them to laplax by number; what does not depend on the prior, the
Jacobians in the eigenbases, is then worked out once for a whole grid of priors.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree
from laplax.curv.cov import Posterior as LaplaxPosterior

from laplax_kfac import jaxprs, machine
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import Batch, batch_size
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.laplax_adapter.curvature_types import PriorArguments
from laplax_kfac.laplax_adapter.output_covariance import Numbered, Tabulated
from laplax_kfac.parsing import cache_keys
from laplax_kfac.parsing.program import ModelFn, Program
from laplax_kfac.posterior.prior import Scalar
from laplax_kfac.predictive.jacobians import (
    Expansion,
    Linearised,
    compiled_linearise,
    in_chunks,
    most_inputs,
)
from laplax_kfac.predictive.linear_model import linearised_once, spreads_at

Spreads: TypeAlias = Float[Array, "N C"] | Float[Array, "N C C"]
PosteriorFn: TypeAlias = Callable[..., LaplaxPosterior]


LINEARISED = "laplax_kfac_linearised"
"""The prior argument that carries the linearised model along a grid of priors."""

ITEM = 8
"""Bytes of a floating-point number, at most."""


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

    own_posterior_fn: PosteriorFn
    model_fn: ModelFn
    params: PyTree
    batch: Batch
    matrix: BlockDiagonal
    program: Program
    diagonal: bool

    @property
    def fits(self) -> bool:
        """Whether the predictions at all inputs take at most `Machine.table_bytes`."""
        outputs = self.program.output.size
        return (
            ITEM * len(self) * outputs * (1 if self.diagonal else outputs)
            <= machine.MACHINE.table_bytes
        )

    def __len__(self) -> int:
        return batch_size(self.batch)

    @functools.cached_property
    def numbered(self) -> Batch:
        """The data with a number for every input."""
        return {"input": Numbered(jnp.arange(len(self))), "target": self.batch["target"]}

    @functools.cached_property
    def outputs(self) -> Float[Array, "N *shape"]:
        """The model's outputs at all inputs."""
        expansion = self._expansion
        of_part = functools.partial(
            compiled_outputs(self.model_fn, self.program), expansion.consts, expansion.leaves
        )
        return in_chunks(of_part, self.batch["input"], self._most(traced=False), traced=False)

    def in_place_of_own(self) -> dict[str, object]:
        """Arguments of laplax's pushforward with which it looks predictions up by number."""
        assert len(self.outputs) == len(self)  # worked out here, not within a loop of laplax's
        return {
            "posterior_fn": self.posterior_fn,
            "model_fn": self.predict,
            "num_samples": 0,  # laplax would draw samples of weights, which nothing here needs
        }

    def predict(self, input: PyTree, params: PyTree) -> PyTree:
        """The model, on inputs and on their numbers."""
        if isinstance(input, Numbered):
            return self.outputs[input.number]
        return self.model_fn(input=input, params=params)

    def linearise(self) -> PyTree:
        """What is kept for a grid of priors: Jacobians at all inputs, or the inputs if too large.

        It goes to `posterior_fn` as the prior argument `LINEARISED`.
        """
        xs, at = self.batch["input"], functools.partial(self._linearise, self._expansion)
        return linearised_once(at, xs, self._most(traced=False))

    @functools.cached_property
    def _linearise(self) -> Callable[[Expansion, PyTree], Linearised]:
        return compiled_linearise(self.model_fn, self.program)

    @property
    def _expansion(self) -> Expansion:
        leaves = self.program.space.as_real(jax.tree.leaves(self.params))
        return Expansion(leaves, self.program.consts, self.matrix.blocks)

    def posterior_fn(
        self, prior_arguments: PriorArguments, loss_scaling_factor: Scalar | int = 1.0
    ) -> LaplaxPosterior:
        """laplax's posterior, with the predictions at all inputs in its state."""  # noqa: D403
        arguments = dict(prior_arguments)
        linear = arguments.pop(LINEARISED, self.batch["input"])
        posterior = self.own_posterior_fn(arguments, loss_scaling_factor)
        spreads = self._spreads(posterior.state.precision, linear)
        return replace(
            posterior,
            state=Tabulated(posterior.state, tuple(self.program.output.shape), spreads),
            cov_mv=lambda state: posterior.cov_mv(state.posterior),
            scale_mv=lambda state: posterior.scale_mv(state.posterior),
        )

    def _spreads(self, precision: BlockDiagonal, linear: PyTree) -> Spreads:
        """Variances or covariances, from the linearised model or from the inputs."""
        variances = [1.0 / block.eigenvalues for block in precision.blocks]
        expansion = self._expansion._replace(blocks=precision.blocks)
        at = functools.partial(self._linearise, expansion)
        traced = jaxprs.is_traced((expansion, variances, linear))

        def of_part(part: PyTree) -> Array:
            return spreads_at(at, part, variances, diagonal=self.diagonal)[1]

        return in_chunks(of_part, linear, self._most(traced=traced), traced=traced)

    def _most(self, *, traced: bool) -> int:
        """How many inputs are worked on at once."""
        return most_inputs(self.program, DEFAULT_BATCH_SIZE, traced=traced)


def compiled_outputs(model_fn: ModelFn, program: Program) -> Callable[..., Array]:
    """The model at many inputs, compiled once for a model that stays the same.

    Args:
        model_fn: The model; what is compiled is kept no longer than it lives.
        program: The parsed model, with one array as its output.

    Returns:
        A function of the constants, of the leaves of the parameters, and of the inputs.
    """

    def make() -> Callable[..., Array]:
        jaxpr = program.jaxpr

        def outputs(consts: list[ArrayLike], leaves: list[Array], inputs: PyTree) -> Array:
            def one(x: PyTree, *, sequential: bool = False) -> Array:
                del sequential
                return eval_jaxpr(jaxpr, [], *consts, *leaves, *jax.tree.leaves(x))[0]

            return map_examples(one, inputs)

        return jax.jit(outputs)

    key = ("outputs", cache_keys.of_program(program))
    return cache_keys.kept(model_fn, program.consts, key, make)
