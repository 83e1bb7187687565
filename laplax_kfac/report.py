"""What the parser found, as a table a person can act on."""

import math
from collections.abc import Iterable
from typing import Any, Unpack

import jax
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check, shown
from laplax_kfac.capture.capture import record_size
from laplax_kfac.curvature.options import OptionKeywords, Options
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.independence import require_independent
from laplax_kfac.parsing.layer import CHOSEN, Layer, Repeated
from laplax_kfac.parsing.program import ModelFn, parse, require_model
from laplax_kfac.summaries import aligned

_BYTES = 4  # factors are kept in float32 unless x64 is on
LARGE_SHARE, LARGE_BYTES = 0.1, 4e9  # from where on the report gives advice


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
        """The report: layers, shares of the kinds of block, memory, and what to do about them.

        Layers that repeat are one row, with the numbers that all of them have.
        """
        header = ("layer", "use", "block", "shape", "S", "stack", "params", "memory", "why")
        alike = Repeated.among(self)
        reasons = list(dict.fromkeys(why(like.layers[0]) for like in alike if why(like.layers[0])))
        lines = aligned([header, *(_row(like, reasons) for like in alike)])
        notes = [f"[{k}] {reason}" for k, reason in enumerate(reasons, 1)]
        parts = [self._legend(), notes, self._summary(), self.advice()]
        below = [line for part in parts if part for line in ["", *part]]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *below])

    __repr__ = __str__

    def _legend(self) -> list[str]:
        lines = []
        if any(layer.positions > 1 for layer in self):
            lines.append("S: positions of an example that share the weight (tokens, pixels, uses)")
        if any(layer.stack > 1 for layer in self):
            lines.append(
                "stack: weights side by side, a block each (heads, experts, scanned layers)"
            )
        return lines

    def advice(self) -> list[str]:
        """What to change where much of the model has no Kronecker form, or memory is large."""
        lines = []
        total = max(sum(layer.size for layer in self), 1)
        poor = [ly for ly in self if ly.block == "diagonal" and not ly.is_matrix]
        if sum(layer.size for layer in poor) > LARGE_SHARE * total:
            largest = max(poor, key=lambda layer: layer.size)
            lines.append(
                f"advice: {sum(ly.size for ly in poor) / total:.0%} of the parameters have a "
                f"diagonal alone, most of them in {largest.name!r} ({why(largest)}). Written as a "
                "matrix product, convolution or lookup a weight gets a Kronecker block; "
                "`patterns.register` adds a primitive; `dense_limit` gives small leaves a dense "
                "block; `params_filter` leaves parameters out."
            )
        dense = [layer for layer in self if layer.block == "dense"]
        if sum(map(memory, dense)) > LARGE_BYTES:
            largest = max(dense, key=lambda layer: layer.size)
            lines.append(
                f"advice: dense blocks take {_readable(sum(map(memory, dense)))}, the largest that "
                f"of {largest.name!r}. `dense_limit` or `fallback='diagonal'` makes them diagonal."
            )
        lines += [
            f"advice: the one block of {layer.size:,} parameters takes {_readable(memory(layer))}, "
            f"its eigenvectors as much again, and about {10 * layer.size**3:.0e} operations. "
            "A subnetwork, by a mask as `params_filter`, takes less."
            for layer in dense
            if layer.pattern == CHOSEN
        ]
        if self._bytes_of_example() > LARGE_BYTES and self.num_outputs > 1:
            lines.append(
                f"advice: {self.num_outputs} columns are pulled back for every example. "
                "`sketches=32` or `fisher_type='mc'` pulls back a few random ones, unbiased."
            )
        return lines

    def _bytes_of_example(self) -> int:
        return _BYTES * sum(record_size(layer, self.num_outputs) for layer in self)

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
        lines.append(
            f"memory of an example at work: up to {_readable(self._bytes_of_example())}"
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
        TypeError: If the model fails on the example, or the example is not made of arrays.
    """
    require_model(model_fn)
    chosen = Options.of(options, keywords)
    vmap_over_data = chosen.vmap_over_data

    def shape_of(x: Any) -> jax.ShapeDtypeStruct:
        try:
            found = jax.typeof(x)
        except TypeError as error:
            msg = f"`example_input` must be made of arrays, found {shown(x)}."
            raise TypeError(msg) from error
        if not vmap_over_data and not found.shape:
            msg = (
                "With `vmap_over_data=False` `example_input` must be a batch, with an axis of "
                "examples in front; found a single number."
            )
            raise ValueError(msg)
        return jax.ShapeDtypeStruct(found.shape if vmap_over_data else found.shape[1:], found.dtype)

    example = jax.tree.map(shape_of, example_input)
    if not vmap_over_data:
        require_independent(model_fn, params, example)
    program = parse(
        model_fn,
        params,
        example,
        vmap_over_data=vmap_over_data,
        selection=chosen.selection(),
    )
    outputs = sum(math.prod(o.shape) for o in jax.tree.leaves(program.output))
    return LayerReport(program.layers, outputs)


def why(layer: Layer) -> str:
    """Why a layer has no better block; empty where its block is a plain Kronecker product."""
    return "" if layer.block == "kronecker" and ";" not in layer.reason else layer.reason


def _row(like: Repeated, reasons: list[str]) -> tuple[str, ...]:
    """A row of the table; counts and memory are those of all layers in it."""
    layer, reason = like.layers[0], why(like.layers[0])
    return (
        like.label,
        "product" if layer.pattern == "dense" else layer.pattern,  # "dense" is a block beside it
        layer.block,
        layer.size_text,
        str(layer.positions),
        str(layer.stack),
        f"{sum(ly.size for ly in like.layers):,}",
        _readable(sum(map(memory, like.layers))),
        f"[{reasons.index(reason) + 1}]" if reason else "",
    )


def _readable(count: float | int) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} EB"
