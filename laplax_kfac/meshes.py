"""Meshes of devices: arrays sharded over explicit axes, worked on with automatic ones.

JAX has two ways to say how arrays lie on a mesh. On *automatic* axes the compiler finds out; on
*explicit* ones the type of an array names them, and every operation has a rule for what becomes of
them, or refuses. Factors mix what a model keeps apart: inputs with the 1 of a bias, rows of all
uses. So a public function does its work with all axes automatic: `on_automatic_axes` takes arrays
there, without moving a byte, and what it returns back.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from laplax_kfac import remeshing
from laplax_kfac.remeshing import automatic_mesh, has_explicit_axes

Function = TypeVar("Function", bound=Callable[..., Any])
Types = list[jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Left:
    """The explicit axes that were left, for models that name them.

    Attributes:
        mesh: The mesh that they are of.
        types: Structures and shapes of arguments -> their types on it.
    """

    mesh: AbstractMesh
    types: dict[object, Types]

    @classmethod
    def of(cls, mesh: AbstractMesh, arguments: Sequence[PyTree]) -> "Left":
        """What is left of these arguments; those of a record, such as its parameters, as well."""
        parts = [part for x in arguments for part in (x, *vars_of(x).values())]
        found = [part for part in parts if any(True for _ in arrays_in(part))]
        return cls(mesh, {cls.signature(x): cls.plain(x, typed=True) for x in found})

    @staticmethod
    def plain(tree: PyTree, *, typed: bool = False) -> Types:
        """Shapes and dtypes of arrays, with their shardings if they are wanted."""
        leaves = [x for x in jax.tree.leaves(tree, is_leaf=is_iterator) if hasattr(x, "dtype")]
        found = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        if not typed:
            return found
        meshes = [mesh_of(x) for x in leaves]
        return [
            s.update(sharding=jax.typeof(x).sharding) if mesh is not None else s
            for s, x, mesh in zip(found, leaves, meshes, strict=True)
        ]

    @classmethod
    def signature(cls, tree: PyTree) -> object:
        """What an argument is recognised by."""
        return jax.tree.structure(tree, is_leaf=is_iterator), tuple(
            (s.shape, s.dtype) for s in cls.plain(tree)
        )

    def evaluate(self, function: Callable[..., PyTree], args: tuple[PyTree, ...]) -> PyTree:
        """A function that names the axes that were left, at arrays without them.

        It is traced as it would be on its own, and its equations are taken over.
        """
        leaves, treedef = jax.tree.flatten(args)
        types = [t for x in args for t in self.types.get(self.signature(x), self.plain(x))]
        with jax.sharding.use_abstract_mesh(self.mesh):
            typed = jax.tree.unflatten(treedef, types)
            closed, output = jax.make_jaxpr(function, return_shape=True)(*typed)
        found = remeshing.evaluate(closed.jaxpr, closed.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(output), found)


_LEFT: ContextVar[Left | None] = ContextVar("_LEFT", default=None)


def on_automatic_axes(function: Function) -> Function:
    """Let a public function do its work with the axes of a mesh automatic.

    If an argument is sharded over explicit axes, or these are set (``jax.set_mesh``), the function
    gets its arrays with automatic ones, and what it returns has explicit ones again: with the
    shardings that the arrays have, or replicated under ``jit``.
    """

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        everything = [*args, *keywords.values()]
        mesh = explicit_mesh(everything)
        if mesh is None:
            return function(*args, **keywords)
        before = _LEFT.set(Left.of(mesh, everything))
        try:
            with jax.sharding.use_abstract_mesh(automatic_mesh(mesh)):
                args, keywords = map_arrays(automatic, (args, keywords))
                found = function(*args, **keywords)
        finally:
            _LEFT.reset(before)
        with jax.sharding.use_abstract_mesh(mesh):
            return map_arrays(functools.partial(returned, mesh), found)

    return cast("Function", call)


def on_any_axes(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A model of one example that may name explicit axes, as ``einsum(..., out_sharding=)`` does.

    Such a model cannot be traced with automatic axes; see `Left.evaluate`.
    """

    @functools.wraps(function)
    def call(*args: PyTree) -> PyTree:
        left = _LEFT.get()
        if left is None:
            return function(*args)
        try:
            return function(*args)
        except Exception:
            return left.evaluate(function, args)

    return call


# -- arrays ----------------------------------------------------------------------------------------


def automatic(x: jax.Array) -> jax.Array:
    """An array with the axes of its mesh automatic; the same one if they are."""
    mesh = mesh_of(x)
    if mesh is None or not has_explicit_axes(mesh):
        return x
    if isinstance(x, jax.core.Tracer):
        with jax.sharding.use_abstract_mesh(automatic_mesh(mesh)):
            return jax.sharding.reshard(x, PartitionSpec())
    # The devices stay, so that not a byte is moved.
    return on_mesh(x, automatic_mesh(devices_of(x)))


def returned(mesh: AbstractMesh, x: jax.Array) -> jax.Array:
    """An array with the axes of a mesh as they were before `automatic`."""
    if mesh_of(x) != automatic_mesh(mesh):
        return x
    if isinstance(x, jax.core.Tracer):
        return jax.sharding.reshard(x, PartitionSpec())
    if not isinstance(x.sharding, NamedSharding):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    return on_mesh(x, devices_of(x).update(axis_types=mesh.axis_types))


def devices_of(x: jax.Array) -> Mesh:
    """The mesh that an array, which is no tracer, lies on."""
    assert isinstance(x.sharding, NamedSharding)
    assert isinstance(x.sharding.mesh, Mesh)
    return x.sharding.mesh


def on_mesh(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The same parts of an array on the same devices, by the axes of another mesh."""
    assert isinstance(x.sharding, NamedSharding)
    spec = x.sharding.spec[: x.ndim]  # that of random keys may have one entry more
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def mesh_of(x: object) -> AbstractMesh | None:
    """The mesh that the type of an array names, if there is one."""
    if not isinstance(x, jax.Array):
        return None
    if not isinstance(x, jax.core.Tracer) and not isinstance(x.sharding, NamedSharding):
        return None  # of one device; faster than to make a type
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


def explicit_mesh(arguments: Sequence[object]) -> AbstractMesh | None:
    """The mesh with explicit axes that is set, or that an argument lies on, if there is one."""
    current = jax.sharding.get_abstract_mesh()
    if not current.empty:
        return current if has_explicit_axes(current) else None
    for x in arrays_in(arguments):
        mesh = mesh_of(x)
        if mesh is not None and has_explicit_axes(mesh):
            return mesh
    return None


def arrays_in(tree: object) -> Iterator[object]:
    """The arrays of a pytree, and of records in it that are none themselves."""
    try:
        leaves = jax.tree.leaves(tree, is_leaf=is_iterator)
    except (TypeError, ValueError):  # no pytree, as a dict with keys of several types
        return
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            yield leaf
        elif inside := vars_of(leaf):
            yield from arrays_in(list(inside.values()))


def map_arrays(function: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Apply a function to the arrays of `arrays_in`; everything else stays."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return function(leaf)
        inside = vars_of(leaf)
        new = {name: map_arrays(function, x) for name, x in inside.items()}
        changed = any(
            a is not b
            for name in new
            for a, b in zip(arrays_in(new[name]), arrays_in(inside[name]), strict=True)
        )
        return dataclasses.replace(leaf, **new) if changed else leaf

    if not any(True for _ in arrays_in(tree)):
        return tree
    return jax.tree.map(of_leaf, tree, is_leaf=is_iterator)


def is_iterator(x: object) -> bool:
    """Whether this is a stream of data, which is not looked into."""
    return hasattr(x, "__next__")  # ten times faster than to ask for the abstract class


def vars_of(x: object) -> dict[str, Any]:
    """The fields of a record that is made of arguments; nothing for anything else."""
    if isinstance(x, type) or not hasattr(x, "__dataclass_fields__"):
        return {}
    assert dataclasses.is_dataclass(x)
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}
