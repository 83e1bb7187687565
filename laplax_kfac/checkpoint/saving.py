"""`save` and `load`: curvatures, posteriors and states of an accumulator in files."""

import os
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import PyTree

from laplax_kfac import factors, files, jaxprs
from laplax_kfac.arguments import no_type_check, require_choice
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.checkpoint.contents import (
    blocks_of,
    blocks_to_arrays,
    mean_of,
    mean_to_arrays,
    state_of,
    state_to_arrays,
)
from laplax_kfac.checkpoint.records import (
    from_format_1,
    integers,
    layer_to_json,
    layers_of,
    require,
    require_fit,
    space_from_json,
    space_to_json,
)
from laplax_kfac.curvature.curvature import Curvature, Origin
from laplax_kfac.factors import Statistics
from laplax_kfac.faults import NONFINITE
from laplax_kfac.posterior.posterior import Posterior

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
        **attributes_to_json(x),
    }
    try:
        if isinstance(matrix, Statistics):
            header.update(state_to_arrays(matrix, arrays, keep=keep))
        else:
            header["sides"] = blocks_to_arrays(matrix, arrays, keep=keep)
        if isinstance(x, Posterior):
            header["mean"] = mean_to_arrays(x.mean, x.precision.space, arrays, keep=keep)
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
            precision = BlockDiagonal(blocks_of(file, layers, keep=keep), layers, space)
            found = Posterior(precision, mean_of(file, space, keep=keep))
        else:
            own = attributes_of(header)
            found = Curvature(blocks_of(file, layers, keep=keep), layers, space, **own)
        file.require_empty()
    return found


def attributes_to_json(x: object) -> dict[str, Any]:
    """What a curvature has beside its blocks, its layers and its parameters; nothing of others."""
    if not isinstance(x, Curvature):
        return {}
    return {"degree": x.degree, "origin": None if x.origin is None else asdict(x.origin)}


def attributes_of(header: dict[str, Any]) -> dict[str, Any]:
    """The same as arguments of `Curvature`; what older files do not say is left out.

    Raises:
        ValueError: If one is not of its type.
    """
    degree, origin = header.get("degree", 1), header.get("origin")
    require(type(degree) is int, f"its degree is {degree!r}")
    if origin is None:
        return {"degree": degree}
    ranks = tuple(integers(origin["input_ranks"], "the ranks of its inputs"))
    texts = [origin["loss"], origin["fisher_type"]]
    require(all(isinstance(text, str) for text in texts), f"its origin is {origin}")
    return {"degree": degree, "origin": Origin(texts[0], texts[1], ranks)}
