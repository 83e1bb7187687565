"""Uses inside scans, conditionals and loops.

A scan's iterations are followed at once: an array that all of them read gets a scan axis of length
one, an array that is scanned over has its leading axis as scan axis. So ids tell whether a weight
is shared over the iterations, which then are weight-sharing positions, or stacked along them.
"""

import numpy as np

from laplax_kfac import jaxprs
from laplax_kfac.parsing.steps import Rule, Step
from laplax_kfac.parsing.values import Known, Numbers, Symbolic, Value, of_parameters


def scan(step: Step) -> list[Value]:
    """Constants are shared over the iterations, scanned inputs are stacked over them."""
    parts, depth = jaxprs.scan_parts(step.eqn), len(step.scope.scans)
    inner: list[Value] = []
    for k, value in enumerate(step.values):
        carry = k - parts.num_consts
        scanned = carry >= parts.num_carry
        if 0 <= carry < parts.num_carry and not parts.passes_carry(carry):
            step.findings.mark(value, "other", "the initial value of a scan's carry")
            inner.append(_counter(parts, carry, value, depth))
        elif isinstance(value, Known):
            inner.append(value.inside_scan(depth, scanned=scanned))
        elif of_parameters(value):
            inner.append(value.inside_scan(scanned=scanned))
        else:  # the output of a use has another cotangent in every iteration
            inner.append(None)
    outs = step.enter((parts.body, parts.consts), inner, scans=(parts.length,))
    handed_on = [parts.passes_carry(k) for k in range(len(outs))]
    for value, same in zip(outs, handed_on, strict=True):
        if not same:
            step.findings.mark(value, "other", "put out by a scan before its use")
    # The body may read what it hands on, too: then the cotangent of a use's output is another one.
    # Parameters sum their uses.
    outer = [
        v if not isinstance(v, Symbolic) or of_parameters(v) else None
        for v in step.values[parts.num_consts :]
    ]
    return [outer[k] if same else None for k, same in enumerate(handed_on)]


def _counter(parts: jaxprs.ScanParts, carry: int, start: Value, depth: int) -> Known | None:
    """The value of a carry that the body only counts up (fori loops): known in every iteration."""
    step = parts.counts_up(carry)
    if step is None or not isinstance(start, Known) or start.scan_axes:
        return None
    order = np.arange(parts.length)[:: -1 if parts.reverse else 1]

    def value() -> Numbers:
        first = np.asarray(start.value())
        return (first + step * order).astype(first.dtype).reshape([1] * depth + [parts.length])

    return Known(value, depth + 1)


def cond(step: Step) -> list[Value]:
    """Every branch is followed; outputs of uses outside are no layer's where a branch decides."""
    operands = [v if not isinstance(v, Symbolic) or of_parameters(v) else None
                for v in step.values[1:]]  # fmt: skip
    for branch, body in enumerate(jaxprs.cond_branches(step.eqn)):
        for value in step.enter(body, operands, branch):
            step.findings.mark(value, "other", "chosen by a cond before its use")
    return step.nothing


def while_loop(step: Step) -> list[Value]:
    """Parameters must not be in what the loop changes, for it has no reverse mode."""
    # What the condition alone reads decides when the loop ends, which has no derivative.
    differentiated = jaxprs.differentiated_in_while(step.jaxpr, step.eqn)
    if any(d and of_parameters(v) for v, d in zip(step.values, differentiated, strict=True)):
        msg = (
            "`model_fn` uses parameters inside a `while_loop`, which JAX cannot differentiate in "
            "reverse mode, so there is no Gauss-Newton matrix to compute. Use `lax.scan`, or "
            "`lax.fori_loop` with static bounds, or close over these parameters to freeze them."
        )
        raise ValueError(msg)
    return step.nothing


RULES: dict[str, Rule] = {"scan": scan, "cond": cond, "while": while_loop}
