"""Index tracing: what equations that only move entries do to the numbers of these entries.

`INDEX_RULES` maps a primitive to what it does to an array of indices: exactly what it does to the
numbers. Arrays carry the axes of the variable first and one trailing *lane* axis per enclosing
scan, so that a rule written for the leading axes holds for all iterations at once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import Float, Int, Num

from laplax_kfac import jaxprs

Index = Any  # integer numpy array: axes of the variable, then lanes
Rule = Callable[[JaxprEqn, Sequence[Index]], list[Index]]

PARAMETERS = -1  # the source of traces of parameters; other sources are numbers of uses, ...
COTANGENT = -2  # ... or the cotangent of a function whose pullback is walked
FOREIGN = -1  # index of an entry that comes from elsewhere (a constant or data)


# -- values ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trace:
    """An array whose entries are entries of the parameters, or of one other array.

    Attributes:
        source: `PARAMETERS`, the number of the use, or `COTANGENT`.
        index: Id of every entry, or `FOREIGN`; axes of the array, then one lane a scan.
        scale: Factor of every entry, of the same shape; None stands for 1.
        mixed: Whether data may be among its `FOREIGN` entries, and not constants alone.
    """

    source: int
    index: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "..."] | None = None
    mixed: bool = False

    @property
    def factors(self) -> Float[np.ndarray, "..."]:
        """The factor of every entry."""
        return np.broadcast_to(1.0, self.index.shape) if self.scale is None else self.scale

    def map(self, rearrange: Callable[[Any], Any]) -> "Trace":
        """The trace of the rearranged array."""
        scale = None if self.scale is None else rearrange(self.scale)
        return replace(self, index=rearrange(self.index), scale=scale)

    def scaled(self, factor: Float[np.ndarray, "..."] | float) -> "Trace":
        """The trace of this array times a constant."""
        scale = np.asarray(factor if self.scale is None else self.scale * factor)
        # A factor that differs between iterations makes their entries different, too.
        shape = np.broadcast_shapes(self.index.shape, scale.shape)
        index, scale = np.broadcast_to(self.index, shape), np.broadcast_to(scale, shape)
        return replace(self, index=index, scale=scale)

    def put(self, places: "Trace", shape: tuple[int, ...]) -> "Trace":
        """The array of a shape that has entry i of this one, scaled, at ``places.index[i]``."""
        inside, lanes = places.index != FOREIGN, self.index.shape[places.index.ndim :]

        def scattered(x: Num[np.ndarray, "..."], fill: float | int) -> Num[np.ndarray, "..."]:
            whole = np.full((math.prod(shape), *lanes), fill, x.dtype)
            whole[places.index[inside]] = x[inside]
            return whole.reshape(*shape, *lanes)

        found = Trace(self.source, scattered(self.index, FOREIGN), mixed=self.mixed)
        if self.scale is None and places.scale is None:
            return found
        factor = places.factors.reshape(places.index.shape + (1,) * len(lanes))
        return replace(found, scale=scattered(self.factors * factor, 1.0))


@dataclass(frozen=True, eq=False)
class Known:
    """An array that depends on no parameter and no data; evaluated only on demand.

    Attributes:
        value: The array; inside scans it may have one more, last axis for each of them.
        lanes: Number of these axes: none, or one a scan.
    """

    value: Callable[[], Any]
    lanes: int = 0


@dataclass(frozen=True)
class Fixed:
    """The same for all data: parameters without a derivative, or computed of parameters alone."""


def constant(value: Any) -> Known | None:
    """The value of an array that the model closes over; unknown while it is being traced."""
    return None if isinstance(value, jax.core.Tracer) else Known(lambda: value)


def known_outputs(jaxpr: Jaxpr, eqn: JaxprEqn, operands: Sequence[Known]) -> list[Known]:
    """The outputs of an equation of known operands."""
    lanes = max((o.lanes for o in operands), default=0)

    @functools.cache
    def evaluated() -> Any:
        return on_lanes(lambda *xs: jaxprs.evaluate(jaxpr, eqn, xs), operands)

    def output(number: int) -> Any:
        return evaluated()[number]

    return [Known(functools.partial(output, k), lanes) for k in range(len(eqn.outvars))]


def on_lanes(function: Callable[..., Any], operands: Sequence[Known]) -> Any:
    """Apply a JAX function of arrays to all iterations at once: vmapped over the lanes, if any."""
    with jax.ensure_compile_time_eval():
        values = [np.asarray(o.value()) if o.lanes else o.value() for o in operands]
        owns = [np.ndim(v) - o.lanes for v, o in zip(values, operands, strict=True)]
        sizes = np.broadcast_shapes(*(np.shape(v)[n:] for v, n in zip(values, owns, strict=True)))
        if not sizes:
            return function(*values)
        values = [
            jnp.asarray(np.broadcast_to(v, v.shape[:n] + sizes).reshape(*v.shape[:n], -1))
            if o.lanes else v for v, n, o in zip(values, owns, operands, strict=True)
        ]  # fmt: skip
        axes = [-1 if o.lanes else None for o in operands]
        outs = jax.vmap(function, in_axes=axes, out_axes=-1)(*values)
        return jax.tree.map(lambda x: np.asarray(x).reshape(*x.shape[:-1], *sizes), outs)


# -- rules -------------------------------------------------------------------------------------


def _lanes(eqn: JaxprEqn, x: Index, operand: int = 0) -> tuple[int, ...]:
    return x.shape[jaxprs.ndim(eqn.invars[operand]) :]


def _identity(_: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return list(xs)


def _permuted(x: Index, order: Sequence[int]) -> Index:
    return x.transpose(*order, *range(len(order), x.ndim))


def _reshape(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    lanes, order = _lanes(eqn, xs[0]), eqn.params.get("dimensions")
    x = xs[0] if order is None else _permuted(xs[0], order)  # a vmapped conv transposes first
    return [x.reshape(tuple(eqn.params["new_sizes"]) + lanes)]


def _transpose(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [_permuted(xs[0], eqn.params["permutation"])]


def _squeeze(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [np.squeeze(xs[0], axis=tuple(eqn.params["dimensions"]))]


def _expand_dims(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [np.expand_dims(xs[0], tuple(eqn.params["dimensions"]))]


def _broadcast_in_dim(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    shape, lanes = tuple(eqn.params["shape"]), _lanes(eqn, xs[0])
    kept = dict(zip(eqn.params["broadcast_dimensions"], xs[0].shape, strict=False))
    aligned = tuple(kept.get(d, 1) for d in range(len(shape)))
    return [np.broadcast_to(xs[0].reshape(aligned + lanes), shape + lanes)]


def _slice(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [xs[0][tuple(slice(*b) for b in bounds)]]


def _split(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    cuts = np.cumsum(eqn.params["sizes"])[:-1]
    return list(np.split(xs[0], cuts, axis=eqn.params["axis"]))


def _concatenate(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [np.concatenate(xs, axis=eqn.params["dimension"])]


def _stack(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [np.stack(xs, axis=eqn.params["axis"])]


def _unstack(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    moved = np.moveaxis(xs[0], eqn.params["axis"], 0)
    return list(moved)


def _reverse(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [np.flip(xs[0], axis=tuple(eqn.params["dimensions"]))]


def _tile(eqn: JaxprEqn, xs: Sequence[Index]) -> list[Index]:
    return [np.tile(xs[0], tuple(eqn.params["reps"]) + (1,) * len(_lanes(eqn, xs[0])))]


INDEX_RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "rev": _reverse,
    "tile": _tile,
    # These change neither the entries' order nor (up to rounding) their values.
    "convert_element_type": _identity,
    "reduce_precision": _identity,
    "copy": _identity,
    "copy_p": _identity,
    "name": _identity,
    "optimization_barrier": _identity,
    "sharding_constraint": _identity,
}


def align_lanes(arrays: Sequence[Index], ndims: Sequence[int]) -> list[Index]:
    """Broadcast the lanes of several arrays against each other, leaving their own axes alone."""
    lanes = np.broadcast_shapes(*(a.shape[n:] for a, n in zip(arrays, ndims, strict=True)))
    return [np.broadcast_to(a, a.shape[:n] + lanes) for a, n in zip(arrays, ndims, strict=True)]


def _of_one_source(eqn: JaxprEqn, values: Sequence[Any]) -> tuple[list[Trace | None], int]:
    """The traces of one source among operands, of parameters if there are some, and their lanes."""
    source = min(v.source for v in values if isinstance(v, Trace))
    mine = [v if isinstance(v, Trace) and v.source == source else None for v in values]
    lanes = next(v.index.ndim - jaxprs.ndim(a) for v, a in zip(mine, eqn.invars, strict=True) if v)
    return mine, lanes


def moved(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation with an index rule; operands of another source are foreign."""
    if eqn.primitive.name == "optimization_barrier":
        return list(values)
    mine, lanes = _of_one_source(eqn, values)
    first = next(v for v in mine if v)

    def applied(of_trace: Callable[[Trace], Any], fill: Any) -> list[Index]:
        arrays = [
            of_trace(v) if v else np.full(jaxprs.shape(a) + (1,) * lanes, fill)
            for v, a in zip(mine, eqn.invars, strict=True)
        ]
        ndims = [jaxprs.ndim(a) for a in eqn.invars]
        return INDEX_RULES[eqn.primitive.name](eqn, align_lanes(arrays, ndims))

    mixed = _is_mixed(mine, values)
    index = applied(lambda v: v.index, first.index.dtype.type(FOREIGN))
    if all(v is None or v.scale is None for v in mine):
        return [Trace(first.source, i, mixed=mixed) for i in index]
    scale = applied(lambda v: v.factors, 1.0)
    return [Trace(first.source, i, s, mixed) for i, s in zip(index, scale, strict=True)]


def _is_mixed(mine: Sequence[Trace | None], values: Sequence[Any]) -> bool:
    """Whether data are among operands: what is neither constant nor a trace of the same source."""
    pairs = zip(mine, values, strict=True)
    return any(t.mixed if t else not isinstance(v, Known | Fixed) for t, v in pairs)


SELECTIONS = {
    "gather": None,
    "dynamic_slice": None,
    "pad": None,
    "select_n": slice(1, None),
    "scatter": slice(0, 1),
    "dynamic_update_slice": slice(0, 1),
}
"""Primitives whose integer operands say where entries go; the operands that others overwrite."""


def selected(eqn: JaxprEqn, values: Sequence[Any]) -> Trace | None:
    """The output of a selection, evaluated on indices; None if data decide what is selected.

    A parameter that something else takes the place of counts as multiplied by zero.
    """
    numbers = [jaxprs.is_inexact(a) for a in eqn.invars]
    if not all(n or isinstance(v, Known) for n, v in zip(numbers, values, strict=True)):
        return None
    mine, lanes = _of_one_source(eqn, values)
    first = next(v for v in mine if v)
    params = eqn.params | ({"fill_value": 0} if "fill_value" in eqn.params else {})

    def evaluated(of_trace: Callable[[Trace], Any], dtype: Any) -> Any:
        def operand(trace: Trace | None, atom: Any) -> Known:
            if trace is None:
                return Known(lambda: np.zeros(jaxprs.shape(atom), dtype))
            return Known(lambda: of_trace(trace), lanes)

        operands = [
            operand(t, a) if n else v
            for v, n, t, a in zip(values, numbers, mine, eqn.invars, strict=True)
        ]
        return np.asarray(on_lanes(lambda *xs: eqn.primitive.bind(*xs, **params), operands))

    index = evaluated(lambda t: t.index + 1, first.index.dtype)
    index = np.where(index > 0, index - 1, FOREIGN).astype(first.index.dtype)
    scaled = any(t is not None and t.scale is not None for t in mine)
    scale = evaluated(lambda t: t.factors, float) if scaled else None
    found = Trace(first.source, index, scale, _is_mixed(mine, values))
    places = SELECTIONS[eqn.primitive.name]
    base = [t for t in mine[places] if t] if places else []
    if len(base) == 1:
        lost = (index == FOREIGN) & (base[0].index != FOREIGN)
        if lost.any():
            overwritten = np.where(lost, base[0].index, index)
            return replace(found, index=overwritten, scale=np.where(lost, 0.0, found.factors))
    return found
