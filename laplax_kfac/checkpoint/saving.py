"""`save` and `load`: curvatures, posteriors and states of an accumulator in files."""

import os
from dataclasses import fields
from typing import Any

import numpy as np
from jaxtyping import PyTree

from laplax_kfac import factors, files, jaxprs
from laplax_kfac.arguments import no_type_check, require_choice
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.checkpoint.contents import blocks_of, blocks_to_arrays, state_of, state_to_arrays
from laplax_kfac.checkpoint.records import (
    from_format_1,
    layer_to_json,
    layers_of,
    require_fit,
    space_from_json,
    space_to_json,
)
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.factors import Statistics
from laplax_kfac.posterior.posterior import Posterior

NONFINITE = ("error", "keep")
KINDS = ("Curvature", "Posterior", "Statistics")


@no_type_check
def save(
    path: str | os.PathLike[str],
    x: Curvature | Posterior | Statistics,
    *,
    nonfinite: str = "error",
) -> None:
    """Write a curvature, a posterior or the state of an accumulator to a file.

    The file appears whole or not at all, and is on the disk when this returns. An existing one is
    replaced, and keeps its mode; where ``path`` is a link, what it leads to is replaced.

    Args:
        path: File to write.
        x: What `kfac` and its siblings returned, a `Posterior`, or what `Accumulator.update`
            returned: a fit that is half done.
        nonfinite: ``"error"`` refuses what holds NaN or infinity, ``"keep"`` writes it.

    Raises:
        TypeError: If ``x`` or ``path`` is something else.
        ValueError: If ``x`` has eigenvalues that are negative, or not finite and not kept; if there
            is something at ``path`` that is no regular file.
        OSError: If the file cannot be written.
    """
    require_choice("nonfinite", nonfinite, NONFINITE)
    keep = nonfinite == "keep"
    if not isinstance(x, Curvature | Posterior | Statistics):
        msg = (
            f"`x` must be a Curvature or a Posterior, got {type(x).__name__}; or the state of an "
            "accumulator, as its `update` returns it."
        )
        raise TypeError(msg)
    if jaxprs.is_traced(x):
        msg = "`x` is traced: call `save` outside of jit, grad and vmap."
        raise TypeError(msg)
    matrix = x.precision if isinstance(x, Posterior) else x
    matrix = factors.mirrored(matrix) if isinstance(matrix, Statistics) else matrix
    arrays: dict[str, np.ndarray] = {}
    header = {
        "kind": type(x).__name__,
        "nonfinite": nonfinite,
        "space": None if matrix.space is None else space_to_json(matrix.space),
        "layers": [layer_to_json(layer, k, arrays) for k, layer in enumerate(matrix.layers)],
        **plain_attributes(x),
    }
    try:
        if isinstance(matrix, Statistics):
            header["uses"] = state_to_arrays(matrix, arrays, keep=keep)
        else:
            header["sides"] = blocks_to_arrays(matrix, arrays, keep=keep)
    except ValueError as error:
        advice = "" if "negative" in str(error) else "; nonfinite='keep' saves it as it is"
        msg = f"`x` cannot be saved: {error}{advice}."
        raise ValueError(msg) from None
    files.write(path, header, arrays)


@no_type_check
def load(path: str | os.PathLike[str], params: PyTree | None = None) -> Any:
    """Read what `save` wrote.

    Nothing in a file is believed: arrays are compared with their checksums, and what the file says
    with what else it says. No file makes this run code, or allocate more than it is long.

    Args:
        path: The file.
        params: The parameters, or anything of their structure and shapes; needed only where they
            are no tree of dicts, lists and tuples.

    Returns:
        The curvature, the posterior, or the state of an accumulator.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no such file, is damaged, or of another format; if ``params`` is needed
            and missing, or if it has another structure than the parameters that were saved.
        TypeError: If ``path`` is no path.
    """
    file = files.read(path)
    with files.damaged(path):
        header = file.header
        if header["format"] == 1:
            header.update(from_format_1(header, list(file.arrays)))
        kind, keep = header["kind"], header.get("nonfinite") == "keep"
        saved = None if header.get("space") is None else space_from_json(header["space"])
    if kind == "fit":
        msg = (
            f"`path` ({path}) is the checkpoint of a fit, which `kfac(..., checkpoint=path)` goes "
            "on with: it holds no curvature yet."
        )
        raise ValueError(msg)
    space = None if saved is None else require_fit(saved, params)
    with files.damaged(path):
        if kind not in KINDS or (saved is None and kind != "Statistics"):
            msg = f"it is said to hold {kind!r}, and its parameters are {header.get('space')}"
            raise ValueError(msg)
        layers = layers_of(file, saved) if saved is not None else ()
        found: Any
        if kind == "Statistics" or space is None:
            found = Statistics(**state_of(file, layers, keep=keep), layers=layers, space=space)
        elif kind == "Posterior":
            found = Posterior(BlockDiagonal(blocks_of(file, layers, keep=keep), layers, space))
        else:
            own = plain_attributes(Curvature, header)
            found = Curvature(blocks_of(file, layers, keep=keep), layers, space, **own)
        file.require_empty()
    return found


def plain_attributes(x: object, header: dict[str, Any] | None = None) -> dict[str, Any]:
    """Attributes of a record that are plain integers, beside its layers and its parameters.

    Args:
        x: The record, or its class.
        header: Where they are read from; the record by default.

    Raises:
        ValueError: If one that is read is no integer.
    """
    if not isinstance(x, Curvature) and x is not Curvature:
        return {}
    names = [f.name for f in fields(Curvature) if f.name not in ("blocks", "layers", "space")]
    if header is None:
        return {name: getattr(x, name) for name in names}
    found = {name: header[name] for name in names if name in header}
    if not all(type(value) is int for value in found.values()):
        msg = f"it has the attributes {found}"
        raise ValueError(msg)
    return found
