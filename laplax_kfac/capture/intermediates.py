"""Inputs of layers and gradients at their outputs, for users."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from laplax_kfac import pytrees
from laplax_kfac.arguments import no_type_check, require_flags
from laplax_kfac.capture.batches import as_batch, batch_size, first_example, to_arrays
from laplax_kfac.capture.capture import capture_batch
from laplax_kfac.capture.layer_io import LayerIO
from laplax_kfac.fisher import Columns, fisher_type_of
from laplax_kfac.likelihood.named import Loss, resolve_likelihood
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.grouping import Resolved
from laplax_kfac.parsing.program import ModelFn, parse, require_model


@pytrees.register
@dataclass(frozen=True)
class LayerRecord:
    """Inputs and output gradients of one layer, for every example.

    Attributes:
        inputs: Layer inputs, shape (N, S, in); (N, S, stack, in) for a stack of layers. Without
            the trailing 1 that stands for a joint bias.
        gradients: Gradients of each example's loss at the layer's output, (N, S, out) or
            (N, S, stack, out). S counts the positions that the weight is shared over; those of
            several uses of one weight are concatenated.
    """

    inputs: Float[Array, "N S *stack in"]
    gradients: Float[Array, "N S *stack out"]

    @classmethod
    def of(cls, resolved: Resolved, record: tuple[LayerIO, ...]) -> "LayerRecord":
        """What all uses of a layer saw, one after the other."""
        layer = resolved.layer
        a = jnp.concatenate([use.inputs.features()[:, 0] for use in record], axis=1)
        g = jnp.concatenate([use.gradients.features()[:, 0] for use in record], axis=1)
        if layer.bias:
            # The bias's column c is not 1 where a factor is between the product and the sum:
            # a g^T = (a / c) (c g)^T, and c g is the gradient in the bias.
            c = a[..., layer.in_features :]
            scale = jnp.where(c == 0, 1, c)  # 0 where a use did not run
            a, g = a[..., : layer.in_features] / scale, g * scale
        return cls(a, g) if layer.stack > 1 else cls(a[:, :, 0], g[:, :, 0])


@no_type_check
@on_automatic_axes
def intermediates_and_gradients(
    model_fn: ModelFn,
    params: PyTree,
    data: object,
    *,
    loss_fn: Loss,
    vmap_over_data: bool = True,
) -> dict[str, LayerRecord]:
    """Inputs of every Kronecker layer and loss gradients at its output.

    For every layer ``sum_s inputs[n, s] gradients[n, s]^T`` is the gradient of example n's loss in
    the weight, viewed as an (in, out) matrix, and ``sum_s gradients[n, s]`` that in a joint bias.
    Works under ``jit`` and ``vmap``.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters.
        data: One batch: ``(input, target)`` or ``{"input": ..., "target": ...}``; weights of
            examples play no part.
        loss_fn: A laplax ``LossFn``, its string, or a callable ``loss(output, target)`` of one
            example; the gradients are those of its value at the observed target.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.

    Returns:
        Layer name -> record. Parameters without a Kronecker form have no record: `find_layers`
        says which and why.

    Raises:
        TypeError: If ``data`` is not one batch.
        ValueError: If the batch, the loss or the model is not of a supported form.
    """
    require_model(model_fn)
    require_flags(vmap_over_data=vmap_over_data)
    batch = to_arrays(as_batch(data))
    size = batch_size(batch)
    program = parse(
        model_fn, params, first_example(batch), vmap_over_data=vmap_over_data,
    )  # fmt: skip
    records = capture_batch(
        program,
        (program.space.flatten(params, name="params"), program.consts),
        batch,
        Columns(resolve_likelihood(loss_fn), fisher_type_of("empirical")),
        keys=jax.random.split(jax.random.key(0), size),
    )
    return {
        resolved.layer.name: LayerRecord.of(resolved, record)
        for resolved, record in zip(program.resolved, records, strict=True)
        if isinstance(record, tuple)
    }
