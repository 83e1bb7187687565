"""The structure of what is saved, in JSON and back: layers, segments, the parameters' tree.

Trees of dicts, lists and tuples come back by themselves; other containers (flax.nnx states, equinox
modules) need the parameters to load into.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from laplax_kfac.bases import kind_of
from laplax_kfac.files import Archive, Json
from laplax_kfac.parsing.layer import BlockKind, Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Contiguous, Scattered, Segment

WORDS = {"name": str, "pattern": str, "reason": str, "bias": bool}
NUMBERS = {"in_features", "out_features", "positions", "stack", "uses"}
OTHERS = {"params", "block", "sides", "segments"}
"""The entries of a layer."""

LARGEST = 2**62
"""No number of parameters is larger: ids are 64-bit integers."""


def require(fits: bool, what: str) -> None:
    """Refuse what a file says if it does not fit.

    Raises:
        ValueError: If it does not.
    """
    if not fits:
        raise ValueError(what)


def integers(values: Json, what: str, least: int = 0) -> tuple[int, ...]:
    """A list of integers.

    Raises:
        ValueError: If it is something else, or one is smaller than the least.
    """
    plain = isinstance(values, list) and all(type(x) is int and x >= least for x in values)
    require(plain and math.prod(filter(None, values)) < LARGEST, f"{what} are {values!r}")
    return tuple(values)


# -- layers ------------------------------------------------------------------------------------


def layer_to_json(layer: Layer, k: int, arrays: dict[str, np.ndarray]) -> Json:
    """A layer; ids in no simple order become an array."""
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


def layers_of(file: Archive, space: ParameterSpace) -> tuple[Layer, ...]:
    """The layers, if they share the parameters among them.

    Raises:
        ValueError: If a layer does not fit the parameters, or itself.
    """
    entries = file.header["layers"]
    layers = tuple(layer_from_json(entry, k, file, space) for k, entry in enumerate(entries))
    whole = [s.place for layer in layers for s in layer.segments if isinstance(s.place, Contiguous)]
    ids = [
        s.place.ids for layer in layers for s in layer.segments if isinstance(s.place, Scattered)
    ]
    single = np.sort(np.concatenate([np.zeros(0, np.int64), *(x.ravel() for x in ids)]))
    spans = [(place.start, place.stop) for place in whole if place.start < place.stop]
    spans = sorted([*spans, *((int(x), int(x) + 1) for x in single)])
    apart = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    require(apart, "two layers hold the same parameters")
    return layers


def layer_from_json(entry: Json, k: int, file: Archive, space: ParameterSpace) -> Layer:
    """A layer that is in order, and whose parameters there are.

    Raises:
        ValueError: If it is not.
    """
    segments = tuple(
        segment_from_json(saved, f"layer{k}/ids{s}", file, space)
        for s, saved in enumerate(entry["segments"])
    )
    values: Json = {**entry, "segments": segments}
    missing = WORDS.keys() - values.keys()
    require(
        not missing and values.keys() <= WORDS.keys() | NUMBERS | OTHERS,
        f"layer {k} has the entries {sorted(values)}",
    )
    for name, kind in WORDS.items():
        require(type(values[name]) is kind, f"layer {k} has the {name} {values[name]!r}")
    integers([values[name] for name in NUMBERS], f"the sizes of layer {k}")
    require(values["block"] in get_args(BlockKind), f"layer {k} has the block {values['block']!r}")
    for name in ("params", "sides"):
        values[name] = tuple(values[name])
        require({*map(type, values[name])} <= {str}, f"layer {k} has the {name} {values[name]!r}")
    require(len([kind_of(text) for text in values["sides"]]) == 2, f"layer {k} has no two sides")
    layer = Layer(**values)
    shapes = [s.shape for s in segments]
    total = sum(map(math.prod, shapes))
    require(total == layer.size, f"layer {k} has {total} ids for {layer.size} parameters")
    if layer.is_matrix and layer.size:
        rows = {(len(s), s[0], s[-1]) for s in shapes}
        fits = rows == {(3, layer.stack, layer.out_features)}
        require(fits, f"layer {k} has rows of the shapes {shapes}")
    elif segments:
        require(len(segments) == 1, f"layer {k}, no matrix, has {len(segments)} segments")
    return layer


def segment_from_json(saved: Json, name: str, file: Archive, space: ParameterSpace) -> Segment:
    """A segment whose ids there are.

    Raises:
        ValueError: If there are not.
    """
    shape = integers(saved["shape"], "the shape of a segment")
    place: Contiguous | Scattered
    if "start" in saved:
        sizes = integers(saved["sizes"], "the sizes of a segment")
        permutation = integers(saved["permutation"], "the axes of a segment")
        (start,) = integers([saved["start"]], "the ids of a segment")
        place = Contiguous(start, sizes, permutation)
        require(sorted(permutation) == [*range(len(sizes))], f"a segment has axes {permutation}")
        fits = math.prod(sizes) == math.prod(shape) and place.stop <= space.size
        require(fits, f"a segment of the shape {shape} holds the ids {start} to {place.stop}")
    else:
        place = Scattered(file.take(name, shape, "iu"))
        inside = bool(((place.ids >= 0) & (place.ids < space.size)).all())
        require(inside, f"ids of {name!r} are outside 0 to {space.size - 1}")
    return Segment(shape, place)


# -- parameters --------------------------------------------------------------------------------


def space_to_json(space: ParameterSpace) -> Json:
    """The structure of the parameters; its tree is None where JSON cannot hold it."""
    numbers = jax.tree.unflatten(space.treedef, list(range(len(space.shapes))))
    return {
        "tree": tree_to_json(numbers),
        "shapes": space.shapes,
        "dtypes": [np.dtype(d).name for d in space.dtypes],
        "paths": space.paths,
        "names": space.names,
    }


def space_from_json(saved: Json) -> ParameterSpace:
    """The structure of the parameters; its tree is None where the file does not know it.

    Dtypes are those that the parameters would have here, with or without x64.

    Raises:
        ValueError: If it contradicts itself.
    """
    shapes = tuple(integers(shape, "the shape of a parameter") for shape in saved["shapes"])
    integers([sum(map(math.prod, shapes))], "the numbers of parameters")
    dtypes = tuple(jax.dtypes.canonicalize_dtype(jnp.dtype(d)) for d in saved["dtypes"])
    paths, names = tuple(saved["paths"]), tuple(saved["names"])
    require(all(type(x) is str for x in (*paths, *names)), "names of parameters are no strings")
    sizes = {len(shapes), len(dtypes), len(paths), len(names)}
    require(len(sizes) == 1, "shapes, dtypes and names are of different numbers of parameters")
    if saved["tree"] is None:
        return ParameterSpace(None, shapes, dtypes, paths, names)
    tree = tree_from_json(saved["tree"])
    require(jax.tree.leaves(tree) == [*range(len(shapes))], "the tree has other leaves")
    leaves = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]
    space = ParameterSpace.of(jax.tree.unflatten(jax.tree.structure(tree), leaves))
    require(space.paths == paths and space.names == names, "the tree has leaves of other names")
    return space


def require_fit(space: ParameterSpace, params: PyTree | None) -> ParameterSpace:
    """The structure with the tree of the parameters, where they are given.

    Raises:
        ValueError: If they are needed and missing, or have other leaves.
    """
    if params is None:
        if space.treedef is None:
            msg = (
                "`params` is needed to load this file: the parameters were kept in containers "
                "other than dicts, lists and tuples. Call load(path, params)."
            )
            raise ValueError(msg)
        return space
    found = ParameterSpace.of(params)
    if found.shapes != space.shapes or found.paths != space.paths:
        msg = (
            f"`params` has the leaves {found.paths} of shapes {found.shapes}; the file has "
            f"{space.paths} of shapes {space.shapes}."
        )
        raise ValueError(msg)
    return found


def tree_to_json(tree: PyTree) -> Json:
    """The tree as JSON, or None where it has containers or keys that JSON cannot tell apart."""
    if isinstance(tree, int):
        return tree
    if tree is None:
        return {"none": []}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        items = {key: tree_to_json(value) for key, value in tree.items()}
        return None if None in items.values() else {"dict": items}
    if type(tree) in (list, tuple):
        entries = [tree_to_json(value) for value in tree]
        return None if None in entries else {type(tree).__name__: entries}
    return None


def tree_from_json(saved: Json) -> PyTree:
    """The tree that `tree_to_json` wrote."""
    if isinstance(saved, int):
        return saved
    ((kind, content),) = saved.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {key: tree_from_json(value) for key, value in content.items()}
    entries = [tree_from_json(value) for value in content]
    return {"list": list, "tuple": tuple}[kind](entries)


def from_format_1(header: Json, names: Sequence[str]) -> Json:
    """A header of the format in which sides were dense where they had a basis, else diagonal."""
    sides = [
        ["dense" if f"block{k}/basis{axis}" in names else "diagonal" for axis in range(axes)]
        for k, axes in enumerate(header["axes"])
    ]
    layers = [
        {"sides": ["diagonal" if d else "dense" for d in layer.pop("diagonal")], **layer}
        for layer in header["layers"]
    ]
    return {**header, "sides": sides, "layers": layers}
