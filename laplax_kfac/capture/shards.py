"""A batch spread over devices: each sums up its own examples, and the sums are added once.

XLA's partitioner may spread any program over a mesh, but knows nothing of what belongs together: a
loop over parts of a batch would gather every part on all devices, or add up their sums within the
loop. So the shares of the devices are an axis of their own, along which nothing is ever mixed, and
what belongs to one share is computed where it is. Parameters that are sharded over the same devices
are gathered at the start: all are needed by all examples, and factors are larger than they.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

Axes = tuple[str, ...]
Array = jax.Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Shards:
    """How a batch is spread.

    Attributes:
        mesh: The mesh.
        axes: The axes of the mesh that its leading axis lies along.
        parameters: For every leaf of the parameters, where it lies but for these axes; None for
            leaves that are not spread over them.
    """

    mesh: Mesh
    axes: Axes
    parameters: tuple[PartitionSpec | None, ...] = ()

    @classmethod
    def of(cls, batch: PyTree, parameters: Sequence[object] = ()) -> "Shards | None":
        """How the arrays of a batch are spread, if all are along the same axes."""
        found = {axes_of(x) for x in jax.tree.leaves(batch)}
        if len(found) != 1:
            return None
        ((mesh, axes),) = found
        if mesh is None or not axes or math.prod(mesh.shape[a] for a in axes) == 1:
            return None
        shards = cls(mesh, axes)
        return cls(mesh, axes, tuple(map(shards.without_axes, parameters)))

    @property
    def count(self) -> int:
        """The number of shares."""
        return math.prod(self.mesh.shape[a] for a in self.axes)

    def without_axes(self, x: object) -> PartitionSpec | None:
        """Where a parameter lies but for the axes of the batch; None if that is where it is."""
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh != self.mesh:
            return None
        entries = [e if isinstance(e, tuple) else (e,) for e in sharding.spec]
        if not set(self.axes) & {name for entry in entries for name in entry}:
            return None
        rest = [tuple(a for a in entry if a and a not in self.axes) for entry in entries]
        return PartitionSpec(*(entry or None for entry in rest))

    def gathered(self, leaves: Sequence[Array]) -> list[Array]:
        """The parameters, on every device that has a share of the batch."""
        return [
            x if spec is None else jax.lax.with_sharding_constraint(x, self.at(spec))
            for x, spec in zip(leaves, self.parameters, strict=True)
        ]

    def at(self, spec: PartitionSpec) -> NamedSharding:
        """Where an array lies."""
        return NamedSharding(self.mesh, spec)

    def split(self, x: Shaped[Array, "N *shape"]) -> Shaped[Array, "shards n *shape"]:
        """The shares of an array, stacked in front."""
        shares = x.reshape(self.count, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(shares, self.at(PartitionSpec(self.axes)))

    def sum(self, function: Callable[[Any], PyTree], arguments: PyTree) -> PyTree:
        """Sum a function over the shares of its arguments; it is itself a sum over examples."""
        shares = jax.tree.map(self.split, arguments)
        found = jax.vmap(function, spmd_axis_name=self.axes)(shares)
        held = jax.lax.with_sharding_constraint(found, self.at(PartitionSpec(self.axes)))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), held)

    def place(self, x: Array) -> Array:
        """A part of a batch, spread like the whole; as it is where the devices do not divide it."""
        return x if len(x) % self.count else jax.device_put(x, self.at(PartitionSpec(self.axes)))


def axes_of(x: object) -> tuple[Mesh | None, Axes]:
    """The mesh that an array lies on, and the axes that its leading axis lies along."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None, ()
    first = sharding.spec[0] if len(sharding.spec) else None
    return sharding.mesh, first if isinstance(first, tuple) else (first,) if first else ()
