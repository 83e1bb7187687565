"""The model, linearised at new inputs, with the posterior of its parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, PyTree

from laplax_kfac import jaxprs, machine
from laplax_kfac.arguments import no_type_check, require_flags
from laplax_kfac.capture.batches import first_example, to_arrays
from laplax_kfac.curvature.matching import parse_like
from laplax_kfac.parsing.program import ModelFn, Program, require_model
from laplax_kfac.posterior.posterior import Posterior
from laplax_kfac.predictive.jacobians import (
    Expansion,
    Linearised,
    compiled_linearise,
    in_chunks,
    joint_output_covariances,
    most_inputs,
    output_covariances,
)


@dataclass(frozen=True)
class LinearModel:
    """The model, linearised at its inputs, and its posterior."""

    program: Program
    linearise: Callable[[Expansion, PyTree], Linearised]
    expansion: Expansion
    variances: list[Array]  # in the bases of the blocks
    inputs: PyTree

    @classmethod
    @no_type_check
    def of(
        cls,
        posterior: Posterior,
        model_fn: ModelFn,
        params: PyTree,
        inputs: PyTree,
        *,
        vmap_over_data: bool,
    ) -> "LinearModel":
        """Parse the model, whose layers must be those of the posterior.

        Raises:
            ValueError: If the model, the parameters or the inputs are not those of the posterior.
            TypeError: If an argument is of an unsupported type.
        """
        require_model(model_fn)
        require_flags(vmap_over_data=vmap_over_data)
        precision = posterior.precision
        batch = to_arrays({"input": inputs}, "inputs")
        program = parse_like(
            precision, model_fn, params, first_example(batch), vmap_over_data=vmap_over_data
        )
        return cls(
            program,
            compiled_linearise(model_fn, program),
            Expansion(
                program.space.as_real(jax.tree.leaves(params)), program.consts, precision.blocks
            ),
            [1.0 / block.eigenvalues for block in precision.blocks],
            batch["input"],
        )

    def in_output_shape(self, x: Float[Array, "N C"]) -> Float[Array, "N *outputs"]:
        """One number an output, in the shape of the model's output; raveled if that is a pytree."""
        shape = getattr(self.program.output, "shape", x.shape[1:])
        return x.reshape(x.shape[:1] + tuple(shape))

    def at(self, inputs: PyTree) -> Linearised:
        """Outputs and Jacobians at some inputs."""
        return self.linearise(self.expansion, inputs)

    @no_type_check
    def spreads(self, batch_size: int, *, diagonal: bool) -> tuple[Array, Array]:
        """Outputs, and their covariances or variances."""
        traced = jaxprs.is_traced((self.expansion, self.variances, self.inputs))
        most = most_inputs(self.program, batch_size, traced=traced)

        def of_part(part: PyTree) -> tuple[Array, Array]:
            return spreads_at(self.at, part, self.variances, diagonal=diagonal)

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


# -- for many posteriors -----------------------------------------------------------------------


def linearised_once(at: Callable[[PyTree], Linearised], inputs: PyTree, most: int) -> PyTree:
    """The model at all inputs, for many posteriors; the inputs where that takes too much memory.

    Args:
        at: Linearises the model at some inputs.
        inputs: All inputs.
        most: Most inputs that are worked on at once.
    """
    shapes = jax.eval_shape(at, inputs)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    if size > machine.MACHINE.table_bytes:
        return inputs
    return in_chunks(at, inputs, most, traced=False)


def spreads_at(
    at: Callable[[PyTree], Linearised], part: PyTree, variances: list[Array], *, diagonal: bool
) -> tuple[Array, Array]:
    """Outputs, and their covariances or variances, at some of what `linearised_once` returned."""
    linear = part if isinstance(part, Linearised) else at(part)
    return linear.output, output_covariances(linear, variances, diagonal=diagonal)
