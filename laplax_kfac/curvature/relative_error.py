"""How far an approximate curvature is from the exact one, block by block."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_flags,
    require_key,
)
from laplax_kfac.blocks.blocks import Block, BlockDiagonal, apply
from laplax_kfac.blocks.merging import require_curvature
from laplax_kfac.capture.batches import batches, even_batches, first_example
from laplax_kfac.capture.layer_io import ParameterIO, Record
from laplax_kfac.curvature.accumulator import Accumulator
from laplax_kfac.curvature.matching import parse_like
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.curvature.options import Options
from laplax_kfac.likelihood.named import Loss
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.grouping import Resolved
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.program import ModelFn, require_model

_HIGHEST = jax.lax.Precision.HIGHEST


@pytrees.register
@dataclass(frozen=True)
class RelativeError:
    """Relative errors in Frobenius norm, ``||C - G|| / ||G||``; printing shows a table.

    Attributes:
        by_layer: One for every layer of the curvature that has a block; NaN where G is zero.
        total: Of the block-diagonal matrix as a whole.
        layers: Names of these layers.
    """

    by_layer: Float[Array, " layers"]
    total: Float[Array, ""]
    layers: tuple[str, ...] = field(metadata={"static": True})

    def __getitem__(self, layer: str) -> Float[Array, ""]:
        """The error of one layer.

        Raises:
            KeyError: If there is none of that name.
        """
        if layer not in self.layers:
            msg = f"no layer is named {layer!r}; the names are {list(self.layers)}"
            raise KeyError(msg)
        return self.by_layer[self.layers.index(layer)]

    def __str__(self) -> str:
        """A row a layer."""
        rows = [*zip(self.layers, self.by_layer, strict=True), ("all", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {float(error):8.3g}" for name, error in rows)


@no_type_check
@on_automatic_axes
def relative_error(
    curvature: BlockDiagonal,
    model_fn: ModelFn,
    params: PyTree,
    data: object,
    *,
    loss_fn: Loss,
    num_probes: int = 32,
    key: Key[Array, ""] | None = None,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> RelativeError:
    """Distance of a curvature from the exact generalised Gauss-Newton matrix, block by block.

    ``||D||_F^2`` is the mean of ``||D v||^2`` over standard normal v (Hutchinson 1990), and the
    product of the exact block with v needs per-example inputs and cotangents alone: nothing of the
    size of a block is formed. All blocks share one pass over the data.

    Args:
        curvature: What `kfac` or one of its relatives returned for this model.
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        data: The data that the curvature is of: one batch, or an iterable of batches.
        loss_fn: As for `kfac`.
        num_probes: Random vectors a layer. Estimates of errors have a relative standard deviation
            of at most ``1 / sqrt(2 num_probes)``, roughly; layers with no more parameters than
            that are compared exactly.
        key: Random key; ``jax.random.key(0)`` by default.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most examples that are worked on at once.

    Raises:
        ValueError: If the curvature is of another model, or a number is no positive integer.
        TypeError: If an argument is of an unsupported type.
    """
    require_curvature("curvature", curvature)
    require_model(model_fn)
    curvature.space.require_like(params, "params")
    num_probes = positive_integer("num_probes", num_probes)
    batch_size = positive_integer("batch_size", batch_size)
    require_flags(vmap_over_data=vmap_over_data)
    if key is not None:
        require_key("key", key)
    stream = even_batches(batches(data), batch_size)
    first = next(stream)
    program = parse_like(
        curvature, model_fn, params, first_example(first[0]), vmap_over_data=vmap_over_data
    )
    key = jax.random.key(0) if key is None else key
    exactly = [layer.size <= num_probes for layer in curvature.layers]
    vectors = tuple(
        _units(layer) if small else _normal(jax.random.fold_in(key, number), num_probes, layer)
        for number, (layer, small) in enumerate(zip(curvature.layers, exactly, strict=True))
    )
    settings = Options(vmap_over_data=vmap_over_data).settings(loss_fn)
    settings = replace(settings, selection=program.selection)
    exact = Accumulator(model_fn, params, settings).total(
        _products, itertools.chain([first], stream), vectors
    )
    columns = zip(curvature.blocks, curvature.layers, vectors, exact, exactly, strict=True)
    squares = [
        _squares(block, v, product, exactly=small)
        for block, layer, v, product, small in columns
        if not layer.frozen
    ]
    errors, norms = (jnp.stack(values) for values in zip(*squares, strict=True))
    names = tuple(layer.name for layer in curvature.layers if not layer.frozen)
    total = jnp.sqrt(jnp.sum(errors) / jnp.sum(norms))
    return RelativeError(jnp.sqrt(errors / norms), total, names)


def _units(layer: Layer) -> Float[Array, "size *shape"]:
    """All unit vectors in a layer's block."""
    return jnp.eye(layer.size, dtype=jnp.result_type(float)).reshape(layer.size, *layer.shape)


def _normal(key: Key[Array, ""], number: int, layer: Layer) -> Float[Array, "number *shape"]:
    """Standard normal vectors in a layer's block."""
    return jax.random.normal(key, (number, *layer.shape), jnp.result_type(float))


def _squares(
    block: Block, vectors: Array, exact: Array | None, *, exactly: bool
) -> tuple[Array, Array]:
    """Squared Frobenius norms of the error of a block, and of the exact block."""
    approximate = jax.vmap(functools.partial(apply, block))(vectors)
    exact = jnp.zeros_like(approximate) if exact is None else exact.reshape(approximate.shape)
    scale = 1.0 if exactly else 1.0 / len(vectors)
    return (
        scale * jnp.sum(jnp.abs(approximate - exact) ** 2),
        scale * jnp.sum(jnp.abs(exact) ** 2),
    )


def _products(
    resolved: Sequence[Resolved],
    records: Sequence[Record],
    weights: Float[Array, " N"],
    vectors: Sequence[Array],
) -> tuple[Array | None, ...]:
    """Exact blocks times vectors, over one batch: ``sum_nr G_nr <G_nr, V>``."""
    triples = zip(resolved, records, vectors, strict=True)
    return tuple(_product(r, record, weights, v) for r, record, v in triples)


def _product(
    resolved: Resolved, record: Record, weights: Float[Array, " N"], vectors: Array
) -> Array | None:
    if record is None:
        return None
    if isinstance(record, ParameterIO):
        g = record.gradients
        sizes = jnp.einsum("nrp,vp->nrv", g, vectors, precision=_HIGHEST)
        sizes = sizes * weights[:, None, None]
        return jnp.einsum("nrv,nrp->vp", sizes, g, precision=_HIGHEST)
    layer = resolved.layer
    matrices = vectors.reshape(len(vectors), layer.stack, layer.rows, layer.out_features)
    sizes = sum((use.inner(matrices) for use in record), jnp.zeros(()))
    if layer.block == "dense":  # one block for the whole stack, with what is between its members
        sizes = jnp.broadcast_to(jnp.sum(sizes, axis=-1, keepdims=True), sizes.shape)
    sizes = sizes * weights[:, None, None, None]
    return sum((use.weighted_sum(sizes) for use in record), jnp.zeros(()))
