"""From what equations saw to the inputs and gradients of layers: orientation, scale and parts."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from laplax_kfac import jaxprs
from laplax_kfac.capture.evaluator import Inputs
from laplax_kfac.capture.layer_io import (
    Cotangents,
    Features,
    LayerIO,
    ParameterIO,
    Patches,
    Record,
    Rows,
    SideIO,
)
from laplax_kfac.capture.matrix_io import MatrixIO
from laplax_kfac.capture.plan import Perturbations, perturbation_of
from laplax_kfac.capture.side_types import computed_type
from laplax_kfac.parsing.claims import Part
from laplax_kfac.parsing.grouping import Member
from laplax_kfac.parsing.layer import MADE, Layer
from laplax_kfac.parsing.program import Program
from laplax_kfac.parsing.uses import Use

Sides = dict[int, tuple[Array, Array | None]]
"""Number of a use of what its weight is made of -> the matrices that inputs and gradients meet."""


def sides_of(program: Program, leaves: Sequence[ArrayLike], consts: Sequence[ArrayLike]) -> Sides:
    """These of all uses, at values of the parameters."""
    values = [*consts, *leaves]
    return {
        number: use.role.map.sides([values[k] for k in use.role.map.made.inputs])
        for number, use in program.uses.items()
        if use.role.map is not None
    }


def records_of(
    program: Program,
    inputs: Inputs,
    at_uses: Perturbations,
    at_parameters: Perturbations,
    sides: Sides,
) -> list[Record]:
    """What every layer saw, from what its uses and its parameters did."""
    records: list[Record] = []
    for number, resolved in enumerate(program.resolved):
        if resolved.members:
            records.append(
                tuple(_layer_io(program, m, inputs, at_uses, sides) for m in resolved.members)
            )
        elif number in at_parameters and resolved.layer.pattern == MADE:
            records.append((MatrixIO.of(at_parameters[number], resolved.layer.rows),))
        elif number in at_parameters and resolved.layer.is_matrix:
            records.append((of_columns(at_parameters[number], resolved.layer),))
        elif number in at_parameters:
            records.append(ParameterIO(at_parameters[number]))
        else:
            records.append(None)
    return records


def _layer_io(
    program: Program, member: Member, inputs: Inputs, at_uses: Perturbations, sides: Sides
) -> LayerIO:
    """Inputs and cotangents of one use as the layer has them.

    Scans and stacks become positions or stack indices, parts are cut out, constant factors are
    multiplied in, and a joint bias is one more input.
    """
    claim, use = member.claim, program.uses[member.claim.use]
    found, active, operands = inputs[claim.use]
    values = jnp.asarray(found)
    if claim.terms:
        values = jnp.concatenate([jnp.asarray(inputs[k][0]) for k in claim.terms], axis=-1)
    positions = use.pattern.outputs(
        use.eqn, use.operand, np.empty(jaxprs.shape(use.eqn.outvars[0]), bool)
    ).shape[0]
    active = jnp.broadcast_to(active[..., None], (*use.scans, positions, values.shape[-2], 1))
    gradients = at_uses[perturbation_of(program, claim.use)]
    outputs = lambda g: use.pattern.outputs(use.eqn, use.operand, g)  # noqa: E731
    for _ in range(1 + len(use.scans)):
        outputs = jax.vmap(outputs)
    a = values if claim.bias is None else claim.bias * active.astype(values.dtype)
    a, active = _canonical(a, claim.shared), _canonical(active, claim.shared)
    g = jax.vmap(lambda x: _canonical(x, claim.shared))(outputs(gradients))
    if claim.part is not None:
        a, g = _in_part(claim.part, use, a), _features(g, claim.part[1])
    if use.pattern.active is not None:
        g = g * active.astype(g.dtype)
    kind = computed_type(member)
    if claim.use in sides and claim.bias is None:
        a, g = _through(sides[claim.use], a, g, rows=kind is Rows, indexed=use.pattern.indexed)
    if claim.input_scale is not None and kind is Rows:
        rows = jnp.asarray(claim.input_scale, g.dtype)  # (stack, rows)
        g = g * jnp.take_along_axis(rows, a[..., 0].T, axis=1).T[..., None]
    elif claim.input_scale is not None:
        a = a * jnp.asarray(claim.input_scale, a.dtype)
    if claim.output_scale is not None:
        g = g * jnp.asarray(claim.output_scale, g.dtype)
    if member.joint_bias is not None:
        a = jnp.concatenate([a, member.joint_bias * active.astype(a.dtype)], axis=-1)
    computed: SideIO = Features(a)
    if kind is Rows:
        computed = Rows(a[..., 0], claim.ids.shape[1], g.dtype)
    elif kind is Patches:
        assert claim.moments is not None
        computed = Patches(
            Features(a), tuple(map(jnp.asarray, operands)), claim.moments, member.joint_bias
        )
    inputs_of, gradients_of = claim.as_layer_sides(computed, Cotangents(g))
    return LayerIO(inputs_of, gradients_of, active[..., 0], use.imaginary)


def _through(
    sides: tuple[Array, Array | None], a: Array, g: Array, *, rows: bool, indexed: bool
) -> tuple[Array, Array]:
    """Inputs and gradients of a weight as those of the parameters that it is made of."""
    left, right = sides
    if rows:
        g = g * left.astype(g.dtype)[a]
    elif indexed:  # numbers of rows stand for one-hot vectors; -1 for a vector of zeros
        a = left.astype(g.dtype).T[a[..., 0]] * (a >= 0)
    else:
        a = a * left.astype(a.dtype) if left.ndim == 1 else a @ left.T.astype(a.dtype)
    if right is not None:
        g = g * right.astype(g.dtype) if right.ndim == 1 else g @ right.T.astype(g.dtype)
    return a, g


def of_columns(gradients: Float[Array, "R p"], layer: Layer) -> LayerIO:
    """Of one example's gradients in a stack of columns, by segment: ``g 1^T`` for each."""
    stack, sizes = layer.stack, [math.prod(s.shape) for s in layer.segments]
    parts = jnp.split(gradients, np.cumsum(sizes)[:-1], axis=1)
    columns = [g.reshape(len(g), 1, stack, g.shape[1] // stack) for g in parts]
    ones = jnp.ones((1, stack, 1), gradients.dtype)
    cotangents = Cotangents(jnp.concatenate(columns, axis=-1))
    return LayerIO(cotangents, Features(ones), jnp.ones((1, stack)))


def _in_part(part: Part, use: Use, inputs: Array) -> Array:
    """The inputs of a part of a weight; row numbers are counted in the part, -1 for other rows."""
    rows, _ = part
    if not use.pattern.indexed:
        return _features(inputs, rows)
    numbers = np.full(use.ids.shape[-2] + 1, -1)  # the last is that of -1
    numbers[rows] = np.arange(rows.size)
    return jnp.asarray(numbers, inputs.dtype)[inputs]


def _features(x: Array, index: Int[np.ndarray, " n"]) -> Array:
    """Some entries along the last axis; mostly neighbours, which a slice takes without a search."""
    first, last = int(index[0]), int(index[-1])
    return x[..., first : last + 1] if last - first + 1 == index.size else x[..., index]


def _canonical(x: Array, shared: tuple[bool, ...]) -> Array:
    """(*scans, positions, stack, features) -> (S, stack, features).

    Scans and stack axes along which the weight is shared become positions, the others stack.
    """
    scans = len(shared) - 1
    axes = [*range(scans), scans + 1]  # of shared; axis `scans` holds the pattern's positions
    along = [axis for axis, s in zip(axes, shared, strict=True) if s]
    stacked = [axis for axis, s in zip(axes, shared, strict=True) if not s]
    order = [*(a for a in along if a < scans), scans, *(a for a in along if a > scans)]
    x = x.transpose(*order, *stacked, x.ndim - 1)
    positions = int(np.prod(x.shape[: len(order)]))
    return x.reshape(positions, -1, x.shape[-1])
