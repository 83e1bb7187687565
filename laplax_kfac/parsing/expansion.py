"""Equations that stand for others: what they stand for takes their place before the walk.

A ``shard_map`` splits its operands along axes of a mesh, and computes on all parts at once. So does
``vmap`` with a named axis, and what it computes is made of ordinary equations: a weight that is
split is a weight with one more axis, a sum over devices is a sum along it. Of a choice by the
platform (``lax.platform_dependent``) the branch of this platform is left.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from laplax_kfac import jaxprs
from laplax_kfac.jaxprs import Value

VARIES = ("pvary", "pcast", "pbroadcast")
"""Equations that change nothing but along which axes an array is said to differ."""


def expanded(jaxpr: Jaxpr, consts: list[ArrayLike]) -> tuple[Jaxpr, list[ArrayLike]]:
    """The jaxpr with what such equations stand for in their place, and its constants.

    Args:
        jaxpr: Its inputs are the constants, and others.
        consts: The constants.
    """
    if not any(map(is_expanded, jaxpr.eqns)):
        return jaxpr, consts
    found, new, _ = jaxprs.trace(functools.partial(run, jaxpr), *map(jaxprs.spec, jaxpr.invars))
    return found, [*new, *consts]


def is_expanded(eqn: JaxprEqn) -> bool:
    """Whether an equation stands for others, or one in its body does."""
    if eqn.primitive.name == "shard_map" or platform_branch(eqn) is not None:
        return True
    return any(is_expanded(inner) for body in jaxprs.bodies(eqn) for inner in body.eqns)


def run(jaxpr: Jaxpr, *values: Value, context: Any = None) -> list[Value]:
    """Evaluate a jaxpr by what its equations stand for.

    Args:
        jaxpr: The jaxpr.
        values: Those of its inputs.
        context: The context of the equations, in the place of their own; None for their own.
    """
    env: dict[Var, Value] = dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Var | Literal) -> Value:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        here = eqn if context is None else eqn.replace(ctx=context)
        outputs = evaluated(jaxpr, here, [read(a) for a in eqn.invars], context)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def evaluated(jaxpr: Jaxpr, eqn: JaxprEqn, values: list[Value], context: Any) -> list[Value]:
    """Evaluate one equation by what it stands for."""
    name = eqn.primitive.name
    branch = platform_branch(eqn)
    if branch is not None:
        body, consts = jaxprs.cond_branches(eqn)[branch]
        return run(jaxprs.with_consts(body), *consts, *values[1:], context=context)
    if name == "shard_map":
        try:
            return mapped(eqn, values)
        except (TypeError, ValueError, NotImplementedError, KeyError, NameError):
            return jaxprs.evaluate(jaxpr, eqn, values)  # parts that no vmap computes
    if context is not None and name in VARIES:
        return values
    if context is not None and name == "psum_invariant":
        return list(lax.psum(values, eqn.params["axes"]))
    inside = [inner for body in jaxprs.bodies(eqn) for inner in body.eqns]
    if context is not None or any(map(is_expanded, inside)):
        eqn = eqn.replace(params={k: renewed(v, context) for k, v in eqn.params.items()})
    return jaxprs.evaluate(jaxpr, eqn, values)


def renewed(value: Any, context: Any) -> Any:
    """A parameter of an equation, with its bodies expanded."""
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(renewed(x, context) for x in value)
    if not isinstance(value, Jaxpr | ClosedJaxpr):
        return value
    body, consts = jaxprs.open_jaxpr(value)
    arguments = jaxprs.with_consts(body)
    function = functools.partial(run, arguments, *consts, context=context)
    closed = jax.make_jaxpr(function)(*map(jaxprs.spec, body.invars))
    if isinstance(value, ClosedJaxpr):
        return closed
    if closed.consts:
        msg = "a body without constants of its own needs some"
        raise ValueError(msg)
    return closed.jaxpr


def platform_branch(eqn: JaxprEqn) -> int | None:
    """The branch of this platform where the platform chooses one."""
    platforms = eqn.params.get("branches_platforms")
    if eqn.primitive.name != "cond" or platforms is None:
        return None
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    platform = device if isinstance(device, str) else device.platform
    names = {platform}
    if platform == "gpu":
        names.add("rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda")
    matching = (k for k, some in enumerate(platforms) if some is None or names & {*some})
    return next(matching, None)


def mapped(eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """What a ``shard_map`` computes, by one ``vmap`` for each axis of its mesh.

    Raises:
        ValueError: If an output that shall be the same on all devices is not by its equations.
    """
    params = eqn.params
    sizes = {axis: size for axis, size in params["mesh"].shape.items()
             if axis in params.get("newly_manual_axes", params["mesh"].axis_names)}  # fmt: skip
    into, out_of = params["in_specs"], params["out_specs"]
    body, consts = jaxprs.open_jaxpr(params["jaxpr"])
    context = jax.make_jaxpr(jnp.negative)(0.0).jaxpr.eqns[0].ctx
    function: Callable[..., list[Value]] = functools.partial(
        run, jaxprs.with_consts(body), *consts, context=context
    )
    for axis in reversed(sizes):  # the last is the innermost
        function = jax.vmap(
            function,
            in_axes=tuple(0 if axis in named(spec) else None for spec in into),
            out_axes=[0 if axis in named(spec) else None for spec in out_of],
            axis_name=axis,
            axis_size=sizes[axis],
        )
    parts = [split(x, spec, sizes) for x, spec in zip(values, into, strict=True)]
    return [joined(x, spec, sizes) for x, spec in zip(function(*parts), out_of, strict=True)]


def along(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """For every axis of an array, the axes of the mesh that it is split over."""
    entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    return [*entries, *[()] * (ndim - len(entries))]


def named(spec: PartitionSpec) -> set[str]:
    """The axes of a mesh that an array is split over."""
    return {axis for axes in along(spec, 0) for axis in axes}


def split(x: ArrayLike, spec: PartitionSpec, sizes: dict[str, int]) -> Array:
    """The parts of an array, one axis of the mesh in front after the other."""
    x = jnp.asarray(x)
    shape, order = [], []
    for size, axes in zip(x.shape, along(spec, x.ndim), strict=True):
        pieces = [sizes[axis] for axis in axes]
        rest = size
        for piece in pieces:
            rest //= piece
        shape += [*pieces, rest]
        order += [*axes, ""]
    front = [order.index(axis) for axis in sizes if axis in order]
    back = [k for k, axis in enumerate(order) if not axis]
    return x.reshape(shape).transpose(*front, *back) if front else x


def joined(x: Array, spec: PartitionSpec, sizes: dict[str, int]) -> Array:
    """The array that has these parts."""
    own = [axis for axis in sizes if axis in named(spec)]
    if not own:
        return x
    ndim = x.ndim - len(own)
    order, shape = [], []
    for k, axes in enumerate(along(spec, ndim)):
        order += [*(own.index(axis) for axis in axes), len(own) + k]
        size = x.shape[len(own) + k]
        for axis in axes:
            size *= sizes[axis]
        shape.append(size)
    return x.transpose(order).reshape(shape)
