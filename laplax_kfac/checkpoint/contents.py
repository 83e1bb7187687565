"""The arrays of what is saved: bases and eigenvalues of blocks, sums of an accumulation.

Their shapes are known from the layers: what a file holds must have these, and eigenvalues must be
finite and not negative.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from laplax_kfac.bases import UNROTATED, Basis, Kind, Sum, kind_of
from laplax_kfac.blocks.blocks import Block, BlockDiagonal
from laplax_kfac.checkpoint.records import integers, require
from laplax_kfac.factors import KroneckerSums, ParameterSums, Statistics
from laplax_kfac.faults import Fault, Faults
from laplax_kfac.files import Archive, Json
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace

Arrays = dict[str, np.ndarray]


def require_sound(layer: Layer, values: np.ndarray, *, keep: bool) -> None:
    """Refuse eigenvalues that are negative or not finite; those of frozen parameters may be.

    Raises:
        ValueError: If there are some.
    """
    finite = np.isfinite(values)
    if not (keep or layer.frozen or finite.all()):
        msg = f"eigenvalues of the layer {layer.name!r} are not finite ({values[~finite][0]})"
        raise ValueError(msg)
    if (values < 0).any():
        msg = f"eigenvalues of the layer {layer.name!r} are negative ({values[values < 0][0]})"
        raise ValueError(msg)


# -- blocks ------------------------------------------------------------------------------------


def blocks_to_arrays(matrix: BlockDiagonal, arrays: Arrays, *, keep: bool) -> Json:
    """Put the arrays of all blocks among the others; the rest, as JSON.

    Raises:
        ValueError: If eigenvalues are negative, or not finite and not kept.
    """
    for k, (layer, block) in enumerate(zip(matrix.layers, matrix.blocks, strict=True)):
        values = np.asarray(block.eigenvalues)
        require_sound(layer, values, keep=keep)
        arrays[f"block{k}/eigenvalues"] = values
        for axis, basis in enumerate(block.sides):
            for number, x in enumerate(jax.tree.leaves(basis)):
                vectors = np.asarray(x)
                finite = keep or bool(np.isfinite(vectors).all())
                require(finite, f"eigenvectors of the layer {layer.name!r} are not finite")
                arrays[f"block{k}/basis{axis}/{number}"] = vectors
    return [[basis.kind.text for basis in block.sides] for block in matrix.blocks]


def blocks_of(file: Archive, layers: Sequence[Layer], *, keep: bool) -> tuple[Block, ...]:
    """The blocks of the layers.

    Raises:
        ValueError: If they do not fit the layers.
    """
    sides = file.header["sides"]
    require(len(sides) == len(layers), f"it has {len(sides)} blocks for {len(layers)} layers")
    blocks = []
    for k, (layer, texts) in enumerate(zip(layers, sides, strict=True)):
        values = file.take(f"block{k}/eigenvalues", layer.shape)
        require_sound(layer, values, keep=keep)
        sizes = layer.shape[-2:]
        require(len(texts) == len(sizes), f"block {k} has the sides {texts}, not {len(sizes)}")
        bases = [
            basis_of(file, f"block{k}/basis{axis}", kind_of(text), size, layer.stack)
            for axis, (text, size) in enumerate(zip(texts, sizes, strict=True))
        ]
        finite = all(np.isfinite(x).all() for basis in bases for x in jax.tree.leaves(basis))
        require(finite or keep, f"eigenvectors of the layer {layer.name!r} are not finite")
        blocks.append(Block(tuple(bases), jnp.asarray(values)))
    return tuple(blocks)


def basis_of(file: Archive, name: str, kind: Kind, size: int, stack: int) -> Basis:
    """The basis of one side, of that many vectors, with the axis of a stack or without it.

    Raises:
        ValueError: If an array is missing or has another shape.
    """
    leaves = jax.tree.leaves(jax.eval_shape(lambda: kind.promote(UNROTATED, size)))
    found = []
    for number, leaf in enumerate(leaves):  # alone in format 1
        key = name if name in file.arrays else f"{name}/{number}"
        one = key in file.arrays and file.arrays[key].ndim == leaf.ndim
        shape = leaf.shape if one or stack == 1 else (stack, *leaf.shape)
        found.append(jnp.asarray(file.take(key, shape)))
    return kind.basis_of(found)


# -- means -------------------------------------------------------------------------------------


def mean_to_arrays(mean: PyTree, space: ParameterSpace, arrays: Arrays, *, keep: bool) -> bool:
    """Put the leaves of a posterior's mean among the other arrays; whether it has one.

    Raises:
        ValueError: If it is not finite and not kept.
    """
    if mean is None:
        return False
    for name, (k, leaf) in zip(space.names, enumerate(space.flatten(mean)), strict=True):
        require(keep or bool(jnp.isfinite(leaf).all()), f"the mean of {name!r} is not finite")
        arrays[f"mean/{k}"] = np.asarray(leaf)
    return True


def mean_of(file: Archive, space: ParameterSpace, *, keep: bool) -> PyTree:
    """The mean of a posterior; None where the file has none, as those of earlier versions.

    Raises:
        ValueError: If it does not fit the parameters.
    """
    there = file.header.get("mean", False)
    require(type(there) is bool, f"whether it has a mean is {there!r}")
    if not there:
        return None
    leaves = []
    for k, (name, shape) in enumerate(zip(space.names, space.shapes, strict=True)):
        leaf = jnp.asarray(file.take(f"mean/{k}", shape, "fiubc"))
        require(keep or bool(jnp.isfinite(leaf).all()), f"the mean of {name!r} is not finite")
        leaves.append(leaf)
    return space.unflatten(leaves)


# -- states ------------------------------------------------------------------------------------


def state_to_arrays(state: Statistics, arrays: Arrays, *, keep: bool) -> Json:
    """Put the arrays of a state among the others; the rest, as JSON.

    Raises:
        ValueError: If some are not finite and not kept.
    """
    for field in fields(state):
        if not field.metadata.get("static") and field.name not in ("sums", "faults"):
            arrays[f"state/{field.name}"] = np.asarray(getattr(state, field.name))
    arrays["state/faults"] = np.asarray(state.faults.first)
    for k, (layer, sums) in enumerate(zip(state.layers, state.sums, strict=True)):
        for number, x in enumerate(jax.tree.leaves(sums)):
            value = np.asarray(x)
            finite = keep or bool(np.isfinite(value).all())
            require(finite, f"sums of the layer {layer.name!r} are not finite")
            arrays[f"sums{k}/{number}"] = value
    return {
        "uses": [0 if x is None else len(getattr(x, "count", [0])) for x in state.sums],
        "faults": [list(fault) for fault in state.faults.of],
    }


def state_of(file: Archive, layers: tuple[Layer, ...], *, keep: bool) -> Json:
    """The values of a state by their names, but for the structure of the parameters.

    Raises:
        ValueError: If they do not fit the layers.
    """
    uses = integers(file.header["uses"], "the numbers of uses")
    require(len(uses) == len(layers), f"it has sums for {len(uses)} of {len(layers)} layers")
    sums = []
    for k, (layer, number) in enumerate(zip(layers, uses, strict=True)):
        like = jax.eval_shape(lambda ly=layer, n=number: sums_like(ly, n)) if number else None
        leaves, treedef = jax.tree.flatten(like)
        found = [file.take(f"sums{k}/{i}", leaf.shape) for i, leaf in enumerate(leaves)]
        finite = keep or all(np.isfinite(x).all() for x in found)
        require(finite, f"sums of the layer {layer.name!r} are not finite")
        sums.append(jax.tree.unflatten(treedef, map(jnp.asarray, found)))
    faults = file.header["faults"]
    plain = isinstance(faults, list) and all(list(map(type, f)) == [str, str] for f in faults)
    require(plain, f"its faults are {faults}")
    first = jnp.asarray(file.take("state/faults", (len(faults),), "i"))
    values: dict[str, Any] = {"faults": Faults(first, tuple(Fault(*f) for f in faults))}
    for field in fields(Statistics):
        if not field.metadata.get("static") and field.name not in ("sums", "faults"):
            found_here = file.arrays.get(f"state/{field.name}", np.zeros(()))
            shape = found_here.shape if found_here.shape == (len(layers),) else ()
            value = file.take(f"state/{field.name}", shape, "fiub")
            values[field.name] = jnp.asarray(value)
    return {**values, "sums": tuple(sums)}


def sums_like(layer: Layer, uses: int) -> KroneckerSums | ParameterSums:
    """Sums of a layer that is used so many times; of their shapes, whatever the values."""
    if layer.block == "kronecker":
        counts = jnp.ones(layer.stack)
        sizes = layer.rows, layer.out_features
        sides: list[Sum] = [
            jax.tree.map(lambda x: jnp.stack([x] * uses), kind.identity(counts, size))
            for kind, size in zip(layer.kinds, sizes, strict=True)
        ]
        return KroneckerSums(sides[0], sides[1], jnp.ones((uses, layer.stack)))
    if layer.block == "dense":
        return ParameterSums(jnp.zeros((layer.size, layer.size)))
    return ParameterSums(jnp.zeros(layer.shape))
