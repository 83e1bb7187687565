"""What may be wrong with a batch, looked for within a compiled pass over it."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from laplax_kfac.capture.batches import Batch
from laplax_kfac.faults import NOT_FINITE, Fault
from laplax_kfac.likelihood.record import Likelihood

WEIGHTS = Fault("weights", "numbers that are negative, NaN or infinite; an example counts w >= 0.")
INPUTS = Fault("inputs", NOT_FINITE)


def faults_of(
    likelihood: Likelihood,
    output: PyTree,
    batch: Batch,
    weights: Float[Array, " N"],
    wrong: Mapping[Fault, Bool[Array, ""]],
) -> dict[Fault, Bool[Array, ""]]:
    """What is wrong with the examples of a batch that count.

    Args:
        likelihood: It knows what targets may be.
        output: The model's output for one example, of which only shapes and dtypes matter.
        batch: The batch.
        weights: What every example counts.
        wrong: Whether what was made of the batch is not finite: then inputs are looked at, too.
    """
    counted = weights != 0
    found = {WEIGHTS: ~jnp.all((weights >= 0) & (weights < jnp.inf))}
    if likelihood.faults is not None:
        faults = likelihood.faults

        def any_of(y: PyTree) -> dict[str, Bool[Array, ""]]:
            return {
                text: jax.tree.reduce(jnp.logical_or, jax.tree.map(jnp.any, flags))
                for text, flags in faults(output, y).items()
            }

        of_targets = jax.vmap(any_of)(batch["target"])
        found |= {Fault("targets", text): jnp.any(x & counted) for text, x in of_targets.items()}
    any_wrong = functools.reduce(jnp.logical_or, wrong.values(), jnp.zeros((), bool))
    # Not with every batch: to read all inputs takes a small model some percent of its time.
    inputs = jax.lax.cond(
        any_wrong, lambda x: ~all_finite(x), lambda _: jnp.zeros((), bool), batch["input"]
    )
    return {**found, **wrong, INPUTS: inputs}


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether all numbers of a pytree are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # One sum for all of them is faster to compile than one for each: that of NaN is NaN.
    flat = [jnp.ravel(x) * 0 for x in leaves]
    return jnp.isfinite(jnp.sum(jnp.concatenate(flat))) if flat else jnp.ones((), bool)
