"""Index tracing: what equations that only move entries do to the numbers of these entries.

`INDEX_RULES` maps a primitive to what it does to an array of indices: exactly what it does to the
numbers. If ``y = P x`` with P a matrix that has at most a one in every row, the index of y is that
of x moved by P, whatever x is an entry of. Rules are written for the axes of the variable; scan
axes follow behind them and are carried along.

`SELECTIONS` have integer operands that say where entries go. Where these are known, the primitive
itself is evaluated on indices, with 0 in the place of a number that is no entry.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from laplax_kfac import jaxprs
from laplax_kfac.parsing.values import (
    FOREIGN,
    Fixed,
    Known,
    Numbers,
    Symbolic,
    Value,
    in_all_iterations,
)

Rule = Callable[[JaxprEqn, Sequence[Numbers]], list[Numbers]]


def _scans(eqn: JaxprEqn, x: Numbers) -> tuple[int, ...]:
    """Lengths of the scan axes of the first operand."""
    return x.shape[jaxprs.ndim(eqn.invars[0]) :]


def _permuted(x: Numbers, order: Sequence[int]) -> Numbers:
    return x.transpose(*order, *range(len(order), x.ndim))


def _reshape(eqn: JaxprEqn, xs: Sequence[Numbers]) -> list[Numbers]:
    scans, order = _scans(eqn, xs[0]), eqn.params.get("dimensions")
    x = xs[0] if order is None else _permuted(xs[0], order)  # a vmapped conv transposes first
    return [x.reshape(tuple(eqn.params["new_sizes"]) + scans)]


def _broadcast_in_dim(eqn: JaxprEqn, xs: Sequence[Numbers]) -> list[Numbers]:
    shape, scans = tuple(eqn.params["shape"]), _scans(eqn, xs[0])
    kept = dict(zip(eqn.params["broadcast_dimensions"], xs[0].shape, strict=False))
    aligned = tuple(kept.get(d, 1) for d in range(len(shape)))
    return [np.broadcast_to(xs[0].reshape(aligned + scans), shape + scans)]


def _slice(eqn: JaxprEqn, xs: Sequence[Numbers]) -> list[Numbers]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [xs[0][tuple(slice(*b) for b in bounds)]]


INDEX_RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "split": lambda eqn, xs: np.split(
        xs[0], np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"]
    ),
    "transpose": lambda eqn, xs: [_permuted(xs[0], eqn.params["permutation"])],
    "squeeze": lambda eqn, xs: [np.squeeze(xs[0], tuple(eqn.params["dimensions"]))],
    "expand_dims": lambda eqn, xs: [np.expand_dims(xs[0], tuple(eqn.params["dimensions"]))],
    "concatenate": lambda eqn, xs: [np.concatenate(xs, eqn.params["dimension"])],
    "stack": lambda eqn, xs: [np.stack(xs, eqn.params["axis"])],
    "unstack": lambda eqn, xs: list(np.moveaxis(xs[0], eqn.params["axis"], 0)),
    "rev": lambda eqn, xs: [np.flip(xs[0], tuple(eqn.params["dimensions"]))],
    "tile": lambda eqn, xs: [
        np.tile(xs[0], tuple(eqn.params["reps"]) + (1,) * len(_scans(eqn, xs[0])))
    ],
}
for _name in (
    "convert_element_type", "reduce_precision", "copy", "copy_p", "name", "optimization_barrier",
    "sharding_constraint",
):  # fmt: skip
    # These change neither the entries' order nor (up to rounding) their values.
    INDEX_RULES[_name] = lambda _, xs: list(xs)


def align_scan_axes(arrays: Sequence[Numbers], ndims: Sequence[int]) -> list[Numbers]:
    """Broadcast the scan axes of several arrays against each other, and leave their own alone."""
    scans = np.broadcast_shapes(*(a.shape[n:] for a, n in zip(arrays, ndims, strict=True)))
    return [np.broadcast_to(a, a.shape[:n] + scans) for a, n in zip(arrays, ndims, strict=True)]


def _of_one_source(eqn: JaxprEqn, values: Sequence[Value]) -> tuple[list[Symbolic | None], int]:
    """The arrays of one source among operands, of parameters if any, and their scan axes."""
    source = min(v.source for v in values if isinstance(v, Symbolic))
    mine = [v if isinstance(v, Symbolic) and v.source == source else None for v in values]
    pairs = zip(mine, eqn.invars, strict=True)
    return mine, next(v.index.ndim - jaxprs.ndim(atom) for v, atom in pairs if v)


def moved(eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """The outputs of an equation with an index rule; operands of another source are foreign."""
    if eqn.primitive.name == "optimization_barrier":
        return list(values)
    mine, scan_axes = _of_one_source(eqn, values)
    first = next(v for v in mine if v)

    def applied(read: Callable[[Symbolic], Numbers], fill: Any) -> list[Numbers]:
        arrays = [
            read(v) if v else np.full(jaxprs.shape(a) + (1,) * scan_axes, fill)
            for v, a in zip(mine, eqn.invars, strict=True)
        ]
        ndims = [jaxprs.ndim(a) for a in eqn.invars]
        return INDEX_RULES[eqn.primitive.name](eqn, align_scan_axes(arrays, ndims))

    mixed = _is_mixed(mine, values)
    index = applied(lambda v: v.index, first.index.dtype.type(FOREIGN))
    if all(v is None or v.scale is None for v in mine):
        return [Symbolic(first.source, i, mixed=mixed) for i in index]
    scale = applied(lambda v: v.factors, 1.0)
    return [Symbolic(first.source, i, s, mixed) for i, s in zip(index, scale, strict=True)]


def _is_mixed(mine: Sequence[Symbolic | None], values: Sequence[Value]) -> bool:
    """Whether data are among operands: what is neither constant nor of the same source."""
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


def selected(eqn: JaxprEqn, values: Sequence[Value]) -> Symbolic | None:
    """The output of a selection, evaluated on indices; None if data decide what is selected.

    A parameter that something else takes the place of counts as multiplied by zero.
    """
    pairs = zip(values, eqn.invars, strict=True)
    if not all(isinstance(v, Known) or jaxprs.is_inexact(atom) for v, atom in pairs):
        return None
    mine, scan_axes = _of_one_source(eqn, values)
    first = next(v for v in mine if v)
    params = eqn.params | ({"fill_value": 0} if "fill_value" in eqn.params else {})

    def evaluated(read: Callable[[Symbolic], Numbers], dtype: Any) -> Any:
        def operand(value: Value, array: Symbolic | None, atom: Any) -> Known:
            if isinstance(value, Known) and not jaxprs.is_inexact(atom):
                return value
            if array is None:
                return Known(lambda: np.zeros(jaxprs.shape(atom), dtype))
            return Known(lambda: read(array), scan_axes)

        operands = list(map(operand, values, mine, eqn.invars))
        bound = functools.partial(eqn.primitive.bind, **params)
        return np.asarray(in_all_iterations(bound, operands))

    index = evaluated(lambda t: t.index + 1, first.index.dtype)
    index = np.where(index > 0, index - 1, FOREIGN).astype(first.index.dtype)
    scaled = any(t is not None and t.scale is not None for t in mine)
    scale = evaluated(lambda t: t.factors, float) if scaled else None
    found = Symbolic(first.source, index, scale, _is_mixed(mine, values))
    places = SELECTIONS[eqn.primitive.name]
    base = [t for t in mine[places] if t] if places else []
    if len(base) == 1:
        lost = (index == FOREIGN) & (base[0].index != FOREIGN)
        if lost.any():
            overwritten = np.where(lost, base[0].index, index)
            return replace(found, index=overwritten, scale=np.where(lost, 0.0, found.factors))
    return found
