"""Sums of one batch, from what capture saw of every use of a layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac.capture.layer_io import (
    Cotangents,
    Counting,
    ParameterIO,
    Record,
    accumulate,
    sum_of_gradients,
)
from laplax_kfac.capture.one_use import as_one_use
from laplax_kfac.capture.side_types import needs_features, side_types
from laplax_kfac.factors.eigenvalue_correction import second_moments
from laplax_kfac.factors.gradients import NO_ROTATION, gradient_matrices, rotated_uses
from laplax_kfac.factors.sums import KroneckerSums, ParameterSums, Sums
from laplax_kfac.parsing.grouping import Resolved
from laplax_kfac.parsing.layer import Layer

KfacApprox = Literal["expand", "reduce"]
KFAC_APPROXIMATIONS = ("expand", "reduce")


def batch_sums(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    kfac_approx: Callable[[Layer], KfacApprox] = lambda _: "expand",
    input_weights: Float[Array, " N"] | None = None,
) -> tuple[Sums, ...]:
    """Sums of every layer over one batch of records, whose leaves have a leading axis N.

    Wide matrices are given by their upper tiles; see `mirrored`.

    Args:
        resolved: The layers.
        records: Their records.
        weights: What every example counts.
        kfac_approx: The treatment of weight sharing in a layer.
        input_weights: What its inputs count, where the records have some of its columns only and
            sums over all columns are to be added up; as the example by default.
    """
    input_weights = weights if input_weights is None else input_weights
    return tuple(
        _layer_sums(r, record, weights, input_weights, kfac_approx(r.layer))
        for r, record in zip(resolved, records, strict=True)
    )


def _layer_sums(
    resolved: Resolved,
    record: Record,
    weights: Float[Array, " N"],
    input_weights: Float[Array, " N"],
    kfac_approx: KfacApprox,
) -> Sums:
    layer = resolved.layer
    if record is None:
        return None
    if isinstance(record, ParameterIO):
        return ParameterSums(record.second_moment(layer.kinds[0], weights))
    if layer.block == "dense":
        matrices = gradient_matrices(rotated_uses(record))
        gradients = matrices.reshape(*matrices.shape[:2], -1)
        return ParameterSums(sum_of_gradients(gradients, layer.kinds[0], weights))
    if layer.block == "diagonal":
        return ParameterSums(second_moments(layer, record, weights, NO_ROTATION))
    weights, input_weights = accumulate(weights), accumulate(input_weights)
    sums = []
    for use in as_one_use(record) if kfac_approx == "reduce" else record:
        counting = Counting(weights, input_weights, accumulate(use.active), kfac_approx == "reduce")
        sums.append(KroneckerSums(*use.second_moments(layer.kinds, counting)))
    if len(sums) > 1:  # in one form, whatever they were formed from
        inputs, outputs = layer.kinds
        sums = [
            replace(x, inputs=inputs.aligned(x.inputs), outputs=outputs.aligned(x.outputs))
            for x in sums
        ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)


def needs_inputs(resolved: Resolved, kfac_approx: KfacApprox) -> bool:
    """Whether sums of a layer are formed from its inputs, and not from what these are made of."""
    return needs_features(resolved, reduce=kfac_approx == "reduce")


def without_cotangents(resolved: Resolved) -> Resolved:
    """A layer to which nothing is pulled back: the factor of cotangents is the identity.

    A layer that two uses share, one of them with its transpose, has cotangents and inputs on both
    sides.
    """
    layer, (inputs, outputs) = resolved.layer, resolved.layer.sides
    where = {side_types(member).index(Cotangents) for member in resolved.members}
    if layer.block != "kronecker" or len(where) > 1:
        return resolved
    sides = ("identity", outputs) if where == {0} else (inputs, "identity")
    return replace(resolved, layer=replace(layer, sides=sides))
