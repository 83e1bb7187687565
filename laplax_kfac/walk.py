"""From a model's jaxpr to the uses of its parameters.

The walk follows every parameter forward through structural equations by *index tracing* (the
equations are evaluated on the ids of the parameters, see `structure`), until an equation uses it:

* as the weight of a registered pattern: a Kronecker use;
* added to the output of such a use: a bias;
* in any other way: the parameter is probed itself, which is exact whatever the use.

The outputs of uses are traced by the same means, so that a bias is recognised through any
relayout between the product and the sum. `resolve` then turns uses into layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Float, Int

from laplax_kfac import jaxprs, patterns
from laplax_kfac.structure import FOREIGN, INDEX_RULES, align_lanes

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
        return replace(self, scale=old * factor)


@dataclass(frozen=True)
class Known:
    """An array that depends on no parameter and no data; evaluated only on demand."""

    value: Callable[[], Any]


Value = Trace | Known | None  # None: data, or anything computed with a parameter


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
    """

    pattern: patterns.Pattern
    eqn: JaxprEqn
    operand: int
    site: Site
    lanes: tuple[int, ...]
    ids: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "..."] | None


@dataclass(frozen=True)
class Shift:
    """A parameter added to (a relayout of) a use's output.

    Attributes:
        use: Number of the use.
        output: Index into the raveled output of the use, one for each entry of the sum.
        ids: Ids of the parameter, for each entry; then one lane a scan.
        factor: d(use's output) / d(parameter), like ``ids``.
    """

    use: int
    output: Int[np.ndarray, " entries"]
    ids: Int[np.ndarray, "entries *lanes"]
    factor: Float[np.ndarray, "entries *lanes"]


@dataclass(frozen=True)
class Opaque:
    """Parameters used in a way that has no Kronecker form."""

    ids: Int[np.ndarray, " n"]
    pattern: str
    reason: str


@dataclass
class Findings:
    """Everything the walk found, in the order of the jaxpr."""

    uses: list[Use] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    opaque: list[Opaque] = field(default_factory=list)

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
            env[var] = value if jaxprs.is_inexact(var) or isinstance(value, Known) else None
    return [read(a) for a in jaxpr.outvars]


def _visit(
    jaxpr: Jaxpr, number: int, eqn: JaxprEqn, values: list[Value], scope: Scope
) -> list[Value]:
    """Values of an equation's outputs, given those of its operands."""
    name = eqn.primitive.name
    nothing: list[Value] = [None] * len(eqn.outvars)
    if not any(isinstance(v, Trace) for v in values):
        known = [v for v in values if isinstance(v, Known)]
        return _known(jaxpr, eqn, known) if len(known) == len(values) else nothing
    if name == "stop_gradient" or not any(jaxprs.is_inexact(v) for v in eqn.outvars):
        return nothing
    if name in INDEX_RULES:
        return _structural(eqn, values)
    if patterns.find(eqn) is not None:
        return _pattern(number, eqn, values, scope)
    if name in _ARITHMETIC:
        return _ARITHMETIC[name](eqn, values, scope)
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
    for value in values:
        scope.findings.mark(value, "other", f"used by `{name}`, which no pattern covers")
    return nothing


def constant(value: Any) -> Value:
    """The value of an array that the model closes over; unknown while it is being traced."""
    return None if isinstance(value, jax.core.Tracer) else Known(lambda: value)


def _known(jaxpr: Jaxpr, eqn: JaxprEqn, operands: list[Known]) -> list[Value]:
    if eqn.effects:
        return [None] * len(eqn.outvars)
    cache: list[Any] = []

    def output(k: int) -> Any:
        if not cache:
            with jax.ensure_compile_time_eval():
                cache.extend(jaxprs.evaluate(jaxpr, eqn, [o.value() for o in operands]))
        return cache[k]

    return [Known(lambda k=k: output(k)) for k in range(len(eqn.outvars))]  # type: ignore[misc]


def _structural(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Apply an index rule; operands of another source become foreign entries."""
    first = next(v for v in values if isinstance(v, Trace))
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
    ndim = jaxprs.ndim(eqn.outvars[0])
    return value.reshape((1,) * (ndim - value.ndim) + value.shape + (1,) * lanes)


def _sum(eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
    """``add`` and ``sub``: a bias if a parameter meets the output of a use."""
    signs = (1.0, -1.0 if eqn.primitive.name == "sub" else 1.0)
    terms = [
        _signed(_broadcast(v, eqn, k), signs[k]) if isinstance(v, Trace) else v
        for k, v in enumerate(values)
    ]
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
    if weights and outputs:
        scope.findings.shifts.append(_shift(weights[0], outputs[0], eqn))
        return [outputs[0]]
    if weights:
        if any(isinstance(t, Known) for t in terms):
            return [weights[0]]  # an affine function of the parameter has the same gradient
        scope.findings.mark(weights[0], "shift", "added to data that no layer put out")
        return [None]
    # The output of a use plus anything has the same cotangent: one bias serves two products.
    return [outputs[0] if outputs else None]


def _signed(trace: Trace, sign: float) -> Trace:
    return trace if sign == 1.0 else trace.scaled(sign)


def _shift(weight: Trace, output: Trace, eqn: JaxprEqn) -> Shift:
    ndim = jaxprs.ndim(eqn.outvars[0])
    lanes = weight.index.shape[ndim:]
    one = np.ones((1,) * weight.index.ndim)
    with np.errstate(divide="ignore"):
        ratio = (one if weight.scale is None else weight.scale) / (
            one if output.scale is None else output.scale
        )
    # An output's index is the same in every iteration of a scan: its lanes have length one.
    index, ids = output.index.reshape(-1), weight.index.reshape(-1, *lanes)
    factor = np.broadcast_to(ratio, weight.index.shape).reshape(-1, *lanes)
    mine = index != FOREIGN
    return Shift(output.source, index[mine], ids[mine], factor[mine])


def _product(eqn: JaxprEqn, values: list[Value], scope: Scope) -> list[Value]:
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
            "scale", "multiplies data elementwise: its Gauss-Newton matrix is no Kronecker product"
        )  # fmt: skip
        scope.findings.mark(trace, pattern, reason)
    return [None]


def _negative(_: JaxprEqn, values: list[Value], __: Scope) -> list[Value]:
    (value,) = values
    return [value.scaled(-1.0) if isinstance(value, Trace) else None]


_ARITHMETIC: dict[str, Callable[[JaxprEqn, list[Value], Scope], list[Value]]] = {
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
            inner.append(None)
        elif isinstance(value, Trace) and value.source == PARAMETERS:
            inner.append(_scanned(value) if k >= first_x else _looped(value))
        else:
            inner.append(value if isinstance(value, Known) and k < scan.num_consts else None)
    inside = scope.inside(number, lanes=(scan.length,))
    consts = [constant(c) for c in scan.consts]
    outs = walk(jaxprs.with_consts(scan.body), [*consts, *inner], inside)
    for k, value in enumerate(outs):
        if not scan.passes_carry(k):
            scope.findings.mark(value, "other", "put out by a scan before its use")
    return [values[scan.num_consts + k] if scan.passes_carry(k) else None for k in range(len(outs))]


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
