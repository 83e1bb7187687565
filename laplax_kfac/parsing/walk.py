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
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Float, Int

from laplax_kfac import jaxprs, patterns
from laplax_kfac.parsing.indices import (
    COTANGENT,
    FOREIGN,
    INDEX_RULES,
    PARAMETERS,
    SELECTIONS,
    Fixed,
    Known,
    Trace,
    constant,
    known_outputs,
    moved,
    selected,
)

Site = tuple[int, ...]
"""Where an equation sits: equation index, then (sub-jaxpr number, equation index) inward."""


@dataclass(frozen=True)
class Scaled:
    """Data that a parameter has multiplied: what is added to it is the shift of a norm layer."""


Value = Trace | Known | Fixed | Scaled | None
"""None: data, or anything else computed with a parameter."""


# -- findings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One use of a weight by an equation.

    Attributes:
        pattern: The registered pattern.
        eqn: The equation.
        operand: Which of its operands is the weight; -1 for a bias.
        site: Where the equation sits.
        lanes: Lengths of the scans around it, outermost first.
        ids: Ids of the weight, shape (*lanes or 1, stack, in, out).
        scale: Factors of the weight's entries, like ``ids``; None stands for 1.
        mixed: Whether data may be among the entries that are no parameters.
        regular: Whether every parameter is used equally often; only biases may be irregular.
    """

    pattern: patterns.Pattern
    eqn: JaxprEqn
    operand: int
    site: Site
    lanes: tuple[int, ...]
    ids: Int[np.ndarray, "..."]
    scale: Float[np.ndarray, "..."] | None
    mixed: bool = False
    regular: bool = True

    @functools.cached_property
    def moments(self) -> patterns.Moments | None:
        """How sums over the inputs are formed without them; None in a scan."""
        if self.pattern.moments is None or self.lanes:
            return None
        return self.pattern.moments(self.eqn, self.operand)


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
    of_parameters: set[int] = field(default_factory=set)  # uses whose outputs no data enter

    def use(self, number: int) -> Use:
        """The use of that number; biases are made on demand, for most join a weight."""
        found = self.uses[number]
        if not isinstance(found, Use):
            found = self.uses[number] = found()
        return found

    def is_fixed(self, value: Value) -> bool:
        """Whether a value is the same for all data."""
        if isinstance(value, Trace):
            alone = value.source == PARAMETERS or value.source in self.of_parameters
            return alone and not value.mixed
        return isinstance(value, Known | Fixed)

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


@dataclass(frozen=True)
class Step:
    """One equation on the walk, with the values of its operands."""

    jaxpr: Jaxpr
    number: int
    eqn: JaxprEqn
    values: list[Value]
    scope: Scope

    @property
    def site(self) -> Site:
        """Where the equation sits."""
        return (*self.scope.site, self.number)

    def mark(self, pattern: str, reason: str) -> list[Value]:
        """Note that the parameters in the operands have no Kronecker form here."""
        for value in self.values:
            self.scope.findings.mark(value, pattern, reason)
        return [None] * len(self.eqn.outvars)

    def enter(
        self,
        body: tuple[Jaxpr, list[Any]],
        values: Sequence[Value],
        branch: int = 0,
        lanes: tuple[int, ...] = (),
    ) -> list[Value]:
        """Walk a sub-jaxpr of the equation."""
        jaxpr, consts = body
        inside = replace(self.scope, site=(*self.site, branch), lanes=self.scope.lanes + lanes)
        return walk(jaxprs.with_consts(jaxpr), [*map(constant, consts), *values], inside)


def walk(jaxpr: Jaxpr, inputs: Sequence[Value], scope: Scope) -> list[Value]:
    """Follow traces through a jaxpr, noting uses; returns the values of its outputs."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    differentiated = jaxprs.with_derivative(jaxpr)
    counts = jaxprs.consumers(differentiated.values(), jaxpr.outvars)

    def read(atom: Any) -> Value:
        if isinstance(atom, Literal):
            return Known(lambda: np.asarray(atom.val))
        value = env.get(atom)
        # A use's output that is read twice has a cotangent that its bias does not see.
        shared = isinstance(value, Trace) and value.source != PARAMETERS and counts.get(atom, 0) > 1
        return _without_derivative(value, scope.findings) if shared else value

    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(a) for a in eqn.invars]
        if number not in differentiated:
            values = [_without_derivative(v, scope.findings) for v in values]
        fixed = not eqn.effects and all(map(scope.findings.is_fixed, values))
        step = Step(jaxpr, number, eqn, values, scope)
        for var, value in zip(eqn.outvars, _visit(step), strict=True):
            if fixed and not isinstance(value, Trace | Known):
                value = Fixed()
            empty = isinstance(value, Trace) and value.index.size == 0
            kept = isinstance(value, Known | Fixed) or (jaxprs.is_inexact(var) and not empty)
            env[var] = value if kept else None
    return [read(a) for a in jaxpr.outvars]


def _without_derivative(value: Value, findings: Findings) -> Value:
    """What is left of a value where its cotangent is another one, or none."""
    if not isinstance(value, Trace):
        return value
    return Fixed() if findings.is_fixed(value) else None


def _visit(step: Step) -> list[Value]:
    """Values of an equation's outputs, given those of its operands."""
    eqn, values, name = step.eqn, step.values, step.eqn.primitive.name
    nothing: list[Value] = [None] * len(eqn.outvars)
    if not any(isinstance(v, Trace) for v in values):
        known = [v for v in values if isinstance(v, Known)]
        if len(known) == len(values):
            return nothing if eqn.effects else [*known_outputs(step.jaxpr, eqn, known)]
        rearranged = name in INDEX_RULES or name == "mul"
        scaled = rearranged and any(isinstance(v, Scaled) for v in values)
        return [Scaled()] if scaled and len(eqn.outvars) == 1 else nothing
    if not jaxprs.has_body(eqn) and any(jaxprs.is_complex(v) for v in eqn.outvars):
        return step.mark("complex", "turned into a complex number before its use")
    if name in INDEX_RULES:
        return moved(eqn, values)
    if name in SELECTIONS:
        selection = selected(eqn, values)
        if selection is not None:
            return [selection]
    if patterns.find(eqn) is not None:
        return _pattern(step)
    if name in _RULES:
        return _RULES[name](step)
    called = jaxprs.called_jaxpr(eqn)
    if called is not None:
        return step.enter(called, values)
    view = _rearranged(step)
    return [view] if view else step.mark("other", f"used by `{name}`, which no pattern covers")


def _rearranged(step: Step) -> Trace | None:
    """A function of one parameter alone whose pullback only rearranges and scales cotangents.

    Found by walking the pullback with a traced cotangent. So a straight-through estimator is a
    view of its parameter, whatever its forward rule computes.
    """
    eqn, values = step.eqn, step.values
    traces = [k for k, v in enumerate(values) if isinstance(v, Trace)]
    lanes = any(isinstance(v, Known) and v.lanes for v in values)
    others = [v for v in values if not isinstance(v, Trace | Known)]
    if len(traces) != 1 or len(eqn.outvars) != 1 or eqn.effects or lanes or others:
        return None
    trace, out = values[traces[0]], eqn.outvars[0]
    assert isinstance(trace, Trace)
    if trace.source != PARAMETERS:
        return None

    def pullback(w: Any, cotangent: Any) -> Any:
        def forward(w: Any) -> Any:
            mine = [v.value() if isinstance(v, Known) else w for v in values]
            return jaxprs.evaluate(step.jaxpr, eqn, mine)[0]

        return jax.vjp(forward, w)[1](cotangent)

    try:
        specs = map(jaxprs.spec, (eqn.invars[traces[0]], out))
        rule, consts, _ = jaxprs.trace(pullback, *specs)
    except (TypeError, ValueError, NotImplementedError):
        return None  # no derivative: whoever differentiates the model will be told
    cotangent = Trace(COTANGENT, jaxprs.numbered(out))
    (found,) = walk(rule, [*map(constant, consts), None, cotangent], Scope(Findings()))
    if not isinstance(found, Trace):
        return None
    places = found.index[found.index != FOREIGN]
    return trace.put(found, jaxprs.shape(out)) if np.unique(places).size == places.size else None


def _pattern(step: Step) -> list[Value]:
    """A registered primitive: note a use for every operand that is a weight."""
    eqn, scope, pattern = step.eqn, step.scope, patterns.find(step.eqn)
    assert pattern is not None
    output: list[Value] = [None] * len(eqn.outvars)
    of_parameters = all(map(scope.findings.is_fixed, step.values))
    for operand, value in enumerate(step.values):
        if not isinstance(value, Trace) or value.source != PARAMETERS:
            continue
        if operand not in pattern.operands(eqn):
            reason = f"operand {operand} of `{eqn.primitive.name}` is no weight of {pattern.name}"
            scope.findings.mark(value, "other", reason)
            continue
        read = functools.partial(pattern.weight, eqn, operand)
        view = value.map(functools.partial(_by_lane, read, jaxprs.ndim(eqn.invars[operand])))
        use = Use(pattern, eqn, operand, step.site, scope.lanes, view.index, view.scale, view.mixed)
        index = jaxprs.numbered(eqn.outvars[0])
        output[0] = Trace(len(scope.findings.uses), index[(..., *[None] * len(scope.lanes))])
        if of_parameters:
            scope.findings.of_parameters.add(len(scope.findings.uses))
        scope.findings.uses.append(use)
    return output


def _by_lane(rearrange: Callable[[Any], Any], ndim: int, x: Any) -> Any:
    """Rearrange an array with lanes behind its own axes; the lanes come first."""
    parts = [rearrange(x[(..., *lane)]) for lane in np.ndindex(x.shape[ndim:])]
    whole = np.stack(parts) if len(parts) > 1 else parts[0]
    return whole.reshape(*x.shape[ndim:], *parts[0].shape)


# -- arithmetic --------------------------------------------------------------------------------


def _broadcast(value: Value, step: Step, operand: int) -> Value:
    """A trace broadcast to the shape of the equation's output (size-1 axes, scalars)."""
    if not isinstance(value, Trace):
        return value
    shape, own = jaxprs.shape(step.eqn.outvars[0]), jaxprs.ndim(step.eqn.invars[operand])

    def to_output(x: Any) -> Any:
        padded = x.reshape((1,) * (len(shape) - own) + x.shape)
        return np.broadcast_to(padded, shape + x.shape[own:])

    return value.map(to_output)


def _sum(step: Step) -> list[Value]:
    """``add`` and ``sub``, with their operands broadcast and signed."""
    first, second = (_broadcast(v, step, k) for k, v in enumerate(step.values))
    if step.eqn.primitive.name == "sub" and isinstance(second, Trace):
        second = second.scaled(-1.0)
    return _add(step, [first, second])


def _scatter_add(step: Step) -> list[Value]:
    """Parameters added at known places: a sum with what they are elsewhere, nothing."""
    onto, places, updates = step.values
    if isinstance(updates, Trace):
        like = jaxprs.spec(step.eqn.invars[0])
        zeros = Known(lambda: np.zeros(like.shape, like.dtype))
        alone = replace(step, values=[zeros, places, updates])
        updates = _rearranged(alone) if isinstance(places, Known) else None
        if updates is None:
            reason = "scattered to places that data decide, or several times to one"
            return step.mark("other", reason)
    if not step.scope.findings.is_fixed(places):
        updates = None  # constants that are added to places that data decide are data
    return _add(step, [onto, updates])


def _add(step: Step, terms: list[Value]) -> list[Value]:
    """A sum of terms of one shape: a bias if a parameter meets the output of a use, or data."""
    eqn, findings = step.eqn, step.scope.findings
    weights = [t for t in terms if isinstance(t, Trace) and t.source == PARAMETERS]
    # An output that is broadcast by the sum has another cotangent than the sum.
    outputs = [
        t for t, a in zip(terms, eqn.invars, strict=False)
        if isinstance(t, Trace) and t.source >= 0
        and jaxprs.shape(a) == jaxprs.shape(eqn.outvars[0])
    ]  # fmt: skip
    if len(weights) == 2:
        return step.mark("other", "added to another parameter before its use")
    # The output of a use plus anything has the same cotangent: one bias serves two products. But
    # what is added may be data, and then data are in the sum.
    mixed = not all(map(findings.is_fixed, terms))
    output = replace(outputs[0], mixed=outputs[0].mixed or mixed) if outputs else None
    if not weights:
        return [output]
    if any(isinstance(t, Scaled) for t in terms):
        return step.mark("shift", "the shift of a scaled normalisation")
    # A parameter in a part of an array is a view of it, whatever is in the other parts.
    affine = all(t is weights[0] or findings.is_fixed(t) for t in terms)
    if affine and not (outputs and _is_broadcast(findings, weights[0], outputs[0])):
        return [weights[0]]  # an affine function of the parameter has the same gradient
    bias = len(findings.uses)
    findings.uses.append(functools.partial(_bias_use, step, weights[0]))
    shift = _shift(weights[0], outputs[0], jaxprs.ndim(eqn.outvars[0]), bias) if outputs else None
    if shift is None:
        findings.sums.append(bias)
        return [None]
    findings.shifts.append(shift)
    return [output]


def _is_broadcast(findings: Findings, weight: Trace, output: Trace) -> bool:
    """Whether a parameter is added to a use's output as a bias is: the same at all positions."""
    use = findings.use(output.source)
    numbered = jaxprs.numbered(use.eqn.outvars[0])
    positions = len(use.pattern.outputs(use.eqn, use.operand, numbered))
    return positions == 1 or np.unique(weight.index).size < weight.index.size


def _bias_use(step: Step, weight: Trace) -> Use:
    """The sum as a use of its own: a weight with one input, the constant 1.

    The same parameter added in several places is shared over them: these are its positions.
    """
    eqn, ndim = step.eqn, jaxprs.ndim(step.eqn.outvars[0])
    first = _first_lane(weight.index, ndim)
    # Places where it is added in some iteration of the scans around it.
    ids = weight.index.reshape(first.size, -1)
    mine = np.flatnonzero((ids != FOREIGN).any(axis=1))
    order = mine[np.argsort(first[mine], kind="stable")]
    distinct, counts = np.unique(first[mine], return_counts=True)
    regular = bool(counts.size > 0 and counts.min() == counts.max())
    # (positions, features): in raveled order, the n-th place of every parameter is position n.
    places = order.reshape(distinct.size, -1).T if regular else np.zeros((0, distinct.size), int)

    def canonical(x: Any) -> Any:
        """(axes, lanes) -> (lanes, positions, features)."""
        flat = x.reshape(-1, *x.shape[ndim:])
        return np.moveaxis(flat[places if regular else order[None]], (0, 1), (-2, -1))

    view = weight.map(canonical)
    # The places are those of the first iteration; the others must repeat their parameters alike.
    alike = regular and bool((view.index == view.index[..., :1, :]).all())
    if not alike:
        every = np.unique(ids[ids != FOREIGN])[None, None]
        pattern = patterns.bias(places[:0], 1)
        return Use(pattern, eqn, -1, step.site, step.scope.lanes, every, None, regular=False)
    ids, scale = view.index[..., None, :1, :], view.scale
    if scale is not None:
        regular = bool((scale == scale[..., :1, :]).all())
        scale = scale[..., None, :1, :]
    axes = sum(bool((weight.index != weight.index.take([0], a)).any()) for a in range(ndim))
    pattern = patterns.bias(places, axes)
    return Use(pattern, eqn, -1, step.site, step.scope.lanes, ids, scale, regular=regular)


def _shift(weight: Trace, output: Trace, ndim: int, bias: int) -> Shift | None:
    """A parameter added to an output; None if some is added elsewhere."""
    added = _first_lane(weight.index, ndim) != FOREIGN
    everywhere = weight.index.reshape(added.size, -1) != FOREIGN
    if (everywhere != added[:, None]).any():
        return None  # in other places in other iterations
    if (added & (_first_lane(output.index, ndim) == FOREIGN)).any():
        return None
    # An output's index is the same in every iteration of a scan: its lanes have length one.
    index, ids = output.index.reshape(-1), weight.index.reshape(-1, *weight.index.shape[ndim:])
    if not added.all():  # nearly always: no need for a copy
        index, ids = index[added], ids[added]
    return Shift(output.source, bias, index, ids, _uniform(weight.scale, output.scale))


def _uniform(weight: Any, output: Any) -> float | None:
    """The ratio of two scales, if it is one finite number other than zero."""
    ends = [(1.0, 1.0) if s is None else (float(s.min()), float(s.max())) for s in (weight, output)]
    (low, high), (least, most) = ends
    same = high - low <= 1e-6 * abs(high) and most - least <= 1e-6 * abs(most)
    return high / most if same and high and most else None


def _first_lane(index: Any, ndim: int) -> Int[np.ndarray, " entries"]:
    """The indices of an array in the first iteration of every scan, raveled."""
    return index[(..., *[0] * (index.ndim - ndim))].reshape(-1)


def _product(step: Step) -> list[Value]:
    """``mul`` and ``div``: a constant scales the trace, anything else ends it."""
    terms = [_broadcast(v, step, k) for k, v in enumerate(step.values)]
    traces = [v for v in terms if isinstance(v, Trace)]
    parameters = sum(t.source == PARAMETERS for t in traces)
    divides = step.eqn.primitive.name == "div"
    for known in terms:
        if isinstance(known, Known) and not (divides and known is terms[0]):
            factor = _factor(known, step, traces[0])
            with np.errstate(divide="ignore"):
                return [traces[0].scaled(1.0 / factor if divides else factor)]
    if parameters == 2:
        step.mark("other", "multiplied by another parameter")
    else:
        step.mark("scale", "multiplies other values elementwise, which has no Kronecker form")
    return [Scaled() if parameters else None]


def _factor(known: Known, step: Step, trace: Trace) -> Float[np.ndarray, "..."]:
    value, ndim = np.asarray(known.value(), np.float64), jaxprs.ndim(step.eqn.outvars[0])
    own = value.ndim - known.lanes
    lanes = value.shape[own:] or (1,) * (trace.index.ndim - ndim)
    return value.reshape((1,) * (ndim - own) + value.shape[:own] + lanes)


def _negative(step: Step) -> list[Value]:
    (value,) = step.values
    return [value.scaled(-1.0) if isinstance(value, Trace) else None]


# -- control flow ------------------------------------------------------------------------------


def _scan(step: Step) -> list[Value]:
    """Constants are shared over the iterations, scanned inputs are stacked over them."""
    scan, lanes = jaxprs.scan_parts(step.eqn), len(step.scope.lanes)
    inner: list[Value] = []
    for k, value in enumerate(step.values):
        carry = k - scan.num_consts
        if 0 <= carry < scan.num_carry and not scan.passes_carry(carry):
            step.scope.findings.mark(value, "other", "the initial value of a scan's carry")
            inner.append(_counter(scan, carry, value, lanes))
        elif isinstance(value, Known):
            inner.append(_known_inside(value, lanes, scanned=carry >= scan.num_carry))
        elif isinstance(value, Trace) and value.source == PARAMETERS:
            inner.append(value.map(_stacked if carry >= scan.num_carry else _repeated))
        else:
            inner.append(None)
    outs = step.enter((scan.body, scan.consts), inner, lanes=(scan.length,))
    handed_on = [scan.passes_carry(k) for k in range(len(outs))]
    for value, same in zip(outs, handed_on, strict=True):
        if not same:
            step.scope.findings.mark(value, "other", "put out by a scan before its use")
    # What the body reads as well as hands on has another cotangent than what comes out.
    outer = [_without_cotangent(v) for v in step.values[scan.num_consts :]]
    return [outer[k] if s else None for k, s in enumerate(handed_on)]


def _without_cotangent(value: Value) -> Value:
    """A value without its symbolic index, unless it is of parameters: these sum their uses."""
    return None if isinstance(value, Trace) and value.source != PARAMETERS else value


def _stacked(x: Any) -> Any:
    return np.moveaxis(x, 0, -1)


def _repeated(x: Any) -> Any:
    return x[..., None]


def _known_inside(known: Known, lanes: int, *, scanned: bool) -> Known:
    """A known operand of a scan as its body sees it in every iteration."""
    if not scanned and not known.lanes:
        return known

    def value() -> Any:
        full = np.asarray(known.value())
        full = full if known.lanes else full.reshape(*full.shape, *[1] * lanes)
        return _stacked(full) if scanned else _repeated(full)

    return Known(value, lanes + 1)


def _counter(scan: jaxprs.ScanParts, carry: int, start: Value, lanes: int) -> Known | None:
    """The value of a carry that the body only counts up (fori loops): known in every iteration."""
    step = scan.counts_up(carry)
    if step is None or not isinstance(start, Known) or start.lanes:
        return None
    order = np.arange(scan.length)[:: -1 if scan.reverse else 1]

    def value() -> Any:
        first = np.asarray(start.value())
        return (first + step * order).astype(first.dtype).reshape([1] * lanes + [scan.length])

    return Known(value, lanes + 1)


def _cond(step: Step) -> list[Value]:
    operands = [v if not isinstance(v, Trace) or v.source == PARAMETERS else None
                for v in step.values[1:]]  # fmt: skip
    for branch, body in enumerate(jaxprs.cond_branches(step.eqn)):
        for value in step.enter(body, operands, branch):
            step.scope.findings.mark(value, "other", "chosen by a cond before its use")
    return [None] * len(step.eqn.outvars)


def _while(step: Step) -> list[Value]:
    # What the condition alone reads decides when the loop ends, which has no derivative.
    differentiated = jaxprs.differentiated_in_while(step.jaxpr, step.eqn)
    values = [v for v, d in zip(step.values, differentiated, strict=True) if d]
    if any(isinstance(v, Trace) and v.source == PARAMETERS for v in values):
        msg = (
            "`model_fn` uses parameters inside a `while_loop`, which JAX cannot differentiate in "
            "reverse mode, so there is no Gauss-Newton matrix to compute. Use `lax.scan`, or "
            "`lax.fori_loop` with static bounds, or close over these parameters to freeze them."
        )
        raise ValueError(msg)
    return [None] * len(step.eqn.outvars)


_RULES: dict[str, Callable[[Step], list[Value]]] = {
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "scatter-add": _scatter_add,
    "mul": _product,
    "div": _product,
    "neg": _negative,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
