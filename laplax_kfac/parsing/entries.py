"""Parameters that are chosen one by one, and blocks on them: subnetworks, and the dense matrix.

A block of such parameters is no weight's: it is read off their own gradients, whatever their use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from laplax_kfac.arguments import listed, shown
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Scattered


@dataclass(frozen=True)
class Entries:
    """Some of the parameters, by their ids.

    Attributes:
        place: The ids, in rising order.
        treedef: Structure of the mask that they were given as; None for indices.
        shapes: Shapes of its leaves.
    """

    place: Scattered
    treedef: Any = None
    shapes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, chosen: PyTree) -> "Entries | None":
        """Those of a mask, a pytree of booleans, or of an array of indices; None for all else.

        Raises:
            TypeError: If arrays are neither booleans, nor one array of integers.
            ValueError: If indices are no list of different ones, or a mask chooses nothing.
        """
        leaves, treedef = jax.tree.flatten(chosen)
        if not leaves or not all(isinstance(x, np.ndarray | jax.Array) for x in leaves):
            return None
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            msg = "`params_filter` must be known when a model is traced; found a traced mask."
            raise TypeError(msg)
        arrays = [np.asarray(x) for x in leaves]
        if all(x.dtype == bool for x in arrays):
            ids = np.flatnonzero(np.concatenate([x.ravel() for x in arrays]))
            if not ids.size:
                msg = "`params_filter` is a mask that is False everywhere: choose some parameters."
                raise ValueError(msg)
            return cls(Scattered(ids), treedef, tuple(x.shape for x in arrays))
        alone = isinstance(chosen, np.ndarray | jax.Array)
        if not alone or arrays[0].dtype.kind not in "iu":
            msg = (
                "`params_filter` as a mask must be a pytree like `params` of booleans; or pass one "
                f"array of indices of parameters in their flat order; found {shown(chosen)}."
            )
            raise TypeError(msg)
        ids = np.unique(arrays[0])
        if arrays[0].ndim != 1 or ids.size != arrays[0].size or not ids.size or ids[0] < 0:
            msg = (
                "`params_filter` as indices must be one array (n,) of different indices of "
                f"parameters in their flat order, from 0; found {shown(chosen)}."
            )
            raise ValueError(msg)
        return cls(Scattered(ids))

    def ids_in(self, space: ParameterSpace) -> Int[np.ndarray, " n"]:
        """The ids, if they are some of these parameters.

        Raises:
            ValueError: If a mask is not like the parameters, or an index is beyond them.
        """
        found = self.treedef, self.shapes
        if self.treedef is not None and found != (space.treedef, space.shapes):
            mask = jax.tree.unflatten(self.treedef, [np.zeros(s, bool) for s in self.shapes])
            space.require_like(mask, "params_filter")
        ids = self.place.ids
        if ids[-1] >= space.size:
            msg = f"`params_filter` has the index {ids[-1]}, but there are {space.size} parameters."
            raise ValueError(msg)
        return ids


def trainable_ids(
    space: ParameterSpace, covered: Sequence[bool], entries: Entries | None
) -> Int[np.ndarray, " n"]:
    """Ids of all parameters that are covered; those of integer leaves never are.

    Args:
        space: The parameters.
        covered: Whether a leaf is covered.
        entries: Those that were chosen one by one, if they were.

    Raises:
        ValueError: If there are none, or the chosen are not of these parameters.
    """
    flags = np.zeros(space.size, bool)
    for leaf, wanted in enumerate(covered):
        trainable = jnp.issubdtype(space.dtypes[leaf], jnp.inexact)
        flags[space.offsets[leaf] : space.offsets[leaf + 1]] = wanted and trainable
    if entries is not None:
        chosen = np.zeros(space.size, bool)
        chosen[entries.ids_in(space)] = True
        flags &= chosen
    if not flags.any():
        msg = (
            "`params_filter` covers no parameter (of floating-point numbers): nothing would be "
            f"uncertain; the leaves are {listed(space.names)}."
        )
        raise ValueError(msg)
    return np.flatnonzero(flags)
