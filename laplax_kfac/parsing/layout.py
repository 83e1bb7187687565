"""The structure of a parameter pytree: where its leaves sit in the flattened parameter vector.

Parameters are real. A leaf of complex numbers is one of pairs, their real and imaginary parts: what
is inside has these leaves, with a last axis of two, and what comes from outside and goes there has
complex ones. A pytree like the parameters that is no point (a diagonal, standard deviations) then
has one value for the real part and one for the imaginary part of a number as its own two parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, PyTree, Shaped

from laplax_kfac.arguments import listed, shown
from laplax_kfac.parsing.segments import Contiguous, Scattered, Segment
from laplax_kfac.summaries import aligned, summarised


@summarised
@dataclass(frozen=True)
class ParameterSpace:
    """Structure of a parameter pytree: tree, shapes and dtypes of its leaves; no values.

    Attributes:
        treedef: The tree.
        shapes: Shapes of the leaves as the model takes them.
        dtypes: Their dtypes.
        paths: Where they are, as JAX prints it.
        names: The same as a person writes it.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    paths: tuple[str, ...] = field(compare=False)
    names: tuple[str, ...] = field(compare=False)

    def summary_lines(self) -> list[str]:
        """What printing shows: names, shapes and dtypes of the leaves."""
        heading = f"ParameterSpace of {len(self.shapes)} leaves, {self.size:,} parameters"
        rows = zip(self.names, map(str, self.shapes), map(str, self.dtypes), strict=True)
        return [heading, *aligned(rows)]

    @classmethod
    def of(cls, params: PyTree) -> "ParameterSpace":
        """Read the structure of a parameter pytree.

        Raises:
            ValueError: If it has no leaves.
            TypeError: If a leaf is not an array.
        """
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        if not with_paths:
            msg = "`params` has no leaves; pass the pytree of arrays that `model_fn` takes."
            raise ValueError(msg)
        for path, leaf in with_paths:
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                msg = (
                    f"`params` must hold arrays, found {type(leaf).__name__} at "
                    f"{jax.tree_util.keystr(path)}; convert it with jnp.asarray or close over it."
                )
                raise TypeError(msg)
        return cls(
            treedef,
            tuple(tuple(leaf.shape) for _, leaf in with_paths),
            tuple(jax.dtypes.canonicalize_dtype(leaf.dtype) for _, leaf in with_paths),
            tuple(jax.tree_util.keystr(path) for path, _ in with_paths),
            tuple(_slashed(path) for path, _ in with_paths),
        )

    @cached_property
    def real_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the leaves as real numbers; of pairs of them where they are complex."""
        return tuple(
            (*shape, 2) if self.is_complex(leaf) else shape
            for leaf, shape in enumerate(self.shapes)
        )

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First id of every leaf, and one past the last id of all."""
        return tuple(np.cumsum([0, *(math.prod(s) for s in self.real_shapes)]).tolist())

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return self.offsets[-1]

    def leaf_ids(self, leaf: int) -> Int[np.ndarray, "..."]:
        """Ids of one leaf, in the leaf's real shape."""
        dtype = np.int32 if self.size < np.iinfo(np.int32).max else np.int64
        ids = np.arange(self.offsets[leaf], self.offsets[leaf + 1], dtype=dtype)
        return ids.reshape(self.real_shapes[leaf])

    def leaf_at(self, id_: int) -> int:
        """The leaf that holds one id."""
        return int(np.searchsorted(self.offsets, id_, side="right")) - 1

    def leaves_of(self, ids: Int[np.ndarray, "..."]) -> list[int]:
        """The leaves that hold some of ``ids``, in order."""
        if ids.size == 0:
            return []
        first, last = self.leaf_at(int(ids.min())), self.leaf_at(int(ids.max()))
        if first == last:  # nearly always, and without a search for every id
            return [first]
        found = np.searchsorted(self.offsets, ids.ravel(), side="right") - 1
        return [int(leaf) for leaf in np.unique(found)]

    def is_complex(self, leaf: int) -> bool:
        """Whether a leaf holds complex numbers."""
        return bool(jnp.issubdtype(self.dtypes[leaf], jnp.complexfloating))

    def flatten(self, tree: PyTree, *, name: str = "v") -> list[Array]:
        """Leaves of a pytree like the parameters, as real numbers.

        Raises:
            ValueError: If its structure or a shape differs from the parameters'.
        """
        leaves, treedef = jax.tree.flatten(tree)
        shapes = tuple(tuple(np.shape(leaf)) for leaf in leaves)
        if treedef != self.treedef or shapes != self.shapes:
            self.require_like(tree, name)
            msg = (
                f"`{name}` must be a pytree with the structure and shapes of `params`: expected "
                f"{self.treedef} with shapes {self.shapes}, found {treedef} with shapes {shapes}."
            )
            raise ValueError(msg)
        return self.as_real(leaves)

    def as_real(self, leaves: Sequence[ArrayLike]) -> list[Array]:
        """Leaves as real numbers: those that the model takes as complex ones as pairs."""

        def real(leaf: int, x: ArrayLike) -> Array:
            if self.is_complex(leaf):
                return as_pairs(x)
            return x if isinstance(x, jax.Array) else jnp.asarray(x)  # with every batch

        return [real(leaf, x) for leaf, x in enumerate(leaves)]

    def require_like(self, tree: PyTree, name: str) -> None:
        """Refuse a pytree with leaves at other places, or of other shapes, than the parameters.

        Args:
            tree: The pytree.
            name: The argument that it comes from.

        Raises:
            ValueError: If it is one.
            TypeError: If a leaf is no number and no array.
        """
        leaves, treedef = jax.tree.flatten(tree)
        shapes = tuple(getattr(leaf, "shape", None) for leaf in leaves)
        if shapes == self.shapes and treedef == self.treedef:
            return
        with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
        for path, leaf in with_paths:
            if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
                msg = f"`{name}` must hold arrays, found {shown(leaf)} at {_slashed(path)!r}."
                raise TypeError(msg)
        found = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in with_paths}
        if found == dict(zip(self.paths, self.shapes, strict=True)):
            return
        found = {_slashed(path): np.shape(leaf) for path, leaf in with_paths}
        wanted = dict(zip(self.names, self.shapes, strict=True))
        differences = [
            f"{what} {listed(paths)}"
            for what, paths in (
                ("missing are", [path for path in wanted if path not in found]),
                ("unknown are", [path for path in found if path not in wanted]),
            )
            if paths
        ]
        differences += [
            f"{path!r} has shape {found[path]}, not {shape}"
            for path, shape in wanted.items()
            if path in found and found[path] != shape
        ][:3]
        msg = (
            f"`{name}` must be a pytree with the structure and shapes of `params`, the parameters "
            f"that the curvature is of: {'; '.join(differences) or 'containers differ'}."
        )
        raise ValueError(msg)

    def unflatten(self, leaves: Sequence[Array]) -> PyTree:
        """The pytree with these leaves of real numbers."""
        found = [of_pairs(x) if self.is_complex(leaf) else x for leaf, x in enumerate(leaves)]
        return jax.tree.unflatten(self.treedef, found)

    def ravel(self, leaves: Sequence[Array]) -> Shaped[Array, " P"]:
        """Concatenate leaves to one vector in laplax's order."""
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    def unravel(self, vector: Shaped[Array, " P"]) -> list[Array]:
        """Split a vector in laplax's order into leaves; the inverse of `ravel`."""
        parts = jnp.split(vector, self.offsets[1:-1])
        return [p.reshape(s) for p, s in zip(parts, self.real_shapes, strict=True)]

    def read(self, segment: Segment, leaves: Sequence[Array]) -> Num[Array, "..."]:
        """Entries of a segment, in its shape."""
        place = segment.place
        if isinstance(place, Contiguous):
            leaf = self._leaf_with(place)
            if leaf is not None:
                begin = place.start - self.offsets[leaf]
                flat = leaves[leaf].reshape(-1)[begin : begin + place.stop - place.start]
                flat = flat.reshape(place.sizes)
                return flat.transpose(place.permutation).reshape(segment.shape)
        ids = self.ids(segment)
        if ids.size == 0:
            return jnp.zeros(segment.shape)
        touched = self.leaves_of(ids)
        starts = np.concatenate([self.leaf_ids(leaf).ravel() for leaf in touched])
        flat = jnp.concatenate([leaves[leaf].reshape(-1) for leaf in touched])
        return flat[np.searchsorted(starts, ids)]

    def write(self, pieces: Sequence[tuple[Segment, Float[Array, "..."]]]) -> list[Array]:
        """Assemble leaves from the entries of segments; entries of no segment are zero."""
        whole: dict[int, Array] = {}
        buffers: dict[int, Array] = {}
        for segment, values in pieces:
            place = segment.place
            leaf = self._leaf_with(place) if isinstance(place, Contiguous) else None
            if leaf is not None and isinstance(place, Contiguous):
                permuted = tuple(place.sizes[p] for p in place.permutation)
                inverse = tuple(int(i) for i in np.argsort(place.permutation))
                flat = values.reshape(permuted).transpose(inverse).reshape(-1)
                if flat.size == math.prod(self.real_shapes[leaf]):
                    whole[leaf] = flat.reshape(self.real_shapes[leaf])
                    continue
                begin = place.start - self.offsets[leaf]
                buffer = self._buffer(buffers, leaf, values)
                buffers[leaf] = buffer.at[begin : begin + flat.size].set(flat)
                continue
            ids = self.ids(segment).ravel()
            for leaf in self.leaves_of(ids):
                inside = (ids >= self.offsets[leaf]) & (ids < self.offsets[leaf + 1])
                buffer = self._buffer(buffers, leaf, values)
                local = ids[inside] - self.offsets[leaf]
                buffers[leaf] = buffer.at[local].set(values.reshape(-1)[np.flatnonzero(inside)])
        return [
            whole[leaf] if leaf in whole else self._buffer(buffers, leaf).reshape(shape)
            for leaf, shape in enumerate(self.real_shapes)
        ]

    def ids(self, segment: Segment) -> Int[np.ndarray, "..."]:
        """Ids of a segment, in its shape."""
        place = segment.place
        if isinstance(place, Scattered):
            return place.ids
        ids = np.arange(place.start, place.stop).reshape(place.sizes)
        return ids.transpose(place.permutation).reshape(segment.shape)

    def _leaf_with(self, place: Contiguous) -> int | None:
        leaf = self.leaf_at(place.start)
        return leaf if place.stop <= self.offsets[leaf + 1] else None

    def _buffer(
        self, buffers: dict[int, Array], leaf: int, like: Float[Array, "..."] | None = None
    ) -> Array:
        dtype = jnp.float32 if like is None else like.dtype
        empty = jnp.zeros(math.prod(self.real_shapes[leaf]), dtype)
        return buffers.get(leaf, empty)


def as_pairs(x: ArrayLike) -> Array:
    """Complex numbers as pairs of real ones, along a last axis."""
    return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)


def of_pairs(pairs: Array) -> Array:
    """The complex numbers of such pairs."""
    return jax.lax.complex(pairs[..., 0], pairs[..., 1])


def _slashed(path: tuple[Any, ...]) -> str:
    """A key path as a person writes it: ``encoder/attention/query/kernel``."""
    parts = []
    for key in path:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
        parts.append(str(part).strip("./"))
    attributes = [isinstance(key, jax.tree_util.GetAttrKey) for key in path]
    if parts[-1:] == ["value"] and attributes[-2:] == [False, True]:
        parts.pop()  # flax.nnx: an entry of a state is a variable that holds its array in `value`
    return "/".join(parts) or "params"
