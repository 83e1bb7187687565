"""The documentation's page of what is recognised, written from the catalogue of models.

``make recognised`` rewrites it, and a test keeps it up to date. Every row is a model of the tests,
which find these layers in it and compare what is captured with JAX's own gradients.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from support.models import MODELS, Expected, Model

PAGE = Path(__file__).parents[2] / "docs" / "recognised.md"
COMMAND = "make recognised, or PYTHONPATH=tests:. python -m support.recognised"

INTRODUCTION = """# What is recognised

A layer is found by what is done with its parameters, whatever the frontend that they come from.
Each row of these tables is a model of the tests, which check its layers, and that what is captured
of them is the gradient of every example. Blocks in the second column are Kronecker products;
parameters in the third one have an exact block of another kind, for the reason that a report gives.
Sizes are inputs x outputs, with `+1` for a joint bias; `S` is the number of positions that share a
weight, `stack` that of independent matrices in one block. `lk.find_layers(model_fn, params, x[0])`
says the same of your model.

This page is written by `make recognised`.
"""


def section_of(model: Model) -> str:
    """The heading of the catalogue that a model stands under."""
    _, line = inspect.getsourcelines(model.build)
    above = Path(inspect.getfile(model.build)).read_text().splitlines()[:line]
    return [text.strip("# -") for text in above if text.startswith("# -- ")][-1]


def word(layer: Expected) -> str:
    """The use of a layer, as a report calls it."""
    return "product" if layer.pattern == "dense" else layer.pattern


def kronecker(layer: Expected) -> str:
    """A layer with a Kronecker block in a few words."""
    size = f"{layer.in_features}{'+1' * layer.bias} x {layer.out_features}"
    more = [f"S = {layer.positions}"] * (layer.positions > 1)
    more += [f"stack of {layer.stack}"] * (layer.stack > 1)
    return ", ".join([f"{word(layer)} {size}", *more])


def other(layer: Expected) -> str:
    """A layer with another block, and why."""
    why = f": {layer.because}" * bool(layer.because)
    return f"`{layer.name}` ({word(layer)}, {layer.block}){why}"


def joined(texts: Iterable[str]) -> str:
    """A cell; what is there several times is counted."""
    counted = Counter(texts)
    cell = "; ".join(f"{n} x {text}" if n > 1 else text for text, n in counted.items())
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def row(model: Model) -> str:
    """A model's row."""
    products = joined(kronecker(m) for m in model.layers if m.block == "kronecker")
    others = joined(other(m) for m in model.layers if m.block != "kronecker")
    return f"| {model.name.replace('_', ' ')} | {products} | {others} |"


def page() -> str:
    """The page."""
    sections: dict[str, list[str]] = {}
    for model in MODELS:
        sections.setdefault(section_of(model), []).append(row(model))
    tables = [
        f"## {title[0].upper()}{title[1:]}\n\n"
        "| model | Kronecker blocks | other parameters |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        for title, rows in sections.items()
    ]
    return "\n".join([INTRODUCTION, *tables])


if __name__ == "__main__":
    PAGE.write_text(page())
