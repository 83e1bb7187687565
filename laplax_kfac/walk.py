"""From a model's jaxpr to the uses of its parameters.

The walk follows every parameter forward through structural equations by *index tracing* (the
equations are evaluated on the ids of the parameters, see `structure`), until an equation uses it:

* as the weight of a registered pattern: a Kronecker use;
* added to the output of such a use: a bias;
* in any other way: the parameter is probed itself, which is exact whatever the use.

The outputs of uses are traced by the same means, so that a bias is recognised through any
relayout between the product and the sum. `resolve` then turns uses into layers.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Float, Int

from laplax_kfac import jaxprs, patterns
from laplax_kfac.structure import FOREIGN, INDEX_RULES, SELECTIONS, align_lanes

PARAMETERS = -1  # the source of traces of parameters; other sources are numbers of uses

Site = tuple[int, ...]
"""Where an equation sits: equation index, then (sub-jaxpr number, equation index) inward."""


# -- values during the walk --------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """An array whose entries are entries of the parameters, or of one use's output.

    Attributes:
        source: `PARAMETERS`, or the number of the use.
        index: Id of every entry, or `FOREIGN`; axes of the array, then one lane a scan.
        scale: Factor of every entry, of the same number of axes; None stands for 1.
    """

    source: int
    index: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "..."] | None = None

    def scaled(self, factor: Float[np.ndarray, "..."] | float) -> "Trace":
        """The trace of this array times a constant."""
        old = np.ones((1,) * self.index.ndim) if self.scale is None else self.scale
        scale = np.asarray(old * factor)
        # A factor that differs between iterations makes their entries different, too.
        shape = np.broadcast_shapes(self.index.shape, scale.shape)
        return replace(self, index=np.broadcast_to(self.index, shape), scale=scale)


@dataclass(frozen=True)
class Known:
    """An array that depends on no parameter and no data; evaluated only on demand.

    Attributes:
        value: The array; inside scans it may have one more, last axis for each of them.
        lanes: Number of these axes: none, or one a scan.
    """

    value: Callable[[], Any]
    lanes: int = 0


@dataclass(frozen=True)
class Scaled:
    """Data that a parameter has multiplied: what is added to it is the shift of a norm layer."""


Value = Trace | Known | Scaled | None  # None: data, or anything else computed with a parameter


# -- findings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One use of a weight by an equation.

    Attributes:
        pattern: The registered pattern.
        eqn: The equation.
        operand: Which of its operands is the weight.
        site: Where the equation sits.
        lanes: Lengths of the scans around it, outermost first.
        ids: Ids of the weight, shape (*lanes or 1, stack, in, out).
        scale: Factors of the weight's entries, like ``ids``; None stands for 1.
        regular: Whether every parameter is used equally often; only biases may be irregular.
    """

    pattern: patterns.Pattern
    eqn: JaxprEqn
    operand: int
    site: Site
    lanes: tuple[int, ...]
    ids: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "..."] | None
    regular: bool = True


@dataclass(frozen=True)
class Shift:
    """A parameter added to (a relayout of) a use's output.

    Attributes:
        use: Number of the use.
        bias: Number of the use that the sum itself is, of the parameter.
        output: Index into the raveled output of the use, one for each entry of the sum.
        ids: Ids of the parameter, for each entry; then one lane a scan.
        factor: d(use's output) / d(parameter); None where it is not the same for all entries.
    """

    use: int
    bias: int
    output: Int[np.ndarray, " entries"]
    ids: Int[np.ndarray, "entries *lanes"]
    factor: float | None


@dataclass(frozen=True)
class Opaque:
    """Parameters used in a way that has no Kronecker form."""

    ids: Int[np.ndarray, " n"]
    pattern: str
    reason: str


@dataclass
class Findings:
    """Everything the walk found, in the order of the jaxpr."""

    uses: list[Use | Callable[[], Use]] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)  # uses that are biases of no layer
    opaque: list[Opaque] = field(default_factory=list)

    def later(self, make: Callable[[], Use]) -> int:
        """Number a use that is made only when it is asked for: most biases join a weight."""
        self.uses.append(make)
        return len(self.uses) - 1

    def use(self, number: int) -> Use:
        """The use of that number."""
        found = self.uses[number]
        if not isinstance(found, Use):
            found = found()
            self.uses[number] = found
        return found

    def mark(self, value: Value, pattern: str, reason: str) -> None:
        """Note that the parameters in a trace have no Kronecker form."""
        if isinstance(value, Trace) and value.source == PARAMETERS:
            ids = np.unique(value.index[value.index != FOREIGN])
            self.opaque.append(Opaque(ids, pattern, reason))


# -- the walk ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """Where the walk is: the enclosing equations and the lengths of the enclosing scans."""

    findings: Findings
    site: Site = ()
    lanes: tuple[int, ...] = ()

    def inside(self, eqn_number: int, branch: int = 0, *, lanes: tuple[int, ...] = ()) -> "Scope":
        """The scope of a sub-jaxpr of an equation."""
        return replace(self, site=(*self.site, eqn_number, branch), lanes=self.lanes + lanes)


def walk(jaxpr: Jaxpr, inputs: Sequence[Value], scope: Scope) -> list[Value]:
    """Follow traces through a jaxpr, noting uses; returns the values of its outputs."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    counts = jaxprs.consumers(jaxpr)

    def read(atom: Any) -> Value:
        if isinstance(atom, Literal):
            return Known(lambda: np.asarray(atom.val))
        value = env.get(atom)
        # A use's output that is read twice has a cotangent that its bias does not see.
        shared = isinstance(value, Trace) and value.source != PARAMETERS and counts[atom] > 1
        return None if shared else value

    for number, eqn in enumerate(jaxpr.eqns):
        outputs = _visit(jaxpr, number, eqn, [read(a) for a in eqn.invars], scope)
        for var, value in zip(eqn.outvars, outputs, strict=True):
            empty = isinstance(value, Trace) and value.index.size == 0
            kept = isinstance(value, Known) or (jaxprs.is_inexact(var) and not empty)
            env[var] = value if kept else None
    return [read(a) for a in jaxpr.outvars]


def _visit(
    jaxpr: Jaxpr, number: int, eqn: JaxprEqn, values: list[Value], scope: Scope
) -> list[Value]:
    """Values of an equation's outputs, given those of its operands."""
    name = eqn.primitive.name
    nothing: list[Value] = [None] * len(eqn.outvars)
    if not any(isinstance(v, Trace) for v in values):
        known = [v for v in values if isinstance(v, Known)]
        if len(known) == len(values):
            return _known(jaxpr, eqn, known)
        rearranged = name in INDEX_RULES or name == "mul"
        scaled = rearranged and any(isinstance(v, Scaled) for v in values)
        return [Scaled()] if scaled and len(eqn.outvars) == 1 else nothing
    if name == "stop_gradient" or not any(jaxprs.is_inexact(v) for v in eqn.outvars):
        return nothing
    if not jaxprs.has_body(eqn) and any(jaxprs.is_complex(v) for v in eqn.outvars):
        for value in values:
            scope.findings.mark(value, "complex", "turned into a complex number before its use")
        return nothing
    if name in INDEX_RULES:
        return _structural(eqn, values)
    if name in SELECTIONS and all(isinstance(v, Known) for v in values[1:]):
        return [_selected(jaxpr, eqn, values)]
    if name.startswith("scatter") and isinstance(values[1], Known):
        return _scatter(number, eqn, values, scope)
    if patterns.find(eqn) is not None:
        return _pattern(number, eqn, values, scope)
    if name in _ARITHMETIC:
        return _ARITHMETIC[name](number, eqn, values, scope)
    if name == "scan":
        return _scan(number, eqn, values, scope)
    if name == "cond":
        return _cond(number, eqn, values, scope)
    if name == "while":
        _refuse_while(values)
    called = jaxprs.called_jaxpr(eqn)
    if called is not None:
        body, consts = called
        inner = [constant(c) for c in consts]
        return walk(jaxprs.with_consts(body), [*inner, *values], scope.inside(number))
    view = _rearranged(jaxpr, eqn, values)
    if view is not None:
        return [view]
    for value in values:
        scope.findings.mark(value, "other", f"used by `{name}`, which no pattern covers")
    return nothing


def constant(value: Any) -> Value:
    """The value of an array that the model closes over; unknown while it is being traced."""
    return None if isinstance(value, jax.core.Tracer) else Known(lambda: value)


def _known(jaxpr: Jaxpr, eqn: JaxprEqn, operands: list[Known]) -> list[Value]:
    if eqn.effects:
        return [None] * len(eqn.outvars)
    lanes = max((o.lanes for o in operands), default=0)
    cache: list[Any] = []

    def output(k: int) -> Any:
        if not cache:
            cache.extend(_on_lanes(lambda *xs: jaxprs.evaluate(jaxpr, eqn, xs), operands, lanes))
        return cache[k]

    return [Known(functools.partial(output, k), lanes) for k in range(len(eqn.outvars))]


def _on_lanes(function: Callable[..., Any], operands: Sequence[Known], lanes: int) -> Any:
    """Apply a JAX function of arrays to all iterations at once: vmapped over the lanes, if any."""
    with jax.ensure_compile_time_eval():
        values = [np.asarray(o.value()) if o.lanes else o.value() for o in operands]
        if not lanes:
            return function(*values)
        sizes = np.broadcast_shapes(
            *(v.shape[v.ndim - o.lanes :] for v, o in zip(values, operands, strict=True) if o.lanes)
        )

        def flat(value: Any, known: Known) -> Any:
            own = value.shape[: value.ndim - known.lanes]
            return jax.numpy.asarray(np.broadcast_to(value, own + sizes).reshape(*own, -1))

        arrays = [flat(v, o) if o.lanes else v for v, o in zip(values, operands, strict=True)]
        axes = [-1 if o.lanes else None for o in operands]
        outs = jax.vmap(function, in_axes=axes, out_axes=-1)(*arrays)
        return jax.tree.map(lambda x: np.asarray(x).reshape(*x.shape[:-1], *sizes), outs)


def _structural(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Apply an index rule; operands of another source become foreign entries."""
    traces = [v for v in values if isinstance(v, Trace)]
    first = next((v for v in traces if v.source == PARAMETERS), traces[0])
    lanes = first.index.ndim - jaxprs.ndim(eqn.invars[values.index(first)])
    mine = [v if isinstance(v, Trace) and v.source == first.source else None for v in values]
    if eqn.primitive.name == "optimization_barrier":
        return list(values)

    def stand_in(atom: Any, fill: float) -> Any:
        return np.full(jaxprs.shape(atom) + (1,) * lanes, fill)

    def applied(arrays: list[Any]) -> list[Any]:
        ndims = [jaxprs.ndim(a) for a in eqn.invars]
        return INDEX_RULES[eqn.primitive.name](eqn, align_lanes(arrays, ndims))

    index = applied(
        [v.index if v else stand_in(a, FOREIGN).astype(first.index.dtype)
         for v, a in zip(mine, eqn.invars, strict=True)]
    )  # fmt: skip
    scale: list[Any] = [None] * len(index)
    if any(v is not None and v.scale is not None for v in mine):
        scale = applied([
            stand_in(a, 1.0) if v is None or v.scale is None
            else np.broadcast_to(v.scale, jaxprs.shape(a) + v.scale.shape[jaxprs.ndim(a) :])
            for v, a in zip(mine, eqn.invars, strict=True)
        ])  # fmt: skip
    return [Trace(first.source, i, s) for i, s in zip(index, scale, strict=True)]


def _selected(jaxpr: Jaxpr, eqn: JaxprEqn, values: list[Value]) -> Value:
    """Gather, slice or pad by known indices: evaluated on ids, where 0 stands for none."""
    trace = values[0]
    assert isinstance(trace, Trace)
    others = [v for v in values[1:] if isinstance(v, Known)]

    def select(x: Any, *constants: Any) -> Any:
        # What is padded with, or filled in for what is out of bounds, is no parameter.
        if eqn.primitive.name == "pad":
            return lax.pad(x, x.dtype.type(0), eqn.params["padding_config"])
        return jaxprs.evaluate(jaxpr, eqn, [x, *constants])[0]

    def selected(x: Any) -> Any:
        mine = Known(lambda: x, x.ndim - jaxprs.ndim(eqn.invars[0]))
        return np.asarray(_on_lanes(select, [mine, *others], mine.lanes))

    index = selected(trace.index + 1)
    index = np.where(index > 0, index - 1, FOREIGN).astype(trace.index.dtype)
    scale = None if trace.scale is None else selected(_full_scale(trace))
    return Trace(trace.source, index, scale)


def _full_scale(trace: Trace) -> Float[np.ndarray, "..."]:
    scale = 1.0 if trace.scale is None else trace.scale
    return np.array(np.broadcast_to(scale, trace.index.shape), dtype=np.float64)


def _scatter(number: int, eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    """Parameters scattered to known places: added there, or put there."""
    operand, places, updates = values
    assert isinstance(places, Known)
    whole = eqn.primitive.name in ("scatter", "scatter-add") and not places.lanes
    if not whole or not isinstance(updates, Trace) or updates.source != PARAMETERS:
        scope.findings.mark(operand, "other", f"changed in part by `{eqn.primitive.name}`")
        scope.findings.mark(updates, "other", f"used by `{eqn.primitive.name}`")
        return [None]
    placed = functools.partial(_placed, eqn, places)
    counts = placed(lax.scatter_add, np.ones_like(updates.index))
    index = placed(lax.scatter, updates.index + 1)
    view = Trace(PARAMETERS, np.where(index > 0, index - 1, FOREIGN).astype(updates.index.dtype))
    if updates.scale is not None:
        view = replace(view, scale=placed(lax.scatter, _full_scale(updates)))
    if counts.max() > 1:
        scope.findings.mark(updates, "other", "scattered to one place several times")
        return [None]
    if eqn.primitive.name == "scatter-add" and not isinstance(operand, Known):
        return _add(number, eqn, [operand, view], scope)
    scope.findings.mark(operand, "other", "overwritten in part")
    return [view]


def _placed(eqn: JaxprEqn, places: Known, scatter: Callable[..., Any], updates: Any) -> Any:
    """Scatter an array as the equation scatters its updates, but onto zeros."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}
    shape = jaxprs.shape(eqn.outvars[0])

    def place(x: Any, indices: Any) -> Any:
        return scatter(jax.numpy.zeros(shape, x.dtype), indices, x, **options)

    mine = Known(lambda: updates, updates.ndim - jaxprs.ndim(eqn.invars[2]))
    return np.asarray(_on_lanes(place, [mine, places], mine.lanes))


def _rearranged(jaxpr: Jaxpr, eqn: JaxprEqn, values: list[Value]) -> Value:
    """A function of one parameter alone whose pullback only rearranges and scales cotangents.

    Found by walking the pullback with a traced cotangent. So a straight-through estimator is a
    view of its parameter, whatever its forward rule computes.
    """
    traces = [k for k, v in enumerate(values) if isinstance(v, Trace)]
    if len(traces) != 1 or len(eqn.outvars) != 1 or eqn.effects:
        return None
    (operand,) = traces
    if any(isinstance(v, Known) and v.lanes for v in values):
        return None
    trace = values[operand]
    assert isinstance(trace, Trace)
    if trace.source != PARAMETERS or any(v is None for v in values):
        return None

    def pullback(w: Any, cotangent: Any) -> Any:
        def forward(w: Any) -> Any:
            mine = [v.value() if isinstance(v, Known) else w for v in values]
            return jaxprs.evaluate(jaxpr, eqn, mine)[0]

        return jax.vjp(forward, w)[1](cotangent)

    try:
        places = (eqn.invars[operand], eqn.outvars[0])
        rule, consts, _ = jaxprs.trace(pullback, *map(jaxprs.spec, places))
    except (TypeError, ValueError, NotImplementedError):
        return None  # no derivative: whoever differentiates the model will be told
    cotangent = Trace(0, jaxprs.numbered(eqn.outvars[0]))
    known = [constant(c) for c in consts]
    (found,) = walk(rule, [*known, None, cotangent], Scope(Findings()))
    if not isinstance(found, Trace) or np.unique(found.index).size != found.index.size:
        return None
    return _pushed(trace, found, jaxprs.shape(eqn.outvars[0]))


def _pushed(trace: Trace, pullback: Trace, shape: tuple[int, ...]) -> Trace:
    """The view whose entry ``pullback.index[i]`` is the i-th entry of ``trace``."""
    own = pullback.index.ndim
    lanes = trace.index.shape[own:]
    inside = pullback.index.ravel() != FOREIGN
    target = pullback.index.ravel()[inside]
    index = np.full((int(np.prod(shape)), *lanes), FOREIGN, dtype=trace.index.dtype)
    index[target] = trace.index.reshape(-1, *lanes)[inside]
    scale = None
    if trace.scale is not None or pullback.scale is not None:
        factor = _full_scale(pullback).ravel()[inside]
        scale = np.ones(index.shape)
        scale[target] = (
            _full_scale(trace).reshape(-1, *lanes)[inside] * factor[(..., *[None] * len(lanes))]
        )
        scale = scale.reshape(*shape, *lanes)
    return Trace(trace.source, index.reshape(*shape, *lanes), scale)


def _pattern(number: int, eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    """A registered primitive: note a use for every operand that is a weight."""
    pattern = patterns.find(eqn)
    assert pattern is not None
    operands = pattern.operands(eqn)
    output: list[Value] = [None] * len(eqn.outvars)
    for operand, value in enumerate(values):
        if not isinstance(value, Trace) or value.source != PARAMETERS:
            continue
        if operand not in operands:
            reason = f"operand {operand} of `{eqn.primitive.name}` is no weight of {pattern.name}"
            scope.findings.mark(value, "other", reason)
            continue
        use = _use(pattern, eqn, operand, value, (*scope.site, number), scope.lanes)
        index = jaxprs.numbered(eqn.outvars[0])
        index = index.reshape(index.shape + (1,) * len(scope.lanes))
        output[0] = Trace(len(scope.findings.uses), index)
        scope.findings.uses.append(use)
    return output


def _use(
    pattern: patterns.Pattern,
    eqn: JaxprEqn,
    operand: int,
    view: Trace,
    site: Site,
    lanes: tuple[int, ...],
) -> Use:
    """View the weight's ids as (lanes, stack, in, out)."""
    entries = jaxprs.numbered(eqn.invars[operand])
    place = pattern.weight(eqn, operand, entries)

    def canonical(x: Any) -> Any:
        x = np.broadcast_to(x, entries.shape + x.shape[entries.ndim :])
        x = x.reshape(entries.size, *x.shape[entries.ndim :])[place]
        return np.moveaxis(x, range(3), range(-3, 0))

    scale = None if view.scale is None else canonical(view.scale)
    return Use(pattern, eqn, operand, site, lanes, canonical(view.index), scale)


# -- arithmetic --------------------------------------------------------------------------------


def _broadcast(trace: Trace, eqn: JaxprEqn, operand: int) -> Trace:
    """The trace broadcast to the shape of the equation's output (size-1 axes, scalars)."""
    shape, own = jaxprs.shape(eqn.outvars[0]), jaxprs.shape(eqn.invars[operand])

    def to_output(x: Any) -> Any:
        lanes = x.shape[len(own) :]
        padded = x.reshape((1,) * (len(shape) - len(own)) + x.shape)
        return np.broadcast_to(padded, shape + lanes)

    scale = trace.scale
    if scale is not None:
        scale = to_output(np.broadcast_to(scale, own + scale.shape[len(own) :]))
    return Trace(trace.source, to_output(trace.index), scale)


def _factor(known: Known, eqn: JaxprEqn, lanes: int) -> Float[np.ndarray, "..."]:
    value = np.asarray(known.value(), dtype=np.float64)
    own = value.ndim - known.lanes
    missing = jaxprs.ndim(eqn.outvars[0]) - own
    iterations = value.shape[own:] if known.lanes else (1,) * lanes
    return value.reshape((1,) * missing + value.shape[:own] + iterations)


def _sum(number: int, eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    """``add`` and ``sub``, with their operands broadcast and signed."""
    signs = (1.0, -1.0 if eqn.primitive.name == "sub" else 1.0)
    terms = [
        _signed(_broadcast(v, eqn, k), signs[k]) if isinstance(v, Trace) else v
        for k, v in enumerate(values)
    ]
    return _add(number, eqn, terms, scope)


def _add(number: int, eqn: JaxprEqn, terms: list[Value], scope: Scope) -> list[Value]:
    """A sum of terms of one shape: a bias if a parameter meets the output of a use, or data."""
    weights = [t for t in terms if isinstance(t, Trace) and t.source == PARAMETERS]
    # An output that is broadcast by the sum has another cotangent than the sum.
    outputs = [
        t for k, t in enumerate(terms)
        if isinstance(t, Trace) and t.source != PARAMETERS
        and jaxprs.shape(eqn.invars[k]) == jaxprs.shape(eqn.outvars[0])
    ]  # fmt: skip
    if len(weights) == 2:
        for term in weights:
            scope.findings.mark(term, "other", "added to another parameter before its use")
        return [None]
    if weights and any(isinstance(t, Scaled) for t in terms):
        scope.findings.mark(weights[0], "shift", "the shift of a scaled normalisation")
        return [None]
    if weights and any(isinstance(t, Known) for t in terms):
        return [weights[0]]  # an affine function of the parameter has the same gradient
    if weights:
        site = (*scope.site, number)
        bias_number = scope.findings.later(
            functools.partial(_bias_use, eqn, weights[0], site, scope.lanes)
        )
        if outputs and _meets(weights[0], outputs[0], eqn):
            shift = _shift(weights[0], outputs[0], eqn, bias_number)
            scope.findings.shifts.append(shift)
            return [outputs[0]]
        scope.findings.sums.append(bias_number)
        return [None]
    # The output of a use plus anything has the same cotangent: one bias serves two products.
    return [outputs[0] if outputs else None]


def _signed(trace: Trace, sign: float) -> Trace:
    return trace if sign == 1.0 else trace.scaled(sign)


def _bias_use(eqn: JaxprEqn, weight: Trace, site: Site, lanes: tuple[int, ...]) -> Use:
    """The sum as a use of its own: a weight with one input, the constant 1.

    The same parameter added in several places is shared over them: these are its positions.
    """
    ndim = jaxprs.ndim(eqn.outvars[0])
    index = weight.index.reshape(-1, *weight.index.shape[ndim:])
    first = _first_lane(weight.index, ndim)
    mine = np.flatnonzero(first != FOREIGN)
    order = mine[np.argsort(first[mine], kind="stable")]
    distinct, counts = np.unique(first[mine], return_counts=True)
    regular = counts.size > 0 and counts.min() == counts.max()
    # (positions, features): in raveled order, the n-th place of every parameter is position n.
    places = order.reshape(distinct.size, -1).T if regular else np.zeros((0, distinct.size), int)
    ids = np.moveaxis(index[places[:1] if regular else order[None]], (0, 1), (-2, -1))
    scale = None
    if weight.scale is not None:
        full = np.broadcast_to(weight.scale, weight.index.shape).reshape(index.shape)
        scale = np.moveaxis(full[places], (0, 1), (-2, -1))  # (lanes, positions, features)
        same = bool((scale == scale[..., :1, :]).all())
        regular, scale = regular and same, scale[..., None, :1, :]
    pattern = patterns.bias(places, axes=_varying_axes(weight.index, ndim))
    return Use(pattern, eqn, -1, site, lanes, ids[..., None, :, :], scale, regular)


def _varying_axes(index: Int[np.ndarray, "..."], ndim: int) -> int:
    return sum(bool((index != index.take([0], axis=a)).any()) for a in range(ndim))


def _meets(weight: Trace, output: Trace, eqn: JaxprEqn) -> bool:
    """Whether every entry of a parameter is added to an entry of the use's output."""
    ndim = jaxprs.ndim(eqn.outvars[0])
    added, met = _first_lane(weight.index, ndim), _first_lane(output.index, ndim)
    return not ((added != FOREIGN) & (met == FOREIGN)).any()


def _shift(weight: Trace, output: Trace, eqn: JaxprEqn, bias: int) -> Shift:
    ndim = jaxprs.ndim(eqn.outvars[0])
    lanes = weight.index.shape[ndim:]
    # An output's index is the same in every iteration of a scan: its lanes have length one.
    index, ids = output.index.reshape(-1), weight.index.reshape(-1, *lanes)
    mine = (index != FOREIGN) & (_first_lane(weight.index, ndim) != FOREIGN)
    factor = _uniform(weight.scale, output.scale)
    if mine.all():  # nearly always: no need for a copy
        return Shift(output.source, bias, index, ids, factor)
    return Shift(output.source, bias, index[mine], ids[mine], factor)


def _uniform(weight: Any, output: Any) -> float | None:
    """The ratio of two scales, if it is one finite number other than zero."""
    ends = [(1.0, 1.0) if s is None else (float(s.min()), float(s.max())) for s in (weight, output)]
    (low, high), (least, most) = ends
    same = high - low <= 1e-6 * abs(high) and most - least <= 1e-6 * abs(most)
    return high / most if same and high and most else None


def _first_lane(index: Int[np.ndarray, "..."], ndim: int) -> Int[np.ndarray, " entries"]:
    """The indices of an array in the first iteration of every scan, raveled."""
    lanes = index.ndim - ndim
    for _ in range(lanes):
        index = index[..., 0]
    return index.reshape(-1)


def _product(_: int, eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    """``mul`` and ``div``: a constant scales the trace, anything else ends it."""
    known = [v for v in values if isinstance(v, Known)]
    traces = [(k, v) for k, v in enumerate(values) if isinstance(v, Trace)]
    divides = eqn.primitive.name == "div"
    if known and len(traces) == 1 and not (divides and traces[0][0] == 1):
        operand, trace = traces[0]
        trace = _broadcast(trace, eqn, operand)
        factor = _factor(known[0], eqn, trace.index.ndim - jaxprs.ndim(eqn.outvars[0]))
        with np.errstate(divide="ignore"):
            return [trace.scaled(1.0 / factor if divides else factor)]
    for _, trace in traces:
        both = len(traces) == 2 and all(t.source == PARAMETERS for _, t in traces)
        pattern, reason = ("other", "multiplied by another parameter") if both else (
            "scale", "multiplies other values elementwise, which has no Kronecker form"
        )  # fmt: skip
        scope.findings.mark(trace, pattern, reason)
    return [Scaled() if any(t.source == PARAMETERS for _, t in traces) else None]


def _negative(_: int, __: JaxprEqn, values: list[Value], ___: Scope) -> list[Value]:
    (value,) = values
    return [value.scaled(-1.0) if isinstance(value, Trace) else None]


_ARITHMETIC: dict[str, Callable[[int, JaxprEqn, list[Value], Scope], list[Value]]] = {
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "mul": _product,
    "div": _product,
    "neg": _negative,
}


# -- control flow ------------------------------------------------------------------------------


def _scan(number: int, eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    """Constants are shared over the iterations, scanned inputs are stacked over them."""
    scan = jaxprs.scan_parts(eqn)
    first_x = scan.num_consts + scan.num_carry
    inner: list[Value] = []
    for k, value in enumerate(values):
        if scan.num_consts <= k < first_x and not scan.passes_carry(k - scan.num_consts):
            scope.findings.mark(value, "other", "the initial value of a scan's carry")
            inner.append(_counter(scan, k, value, len(scope.lanes)))
        elif isinstance(value, Known):
            inner.append(_known_inside(value, len(scope.lanes), scanned=k >= first_x))
        elif isinstance(value, Trace) and value.source == PARAMETERS:
            inner.append(_scanned(value) if k >= first_x else _looped(value))
        else:
            inner.append(None)
    inside = scope.inside(number, lanes=(scan.length,))
    consts = [constant(c) for c in scan.consts]
    outs = walk(jaxprs.with_consts(scan.body), [*consts, *inner], inside)
    for k, value in enumerate(outs):
        if not scan.passes_carry(k):
            scope.findings.mark(value, "other", "put out by a scan before its use")
    return [values[scan.num_consts + k] if scan.passes_carry(k) else None for k in range(len(outs))]


def _known_inside(known: Known, lanes: int, *, scanned: bool) -> Known:
    """A known operand of a scan as its body sees it in every iteration."""
    if not scanned and not known.lanes:
        return known
    if not scanned:
        return Known(lambda: np.asarray(known.value())[..., None], known.lanes + 1)

    def value() -> Any:
        full = np.asarray(known.value())
        full = full if known.lanes else full.reshape(*full.shape, *[1] * lanes)
        return np.moveaxis(full, 0, -1)

    return Known(value, lanes + 1)


def _counter(scan: jaxprs.ScanParts, k: int, start: Value, lanes: int) -> Value:
    """The value of a carry that the body only counts up (fori loops): known in every iteration."""
    step = scan.counts_up(k - scan.num_consts)
    if step is None or not isinstance(start, Known) or start.lanes:
        return None
    order = np.arange(scan.length)[:: -1 if scan.reverse else 1]

    def value() -> Any:
        first = np.asarray(start.value())
        return (first + step * order).astype(first.dtype).reshape([1] * lanes + [scan.length])

    return Known(value, lanes + 1)


def _looped(trace: Trace) -> Trace:
    scale = None if trace.scale is None else trace.scale[..., None]
    return Trace(trace.source, trace.index[..., None], scale)


def _scanned(trace: Trace) -> Trace:
    scale = trace.scale
    if scale is not None:
        scale = np.moveaxis(np.broadcast_to(scale, trace.index.shape), 0, -1)
    return Trace(trace.source, np.moveaxis(trace.index, 0, -1), scale)


def _cond(number: int, eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    for branch, (body, consts) in enumerate(jaxprs.cond_branches(eqn)):
        inner = [constant(c) for c in consts]
        operands = [v if not isinstance(v, Trace) or v.source == PARAMETERS else None
                    for v in values[1:]]  # fmt: skip
        outs = walk(jaxprs.with_consts(body), [*inner, *operands], scope.inside(number, branch))
        for value in outs:
            scope.findings.mark(value, "other", "chosen by a cond before its use")
    return [None] * len(eqn.outvars)


def _refuse_while(values: list[Value]) -> None:
    if any(isinstance(v, Trace) and v.source == PARAMETERS for v in values):
        msg = (
            "`model_fn` uses parameters inside a `while_loop`, which JAX cannot differentiate in "
            "reverse mode, so there is no Gauss-Newton matrix to compute. Use `lax.scan`, or "
            "`lax.fori_loop` with static bounds, or close over these parameters to freeze them."
        )
        raise ValueError(msg)
