"""What a pass over a batch would need, before there are data."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from laplax_kfac import machine
from laplax_kfac.curvature.options import Settings
from laplax_kfac.curvature.passes import Arrays, Compiled
from laplax_kfac.curvature.peaks import Peak
from laplax_kfac.parsing.program import Program
from laplax_kfac.summaries import readable_bytes

MUCH = 4e9  # bytes from where on there is advice
FEW_COLUMNS = 32


@dataclass(frozen=True)
class Work:
    """A pass over a batch, with a stand-in for the loss.

    The loss is cross entropy where the outputs can be logits, which has the most vectors to pull
    back of the usual ones, and squared error otherwise.

    Attributes:
        program: The parsed model.
        settings: What is pulled back.
        params: The parameters, or their shapes.
        example: Shapes of one input.
        batch_size: Examples of the batch.
    """

    program: Program
    settings: Settings
    params: PyTree
    example: PyTree
    batch_size: int

    @staticmethod
    def loss_for(output: PyTree) -> str:
        """The name of the loss that stands for any of a model with such an output."""
        leaves = jax.tree.leaves(output)
        logits = len(leaves) == 1 and jnp.issubdtype(leaves[0].dtype, jnp.floating)
        return "cross_entropy" if logits and leaves[0].shape[-1:] > (1,) else "mse"

    @functools.cached_property
    def columns(self) -> int:
        """The vectors that are pulled back for an example."""
        return self.settings.columns.number(self.program.output, self.program.output)

    @functools.cached_property
    def peak(self) -> Peak:
        """The memory of the pass."""
        passes = Compiled.of(replace(self.program, consts=[]), self.settings)
        settings, examples, peak_with = passes.needs(self.shapes())
        return peak_with(settings, examples)

    def shapes(self) -> Arrays:
        """Shapes of what the pass works on."""

        def arrays(
            leaves: list[Array],
            consts: Sequence[ArrayLike],
            example: dict[str, PyTree],
            key: Key[Array, ""],
        ) -> Arrays:
            batch = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (self.batch_size, *x.shape)), example
            )
            weights, number = jnp.ones(self.batch_size), jnp.zeros((), jnp.uint32)
            return Arrays(leaves, list(consts), batch, weights, key, number)

        example = {"input": self.example, "target": self.program.output}
        leaves = jax.eval_shape(self.program.space.as_real, jax.tree.leaves(self.params))
        found: Arrays = jax.eval_shape(
            arrays, leaves, self.program.consts, example, self.settings.key
        )
        return found

    def advice(self) -> list[str]:
        """What to change where the pass needs much memory for what it pulls back."""
        if self.peak.temporary <= MUCH or self.columns <= FEW_COLUMNS:
            return []
        return [
            f"advice: {self.columns} columns are pulled back for every example. "
            "`sketches=32` or `fisher_type='mc'` pulls back a few random ones, unbiased."
        ]

    def __str__(self) -> str:
        """The memory in words."""
        room = machine.room()
        few = "" if room is None or self.peak.total <= room else ", more than there is"
        return (
            f"about {readable_bytes(self.peak.total)}{few} (batches of {self.batch_size}, "
            f"{self.columns} columns pulled back for every example)"
        )
