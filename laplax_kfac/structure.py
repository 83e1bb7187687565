"""Structural equations, evaluated on indices instead of numbers.

`INDEX_RULES` maps a primitive to what it does to an array of indices: exactly what it does to the
numbers. Arrays carry the axes of the variable first and one trailing *lane* axis per enclosing
scan, so that a rule written for the leading axes holds for all iterations at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from laplax_kfac import jaxprs

Index = Any  # integer numpy array: axes of the variable, then lanes
Rule = Callable[[JaxprEqn, Sequence[Index]], list[Index]]

FOREIGN = -1  # index of an entry that comes from elsewhere (a constant or data)


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


SELECTIONS = ("gather", "dynamic_slice", "pad")
"""Primitives that are structural where all operands but the first are known."""


def align_lanes(arrays: Sequence[Index], ndims: Sequence[int]) -> list[Index]:
    """Broadcast the lanes of several arrays against each other, leaving their own axes alone."""
    lanes = np.broadcast_shapes(*(a.shape[n:] for a, n in zip(arrays, ndims, strict=True)))
    return [np.broadcast_to(a, a.shape[:n] + lanes) for a, n in zip(arrays, ndims, strict=True)]
