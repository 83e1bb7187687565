"""What the parser found, as a table a person can act on."""

import math
from collections.abc import Iterable
from typing import Any, Unpack

import jax
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.capture.capture import record_size
from laplax_kfac.curvature.options import OptionKeywords, Options
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.program import ModelFn, parse

_BYTES = 4  # factors are kept in float32 unless x64 is on


class LayerReport(tuple[Layer, ...]):
    """The layers of a model; printing it shows the report, iterating gives `Layer` records.

    Attributes:
        num_outputs: Number of the model's outputs for one example.
    """

    num_outputs: int

    def __new__(cls, layers: Iterable[Layer], num_outputs: int) -> "LayerReport":
        """A report on these layers."""
        report = super().__new__(cls, layers)
        report.num_outputs = num_outputs
        return report

    def __getitem__(self, key: Any) -> Any:
        """A layer by number or by name.

        Raises:
            KeyError: If no layer has that name.
        """
        if not isinstance(key, str):
            return super().__getitem__(key)
        for layer in self:
            if layer.name == key:
                return layer
        msg = f"no layer is named {key!r}; the names are {[layer.name for layer in self]}"
        raise KeyError(msg)

    def __str__(self) -> str:
        """The report: a row a layer, and the share of parameters in each kind of block."""
        header = ("layer", "pattern", "block", "shape", "S", "stack", "params", "memory", "why")
        rows = [header, *(_row(layer) for layer in self)]
        widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *self._summary()])

    __repr__ = __str__

    def _summary(self) -> list[str]:
        total = max(sum(layer.size for layer in self), 1)
        lines = []
        for block in ("kronecker", "dense", "diagonal", "none"):
            count = sum(layer.size for layer in self if layer.block == block)
            if count:
                lines.append(f"{block:10s} {count:>12,} parameters  {count / total:6.1%}")
        lines.append(f"memory of the factors: {_readable(sum(map(memory, self)))}")
        eigen = _BYTES * sum(layer.basis_elements + layer.size for layer in self)
        lines.append(f"memory of their eigenvectors and eigenvalues: {_readable(eigen)}")
        records = _BYTES * sum(record_size(layer, self.num_outputs) for layer in self)
        lines.append(
            f"memory of an example at work: up to {_readable(records)}"
            f" ({self.num_outputs} columns pulled back)"
        )
        return lines


def memory(layer: Layer) -> int:
    """Bytes of a layer's statistics in float32: what the streaming state holds for it."""
    if layer.block == "kronecker":
        return _BYTES * layer.uses * layer.factor_elements
    sizes = {"dense": layer.size**2, "diagonal": layer.size, "none": 0}
    return _BYTES * sizes[layer.block]


@no_type_check
@on_automatic_axes
def find_layers(
    model_fn: ModelFn,
    params: PyTree,
    example_input: PyTree,
    *,
    options: Options | None = None,
    **keywords: Unpack[OptionKeywords],
) -> LayerReport:
    """The layers that curvature is computed for, without running anything.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters.
        example_input: An input as ``model_fn`` takes it: one example, or a batch where
            ``vmap_over_data`` is False. Only its shapes and dtypes matter.
        options: As for `kfac`.
        **keywords: Any of the `Options` by their names; they change those given.

    Returns:
        The layers, ordered by their first parameter. Printing them shows a table.

    Raises:
        ValueError: If the model uses parameters inside a while loop, or has no parameters, or if
            some have no Kronecker form and their fallback is ``"error"``.
    """
    chosen = Options.of(options, keywords)
    vmap_over_data = chosen.vmap_over_data

    def shape_of(x: Any) -> jax.ShapeDtypeStruct:
        found = jax.typeof(x)
        return jax.ShapeDtypeStruct(found.shape if vmap_over_data else found.shape[1:], found.dtype)

    program = parse(
        model_fn,
        params,
        jax.tree.map(shape_of, example_input),
        vmap_over_data=vmap_over_data,
        selection=chosen.selection(),
    )
    outputs = sum(math.prod(o.shape) for o in jax.tree.leaves(program.output))
    return LayerReport(program.layers, outputs)


def _row(layer: Layer) -> tuple[str, ...]:
    kronecker = layer.block == "kronecker"
    shape = f"{layer.in_features}{'+1' if layer.bias else ''} x {layer.out_features}"
    return (
        layer.name,
        layer.pattern,
        layer.block,
        shape if layer.is_matrix else str(layer.size),
        str(layer.positions),
        str(layer.stack),
        f"{layer.size:,}",
        _readable(memory(layer)),
        "" if kronecker and ";" not in layer.reason else layer.reason,
    )


def _readable(count: float | int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
