"""Saving fitted curvatures, and reading them back, without pickle.

A file is a zip archive of arrays (``numpy.savez``) with one JSON entry that holds the structure:
layers, segments and the parameters' tree. Trees of dicts, lists and tuples come back by
themselves; other containers (flax.nnx states, equinox modules) need the parameters to load into.
"""

import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.bases import kind_of
from laplax_kfac.blocks.blocks import Block, BlockDiagonal
from laplax_kfac.curvature.curvature import Curvature, Origin
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Contiguous, Scattered, Segment
from laplax_kfac.posterior.posterior import Posterior

Json = Any
"""What JSON can hold: dictionaries, lists, numbers, strings."""
Arrays = Any
"""An open archive of arrays."""

FORMAT = 2
_HEADER = "header"


@no_type_check
def save(path: str | os.PathLike[str], x: Curvature | Posterior) -> None:
    """Write a curvature or a posterior; the file appears whole or not at all.

    Args:
        path: File to write; an existing one is replaced.
        x: What `kfac` or `ekfac` returned, or a `Posterior`.

    Raises:
        TypeError: If ``x`` is something else.
        ValueError: If it holds NaN or infinity.
    """
    matrix = x.precision if isinstance(x, Posterior) else x
    if not isinstance(x, Curvature | Posterior):
        msg = f"`x` must be a Curvature or a Posterior, got {type(x).__name__}."
        raise TypeError(msg)
    names = matrix.nonfinite_layers()
    if names:
        msg = f"`x` is not finite in the layers {names}: there is nothing to save. Compute it anew."
        raise ValueError(msg)
    arrays: dict[str, np.ndarray] = {}
    header = {
        "format": FORMAT,
        "kind": type(x).__name__,
        "space": _space_to_json(matrix.space),
        "degree": getattr(matrix, "degree", 1),
        "origin": asdict(x.origin) if isinstance(x, Curvature) and x.origin else None,
        "layers": [_layer_to_json(layer, k, arrays) for k, layer in enumerate(matrix.layers)],
        "sides": [[basis.kind.text for basis in block.sides] for block in matrix.blocks],
    }
    for k, block in enumerate(matrix.blocks):
        arrays[f"block{k}/eigenvalues"] = np.asarray(block.eigenvalues)
        for axis, basis in enumerate(block.sides):
            for number, x in enumerate(jax.tree.leaves(basis)):
                arrays[f"block{k}/basis{axis}/{number}"] = np.asarray(x)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{_HEADER: np.asarray(json.dumps(header))}, **arrays)  # type: ignore[arg-type]
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@no_type_check
def load(path: str | os.PathLike[str], params: PyTree | None = None) -> Any:
    """Read what `save` wrote.

    Args:
        path: The file.
        params: The parameters, or anything of their structure and shapes; needed only where they
            are no tree of dicts, lists and tuples.

    Raises:
        ValueError: If the file is of another format, if ``params`` is needed and missing, or if it
            has another structure than the parameters that were saved.
    """
    foreign = f"`path` ({path}) was not written by laplax_kfac.save."
    with Path(path).open("rb") as stream:  # np.load leaks the file if it is no archive
        if not zipfile.is_zipfile(stream):
            raise ValueError(foreign)
    with np.load(Path(path), allow_pickle=False) as file:
        if _HEADER not in file:
            raise ValueError(foreign)
        header = json.loads(str(file[_HEADER]))
        if header.get("format") == 1:
            header = _from_format_1(header, file)
        elif header.get("format") != FORMAT:
            msg = f"`path` ({path}) has format {header.get('format')}; this version reads {FORMAT}."
            raise ValueError(msg)
        space = _space_from_json(header["space"], params)
        layers = tuple(_layer_from_json(entry, k, file) for k, entry in enumerate(header["layers"]))
        blocks = tuple(_block(k, sides, file) for k, sides in enumerate(header["sides"]))
    if header["kind"] == "Posterior":
        return Posterior(BlockDiagonal(blocks, layers, space))
    origin = header.get("origin")
    if origin is not None:
        origin = Origin(**{**origin, "input_ranks": tuple(origin["input_ranks"])})
    return Curvature(blocks, layers, space, header.get("degree", 1), origin)


def _block(k: int, sides: Sequence[str], file: Arrays) -> Block:
    bases = []
    for axis, text in enumerate(sides):
        name = f"block{k}/basis{axis}"  # alone in format 1, with a number of the array in this one
        numbered = itertools.takewhile(
            file.__contains__, (f"{name}/{n}" for n in itertools.count())
        )
        names = [name] if name in file else list(numbered)
        bases.append(kind_of(text).basis_of([jnp.asarray(file[n]) for n in names]))
    return Block(tuple(bases), jnp.asarray(file[f"block{k}/eigenvalues"]))


def _from_format_1(header: Json, file: Arrays) -> Json:
    """A header of the format in which sides were dense where they had a basis, else diagonal."""
    sides = [
        ["dense" if f"block{k}/basis{axis}" in file else "diagonal" for axis in range(axes)]
        for k, axes in enumerate(header["axes"])
    ]
    layers = [
        {"sides": ["diagonal" if d else "dense" for d in layer.pop("diagonal")], **layer}
        for layer in header["layers"]
    ]
    return {**header, "sides": sides, "layers": layers}


# -- structure ---------------------------------------------------------------------------------


def _layer_to_json(layer: Layer, k: int, arrays: dict[str, np.ndarray]) -> Json:
    values = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "segments"}
    segments = []
    for s, segment in enumerate(layer.segments):
        place = segment.place
        if isinstance(place, Scattered):
            arrays[f"layer{k}/ids{s}"] = place.ids
            segments.append({"shape": segment.shape})
        else:
            segments.append({"shape": segment.shape, **asdict(place)})
    return {**values, "segments": segments}


def _layer_from_json(entry: Json, k: int, file: Arrays) -> Layer:
    segments = []
    for s, saved in enumerate(entry.pop("segments")):
        place: Contiguous | Scattered
        if "start" in saved:
            place = Contiguous(saved["start"], tuple(saved["sizes"]), tuple(saved["permutation"]))
        else:
            place = Scattered(file[f"layer{k}/ids{s}"])
        segments.append(Segment(tuple(saved["shape"]), place))
    values: Json = {**entry, "segments": segments}
    for name in ("params", "sides", "segments"):
        values[name] = tuple(values[name])
    return Layer(**values)


def _space_to_json(space: ParameterSpace) -> Json:
    numbers = jax.tree.unflatten(space.treedef, list(range(len(space.shapes))))
    return {
        "tree": _tree_to_json(numbers),
        "shapes": space.shapes,
        "dtypes": [np.dtype(d).name for d in space.dtypes],
        "paths": space.paths,
        "names": space.names,
    }


def _space_from_json(saved: Json, params: PyTree | None) -> ParameterSpace:
    shapes = tuple(tuple(s) for s in saved["shapes"])
    if params is not None:
        space = ParameterSpace.of(params)
        if space.shapes != shapes or list(space.paths) != saved["paths"]:
            msg = (
                f"`params` has the leaves {space.paths} of shapes {space.shapes}; the file has "
                f"{tuple(saved['paths'])} of shapes {shapes}."
            )
            raise ValueError(msg)
        return space
    if saved["tree"] is None:
        msg = (
            "`params` is needed to load this file: the parameters were kept in containers other "
            "than dicts, lists and tuples. Call load(path, params)."
        )
        raise ValueError(msg)
    treedef = jax.tree.structure(_tree_from_json(saved["tree"]))
    dtypes = tuple(jnp.dtype(d) for d in saved["dtypes"])
    return ParameterSpace(treedef, shapes, dtypes, tuple(saved["paths"]), tuple(saved["names"]))


_CONTAINERS: dict[str, Callable[..., PyTree]] = {"list": list, "tuple": tuple}


def _tree_to_json(tree: PyTree) -> Json:
    """The tree as JSON, or None where it has containers or keys that JSON cannot tell apart."""
    if isinstance(tree, int):
        return tree
    if tree is None:
        return {"none": []}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        items = {key: _tree_to_json(value) for key, value in tree.items()}
        return None if None in items.values() else {"dict": items}
    if type(tree) in (list, tuple):
        entries = [_tree_to_json(value) for value in tree]
        return None if None in entries else {type(tree).__name__: entries}
    return None


def _tree_from_json(saved: Json) -> PyTree:
    if isinstance(saved, int):
        return saved
    ((kind, content),) = saved.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {key: _tree_from_json(value) for key, value in content.items()}
    return _CONTAINERS[kind](_tree_from_json(value) for value in content)
