"""Whether a derivative rule that somebody wrote is the derivative of what it is the rule of.

It is if both pullbacks are the same equations. Else both are evaluated at drawn points, if they are
made of analytic functions alone: the difference of two such functions is zero everywhere, or
different from zero at almost every point. Loops are left out, though these may be analytic, too: an
iteration that has converged has its implicit derivative up to rounding where it contracts, and not
elsewhere. So are kinks and choices, beyond which a rule may be another one.
"""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from laplax_kfac import jaxprs, machine
from laplax_kfac.caches import Cache
from laplax_kfac.jaxprs import Atom
from laplax_kfac.parsing.index_rules import INDEX_RULES
from laplax_kfac.parsing.structure import Structure, of_value
from laplax_kfac.parsing.values import Known, Value

ANALYTIC = (frozenset(INDEX_RULES) - {"reduce_precision"}) | frozenset(
    "add add_any sub mul div neg exp exp2 expm1 log log1p sin cos tan sinh cosh tanh asinh atan "
    "logistic erf erfc integer_pow square sqrt rsqrt pow reduce_sum cumsum cumprod dot_general "
    "conv_general_dilated bcoo_dot_general pad iota".split()
)
"""Functions that are analytic wherever they are defined."""
LARGEST = 2**22
"""Entries of operands beyond which pullbacks are not evaluated."""
MAGNITUDES = (0.5, 1.0, 2.0)
"""Sizes of drawn operands, as eigenvalues of a square matrix."""

Pulled = tuple[Jaxpr, list[ArrayLike]]
"""A pullback: a jaxpr whose inputs are its constants, operands and cotangents; the constants."""

_VERDICTS: Cache[bool] = Cache(machine.MACHINE.passes_kept)


def agree(first: Pulled, second: Pulled, inputs: Sequence[Atom], values: Sequence[Value]) -> bool:
    """Whether two pullbacks are the same function.

    Args:
        first: A pullback.
        second: Another one.
        inputs: Their operands and cotangents.
        values: What is known of these.
    """
    keys = [(Structure(rules=False).of(j), of_value(consts)) for j, consts in (first, second)]
    if keys[0] == keys[1]:
        return True
    if jaxprs.is_traced([first[1], second[1]]):
        return False
    if not (is_analytic(first[0]) and is_analytic(second[0])):
        return False
    points = drawn(inputs, values)
    known = [v.value() if isinstance(v, Known) else None for v in values]
    key = *keys, of_value(known)
    return points is not None and _VERDICTS.get(key, lambda: equal_at(points, first, second))


def drawn(inputs: Sequence[Atom], values: Sequence[Value]) -> list[list[np.ndarray]] | None:
    """Points to compare two pullbacks at; None if these would not tell them apart."""
    unknown = [not isinstance(v, Known) for v in values]
    scanned = any(isinstance(v, Known) and v.scan_axes for v in values)
    specs = list(map(jaxprs.spec, inputs))
    floating = all(jaxprs.is_inexact(a) for a, free in zip(inputs, unknown, strict=True) if free)
    if scanned or not floating or sum(map(jaxprs.size, inputs)) > LARGEST:
        return None
    rng = np.random.default_rng(0)

    def point(magnitude: float) -> list[np.ndarray]:
        return [
            np.asarray(value.value())
            if isinstance(value, Known)
            else np.asarray(magnitude * rng.normal(size=s.shape) / max(s.size, 1) ** 0.25, s.dtype)
            for s, value in zip(specs, values, strict=True)
        ]

    with jax.ensure_compile_time_eval():
        return list(map(point, MAGNITUDES))


def equal_at(points: Sequence[Sequence[np.ndarray]], first: Pulled, second: Pulled) -> bool:
    """Whether two pullbacks are equal at some points, up to rounding."""

    @jax.jit
    def distances(point: list[ArrayLike]) -> list[tuple[Float[Array, ""], Float[Array, ""]]]:
        """Norm of the difference, and what it may be, for every operand."""
        mine, other = (eval_jaxpr(j, [], *consts, *point) for j, consts in (first, second))
        found = []
        for a, b in zip(mine, other, strict=True):
            least = 100.0 * jnp.finfo(a.dtype).eps ** 0.75
            size = jnp.linalg.norm(a.ravel()) + jnp.linalg.norm(b.ravel())
            found.append((jnp.linalg.norm((a - b).ravel()), least * size))
        return found

    with jax.ensure_compile_time_eval():
        pairs = [pair for point in points for pair in distances(list(point))]
        return all(float(distance) <= float(most) for distance, most in pairs)  # not if NaN


def is_analytic(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr is of analytic functions alone: no kinks, choices, rounding or loops."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ANALYTIC:
            real = all(v.aval.dtype in (np.float32, np.float64) for v in eqn.outvars)  # type: ignore[attr-defined]
            if real or not any(map(jaxprs.is_inexact, eqn.invars)):
                continue
            return False
        body = jaxprs.ruled_jaxpr(eqn) or jaxprs.called_jaxpr(eqn)
        if body is None or not is_analytic(body[0]):
            return False
    return True


def is_analytic_in(jaxpr: Jaxpr, inputs: Collection[int]) -> bool:
    """Whether a jaxpr is analytic in some of its inputs, as far as they have a derivative.

    Others, and what they move under a `stop_gradient`, may enter in any way that chooses nothing.

    Args:
        jaxpr: The jaxpr.
        inputs: The numbers of the inputs.
    """
    needed = jaxprs.with_derivative(jaxpr)
    moved = {jaxpr.invars[k] for k in inputs}
    reached = set(moved)  # under a `stop_gradient`, too
    for number, eqn in enumerate(jaxpr.eqns):
        variables = [(k, v) for k, v in enumerate(eqn.invars) if not isinstance(v, Literal)]
        if not any(v in reached for _, v in variables):
            continue
        reached.update(eqn.outvars)
        operands = [k for k, v in variables if v in moved]
        if number not in needed or not operands:
            continue
        moved.update(eqn.outvars)
        if eqn.primitive.name in ANALYTIC:
            if eqn.primitive.name == "select_n" and eqn.invars[0] in reached:
                return False
            continue
        body = jaxprs.ruled_jaxpr(eqn) or jaxprs.called_jaxpr(eqn)
        if body is None:
            return False
        inside, consts = body
        shifted = [len(consts) + k for k in operands]
        if not is_analytic_in(jaxprs.with_consts(inside), shifted):
            return False
    return True
