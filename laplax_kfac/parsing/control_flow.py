"""Uses inside scans, conditionals and loops.

A scan's iterations are followed at once: an array that all of them read gets a scan axis of length
one, an array that is scanned over has its leading axis as scan axis. So ids tell whether a weight
is shared over the iterations, which then are weight-sharing positions, or stacked along them.
"""

import numpy as np

from laplax_kfac import jaxprs
from laplax_kfac.parsing.steps import Rule, Step
from laplax_kfac.parsing.values import PARAMETERS, Known, Numbers, Symbolic, Value


def _of_parameters(value: Value) -> bool:
    return isinstance(value, Symbolic) and value.source == PARAMETERS


def _scan(step: Step) -> list[Value]:
    """Constants are shared over the iterations, scanned inputs are stacked over them."""
    scan, scan_axes = jaxprs.scan_parts(step.eqn), len(step.scope.scans)
    inner: list[Value] = []
    for k, value in enumerate(step.values):
        carry = k - scan.num_consts
        scanned = carry >= scan.num_carry
        if 0 <= carry < scan.num_carry and not scan.passes_carry(carry):
            step.findings.mark(value, "other", "the initial value of a scan's carry")
            inner.append(_counter(scan, carry, value, scan_axes))
        elif isinstance(value, Known):
            inner.append(_known_inside(value, scan_axes, scanned=scanned))
        elif isinstance(value, Symbolic) and value.source == PARAMETERS:
            inner.append(value.map(_stacked if scanned else _repeated))
        else:  # the output of a use has another cotangent in every iteration
            inner.append(None)
    outs = step.enter((scan.body, scan.consts), inner, scans=(scan.length,))
    handed_on = [scan.passes_carry(k) for k in range(len(outs))]
    for value, same in zip(outs, handed_on, strict=True):
        if not same:
            step.findings.mark(value, "other", "put out by a scan before its use")
    # The body may read what it hands on, too: then the cotangent of a use's output is another one.
    # Parameters sum their uses.
    outer = [
        v if not isinstance(v, Symbolic) or _of_parameters(v) else None
        for v in step.values[scan.num_consts :]
    ]
    return [outer[k] if same else None for k, same in enumerate(handed_on)]


def _stacked(x: Numbers) -> Numbers:
    return np.moveaxis(x, 0, -1)


def _repeated(x: Numbers) -> Numbers:
    return x[..., None]


def _known_inside(known: Known, scan_axes: int, *, scanned: bool) -> Known:
    """A known operand of a scan as its body sees it in every iteration."""
    if not scanned and not known.scan_axes:
        return known

    def value() -> Numbers:
        full = np.asarray(known.value())
        full = full if known.scan_axes else full.reshape(*full.shape, *[1] * scan_axes)
        return _stacked(full) if scanned else _repeated(full)

    return Known(value, scan_axes + 1)


def _counter(scan: jaxprs.ScanParts, carry: int, start: Value, scan_axes: int) -> Known | None:
    """The value of a carry that the body only counts up (fori loops): known in every iteration."""
    step = scan.counts_up(carry)
    if step is None or not isinstance(start, Known) or start.scan_axes:
        return None
    order = np.arange(scan.length)[:: -1 if scan.reverse else 1]

    def value() -> Numbers:
        first = np.asarray(start.value())
        return (first + step * order).astype(first.dtype).reshape([1] * scan_axes + [scan.length])

    return Known(value, scan_axes + 1)


def _cond(step: Step) -> list[Value]:
    """Every branch is followed; outputs of uses outside are no layer's where a branch decides."""
    operands = [v if not isinstance(v, Symbolic) or _of_parameters(v) else None
                for v in step.values[1:]]  # fmt: skip
    for branch, body in enumerate(jaxprs.cond_branches(step.eqn)):
        for value in step.enter(body, operands, branch):
            step.findings.mark(value, "other", "chosen by a cond before its use")
    return step.nothing


def _while(step: Step) -> list[Value]:
    # What the condition alone reads decides when the loop ends, which has no derivative.
    differentiated = jaxprs.differentiated_in_while(step.jaxpr, step.eqn)
    if any(d and _of_parameters(v) for v, d in zip(step.values, differentiated, strict=True)):
        msg = (
            "`model_fn` uses parameters inside a `while_loop`, which JAX cannot differentiate in "
            "reverse mode, so there is no Gauss-Newton matrix to compute. Use `lax.scan`, or "
            "`lax.fori_loop` with static bounds, or close over these parameters to freeze them."
        )
        raise ValueError(msg)
    return step.nothing


RULES: dict[str, Rule] = {"scan": _scan, "cond": _cond, "while": _while}
