"""What the walk knows of an array: which entries of the parameters are in it, or its value.

A `Symbolic` array is affine in the parameters and says how: entry i is a constant plus
``scale[i]`` times parameter number ``index[i]``. So it is a Jacobian with one entry a row. It is
the value that matters; the others say why an array has none: it is `Known`, it is `Fixed`, it is
`Scaled`, or nothing is known of it (None).

Arrays carry the axes of the variable first and one trailing *scan axis* per enclosing scan, so that
what is written for the leading axes holds for all iterations at once. A scan axis has length one
where all iterations have the same entries.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Shaped

from laplax_kfac import jaxprs

PARAMETERS = -1
"""The source of symbolic arrays of parameters; other sources are numbers of uses, ..."""
COTANGENT = -2
"""... or the cotangent of a function whose pullback is walked."""
FOREIGN = -1
"""Index of an entry that comes from elsewhere (a constant or data)."""

Numbers = Shaped[np.ndarray, "..."]
"""Indices, or factors: an array whose entries are rearranged."""


@dataclass(frozen=True, eq=False)
class Symbolic:
    """An array whose entries are entries of the parameters, or of one other array.

    Attributes:
        source: `PARAMETERS`, the number of the use whose output it is, or `COTANGENT`.
        index: Id of every entry, or `FOREIGN`; axes of the array, then one scan axis a scan.
        scale: Factor of every entry, of the same shape; None stands for 1.
        mixed: Whether data may have been joined with the source, in other entries or as terms, and
            not constants alone. What is mixed is not the same for all data, whatever its source.
        endings: Where views of other parameters ended that it is computed of, too.
    """

    source: int
    index: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "..."] | None = None
    mixed: bool = False
    endings: "tuple[Ending, ...]" = ()

    @property
    def factors(self) -> Float[np.ndarray, "..."]:
        """The factor of every entry."""
        return np.broadcast_to(1.0, self.index.shape) if self.scale is None else self.scale

    @property
    def ids(self) -> Int[np.ndarray, " n"]:
        """The ids in it, without repetition."""
        return np.unique(self.index[self.index != FOREIGN])

    def map(self, rearrange: Callable[[Numbers], Numbers]) -> "Symbolic":
        """The rearranged array."""
        scale = None if self.scale is None else rearrange(self.scale)
        return replace(self, index=rearrange(self.index), scale=scale)

    def map_iterations(self, rearrange: Callable[[Any], Any], ndim: int) -> "Symbolic":
        """The array of ``ndim`` axes rearranged in every iteration; scan axes come first."""

        def each(x: Numbers) -> Numbers:
            parts = [rearrange(x[(..., *place)]) for place in np.ndindex(x.shape[ndim:])]
            whole = np.stack(parts) if len(parts) > 1 else parts[0]
            return whole.reshape(*x.shape[ndim:], *parts[0].shape)

        return self.map(each)

    def inside_scan(self, *, scanned: bool) -> "Symbolic":
        """This operand of a scan as its body sees it in every iteration."""
        return self.map(lambda x: np.moveaxis(x, 0, -1) if scanned else x[..., None])

    def in_first_iteration(self, ndim: int) -> Int[np.ndarray, " entries"]:
        """The indices in the first iteration of every scan, raveled; of an array of ``ndim`` axes.

        Those of a use's output are the same in all iterations; a parameter's need not be.
        """
        first: tuple[Any, ...] = (..., *[0] * (self.index.ndim - ndim))
        return self.index[first].reshape(-1)

    def present(self, ndim: int) -> Bool[np.ndarray, "entries iterations"]:
        """Where an array of ``ndim`` axes, raveled, has entries of the source."""
        return (self.index != FOREIGN).reshape(math.prod(self.index.shape[:ndim]), -1)

    def scaled(self, factor: Float[np.ndarray, "..."] | float) -> "Symbolic":
        """This array times a constant."""
        scale = np.asarray(factor if self.scale is None else self.scale * factor)
        # A factor that differs between iterations makes their entries different, too.
        shape = np.broadcast_shapes(self.index.shape, scale.shape)
        index, scale = np.broadcast_to(self.index, shape), np.broadcast_to(scale, shape)
        return replace(self, index=index, scale=scale)

    def put(self, places: "Symbolic", shape: tuple[int, ...]) -> "Symbolic":
        """The array of a shape that has entry i of this one, scaled, at ``places.index[i]``."""
        inside, scans = places.index != FOREIGN, self.index.shape[places.index.ndim :]

        def scattered(x: Numbers, fill: float | int) -> Numbers:
            whole = np.full((math.prod(shape), *scans), fill, x.dtype)
            whole[places.index[inside]] = x[inside]
            return whole.reshape(*shape, *scans)

        found = Symbolic(self.source, scattered(self.index, FOREIGN), mixed=self.mixed)
        if self.scale is None and places.scale is None:
            return found
        factor = places.factors.reshape(places.index.shape + (1,) * len(scans))
        return replace(found, scale=scattered(self.factors * factor, 1.0))


@dataclass(frozen=True, eq=False)
class Known:
    """An array that depends on no parameter and no data; evaluated only on demand.

    Attributes:
        value: The array; inside scans it may have one more, last axis for each of them.
        scan_axes: Number of these axes: none, or one a scan.
    """

    value: Callable[[], Any]
    scan_axes: int = 0

    def inside_scan(self, depth: int, *, scanned: bool) -> "Known":
        """This operand of a scan in ``depth`` others, as its body sees it in every iteration."""
        if not scanned and not self.scan_axes:
            return self

        def value() -> Numbers:
            full = np.asarray(self.value())
            full = full if self.scan_axes else full.reshape(*full.shape, *[1] * depth)
            return np.moveaxis(full, 0, -1) if scanned else full[..., None]

        return Known(value, depth + 1)

    def factor(self, ndim: int, scan_axes: int) -> Float[np.ndarray, "..."]:
        """This factor of an array of ``ndim`` axes: in these axes, then one scan axis a scan."""
        value = np.asarray(self.value(), np.float64)
        own = value.ndim - self.scan_axes
        scans = value.shape[own:] or (1,) * scan_axes
        return value.reshape((1,) * (ndim - own) + value.shape[:own] + scans)


@dataclass(frozen=True, eq=False)
class Ending:
    """Parameters that meet an equation which no data enter, and of whose output they are no view.

    Attributes:
        view: The parameters, as the equation reads them.
        pattern: What a report says of them if nothing better is found than a fallback.
        reason: Why.
        use: Number of the use if the equation is one, a product of two parameters; or None.
    """

    view: Symbolic
    pattern: str
    reason: str
    use: int | None = None


@dataclass(frozen=True)
class Fixed:
    """The same for all data: parameters without a derivative, or computed of parameters alone.

    Attributes:
        endings: Where views of the parameters ended that it has a derivative in.
    """

    endings: tuple[Ending, ...] = ()


@dataclass(frozen=True)
class Scaled:
    """Data that a parameter has multiplied: what is added to it is the shift of a norm layer.

    Attributes:
        by: The parameter that has multiplied each entry; None if that is not known.
    """

    by: Symbolic | None = None


Value = Symbolic | Known | Fixed | Scaled | None
"""None: data, or anything else computed with a parameter."""


def of_parameters(value: Value) -> TypeGuard[Symbolic]:
    """Whether a value is a symbolic array of parameters."""
    return isinstance(value, Symbolic) and value.source == PARAMETERS


def constant(value: ArrayLike) -> Known | None:
    """The value of an array that the model closes over; unknown while it is being traced."""
    return None if isinstance(value, jax.core.Tracer) else Known(lambda: value)


def known_outputs(jaxpr: Jaxpr, eqn: JaxprEqn, operands: Sequence[Known]) -> list[Known]:
    """The outputs of an equation of known operands."""
    scan_axes = max((o.scan_axes for o in operands), default=0)

    @functools.cache
    def evaluated() -> Sequence[ArrayLike]:
        return in_all_iterations(lambda *xs: jaxprs.evaluate(jaxpr, eqn, xs), operands)

    def output(number: int) -> ArrayLike:
        return evaluated()[number]

    return [Known(functools.partial(output, k), scan_axes) for k in range(len(eqn.outvars))]


def in_all_iterations(function: Callable[..., Any], operands: Sequence[Known]) -> Any:
    """Apply a JAX function of arrays to all iterations at once: vmapped over the scan axes."""
    with jax.ensure_compile_time_eval():
        values = [np.asarray(o.value()) if o.scan_axes else o.value() for o in operands]
        owns = [np.ndim(v) - o.scan_axes for v, o in zip(values, operands, strict=True)]
        sizes = np.broadcast_shapes(*(np.shape(v)[n:] for v, n in zip(values, owns, strict=True)))
        if not sizes:
            return function(*values)
        values = [
            jnp.asarray(np.broadcast_to(v, v.shape[:n] + sizes).reshape(*v.shape[:n], -1))
            if o.scan_axes else v for v, n, o in zip(values, owns, operands, strict=True)
        ]  # fmt: skip
        axes = [-1 if o.scan_axes else None for o in operands]
        outs = jax.vmap(function, in_axes=axes, out_axes=-1)(*values)
        return jax.tree.map(lambda x: np.asarray(x).reshape(*x.shape[:-1], *sizes), outs)
