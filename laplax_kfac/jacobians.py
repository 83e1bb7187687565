"""Jacobians of layers in the eigenbases of their blocks, and their products with a covariance.

The Jacobian of output c in a Kronecker layer is ``G_c = sum_t a_t g_ct^T``, over the positions t of
a weight. In the eigenbases the posterior covariance is a diagonal V, so that two inputs have

    cov[c, c'] = sum_io G_c[i, o] G'_c'[i, o] V[i, o].

There are two orders of summation. ``Matrices`` forms G, at C S numbers for every entry of the
weight. ``Outer`` keeps a and g apart and sums over the rows first,

    cov[c, c'] = sum_tuo g_cto g'_c'uo W[t, u, o]     with   W[t, u, o] = sum_i a_ti a'_ui V[i, o],

at S^2 numbers for every entry of the weight: the cheaper one if there are fewer positions than
outputs, and with one position no numbers of the size of the weight are ever formed. The rows of a
table that a lookup picks (``Picked``) are the case of ``Outer`` in which a is a unit vector.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac.blocks import Block, rotate
from laplax_kfac.capture import ParameterRecord, Record, capture, unit_vectors
from laplax_kfac.factors import gradient_matrices, rotated_records
from laplax_kfac.layers import Layer
from laplax_kfac.parser import Program
from laplax_kfac.resolve import Resolved

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matrices:
    """Jacobian of one example, entry by entry: shape (C, p), conjugated where it is complex."""

    entries: Float[Array, "C p"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outer:
    """Jacobian ``sum_t a_t g_ct^T`` of one example, as its inputs and cotangents."""

    inputs: Float[Array, "S stack rows"]
    gradients: Float[Array, "C S stack out"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Picked:
    """Jacobian of one example in a table: row numbers, -1 for none, and the rows' cotangents."""

    rows: Int[Array, "S stack"]
    gradients: Float[Array, "C S stack out"]


Jacobian = Matrices | Outer | Picked


def of_example(
    program: Program,
    leaves: Sequence[Array],
    blocks: Sequence[Block],
    x: PyTree,
    *,
    consts: Sequence[Array],
    sequential: bool = False,
) -> tuple[PyTree, dict[int, Jacobian]]:
    """The model's output at one input, and the Jacobians of the layers that influence it.

    Args:
        program: The parsed model.
        leaves: Leaves of the parameters.
        blocks: A block of every layer, for the bases.
        x: One input, without a batch axis.
        consts: Values of ``program.consts``.
        sequential: Whether to do without vmap.

    Returns:
        The output, and the Jacobians by number of the layer.
    """
    output, records = capture(program, leaves, consts, x, unit_vectors, sequential=sequential)
    return output, {
        number: layer_jacobian(program.resolved[number], record, blocks[number])
        for number, record in enumerate(records)
        if record is not None
    }


def layer_jacobian(resolved: Resolved, record: Record, block: Block) -> Jacobian:
    """Jacobian of one layer for one example, from unit vectors pulled back.

    Args:
        resolved: The layer.
        record: What `capture` saw of it; not None.
        block: Its block, for the basis.
    """
    if isinstance(record, ParameterRecord):
        return Matrices(jax.vmap(functools.partial(rotate, block))(record.gradients))
    assert record is not None
    outputs = record[0].gradients.shape[0]
    members, form = resolved.members, form_of(resolved, outputs)
    if form is Matrices and _is_rotated_last(resolved.layer, outputs):
        entries = gradient_matrices(members, rotated_records(members, record))
        entries = entries.reshape(outputs, *block.eigenvalues.shape)
        rotated_entries = jax.vmap(functools.partial(rotate, block))(entries)
        return Matrices(rotated_entries.reshape(outputs, -1))
    rotated = rotated_records(members, record, block)
    if form is Matrices:
        return Matrices(gradient_matrices(members, rotated).reshape(outputs, -1))
    gradients = jnp.concatenate([g for _, g in rotated], axis=1)
    if form is Picked:
        return Picked(jnp.concatenate([use.inputs[..., 0] for use in record]), gradients)
    return Outer(jnp.concatenate([a for a, _ in rotated]), gradients)


def _is_rotated_last(layer: Layer, outputs: int) -> bool:
    """Whether to rotate the matrices, not the inputs and cotangents at more positions than they."""
    if layer.block == "dense":
        return True
    rows, out = layer.rows, layer.out_features
    matrices = outputs * rows * out * (rows + out)
    return matrices < layer.positions * (rows**2 + outputs * out**2)


def form_of(resolved: Resolved, outputs: int) -> type[Jacobian]:
    """The form that takes the fewest operations for a model with C = ``outputs`` outputs."""
    layer = resolved.layer
    if not resolved.members or layer.block == "dense":
        return Matrices
    if all(m.claim.indexed and not m.claim.transposed for m in resolved.members):
        return Picked
    if any(m.claim.indexed or m.claim.transposed for m in resolved.members):
        return Matrices
    positions, entries = layer.positions, layer.rows * layer.out_features
    outer = positions**2 * (entries + outputs * layer.out_features)
    outer += outputs**2 * positions * layer.out_features
    return Outer if outer <= (positions + outputs) * outputs * entries else Matrices


def numbers(resolved: Resolved, outputs: int) -> tuple[int, int]:
    """How many numbers a layer's Jacobian takes, for an example, and its product, for a pair."""
    layer, form = resolved.layer, form_of(resolved, outputs)
    if layer.block == "none":
        return 0, 0
    if form is Matrices:
        return 2 * outputs * layer.size, outputs**2
    places = layer.positions * layer.stack
    rows = layer.rows if form is Outer else 1
    per_pair = layer.positions * places * (rows + 2 * layer.out_features)
    return (
        places * (rows + 2 * outputs * layer.out_features),
        per_pair + outputs * places * layer.out_features,
    )


def covariance(
    first: Jacobian, second: Jacobian, variances: Float[Array, "..."]
) -> Float[Array, "C C"]:
    """Covariance of the outputs for two examples, as far as one layer contributes to it.

    Args:
        first: Jacobian of the layer for one example.
        second: That for the other.
        variances: Posterior variances in the basis of the layer's block, in the block's shape.
    """
    if isinstance(first, Matrices) and isinstance(second, Matrices):
        weighted = first.entries * variances.reshape(-1)
        product = jnp.matmul(weighted, second.entries.conj().T, precision=jax.lax.Precision.HIGHEST)
        return jnp.real(product)
    assert not isinstance(first, Matrices)
    assert not isinstance(second, Matrices)
    return _einsum("cuko,duko->cd", _weighted(first, second, variances), second.gradients)


def variance(jacobian: Jacobian, variances: Float[Array, "..."]) -> Float[Array, " C"]:
    """Diagonal of the `covariance` of an example with itself."""
    if isinstance(jacobian, Matrices):
        squares = jnp.abs(jacobian.entries) ** 2
        return jnp.matmul(squares, variances.reshape(-1), precision=jax.lax.Precision.HIGHEST)
    weighted = _weighted(jacobian, jacobian, variances)
    return jnp.sum(weighted * jacobian.gradients, axis=(1, 2, 3))


def _weighted(
    first: Outer | Picked, second: Outer | Picked, variances: Float[Array, "..."]
) -> Float[Array, "C S stack out"]:
    """The cotangents of the first, ``sum_t g_cto W[t, u, o]``, at the positions u of the second."""
    stack, out = first.gradients.shape[2:]
    variances = variances.reshape(stack, -1, out)
    if isinstance(first, Outer) and isinstance(second, Outer):
        products = first.inputs[:, None] * second.inputs[None]
        weights = _einsum("tuki,kio->tuko", products, variances)
    else:
        assert isinstance(first, Picked)
        assert isinstance(second, Picked)
        same = (first.rows[:, None] == second.rows[None]) & (first.rows[:, None] >= 0)
        picked = variances[jnp.arange(stack), first.rows]
        weights = picked[:, None] * same[..., None]
    return _einsum("ctko,tuko->cuko", first.gradients, weights)
