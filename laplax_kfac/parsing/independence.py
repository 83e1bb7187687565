"""Whether the examples of a batch depend on one another in a model that takes batches.

Capture runs such a model on batches of one. That is the model on the batch only if no example sees
another one, which batch norm in training mode makes them do. The model is traced once for a few
examples, and the axis that they lie along is followed through the equations: an equation that sums,
sorts or picks along it mixes them. What is not known to mix and not known not to is tried out.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import PyTree

from laplax_kfac import jaxprs
from laplax_kfac.parsing.axis_rules import EXAMPLES, Along, Mixed, Unknown, joined, rule_of
from laplax_kfac.parsing.model_calls import ModelFn

EVALUATION = (
    "`model.eval()` in flax.nnx, `use_running_average=True` in flax.linen, "
    "`eqx.nn.inference_mode(model)` in equinox, `is_training=False` in haiku, `training=False` in "
    "keras"
)


def require_independent(model_fn: ModelFn, params: PyTree, example: PyTree) -> None:
    """Refuse a model of batches whose examples depend on one another.

    Args:
        model_fn: ``model_fn(input=, params=)``, for a batch.
        params: Its parameters.
        example: Shapes and dtypes of one input, without a batch axis.

    Raises:
        ValueError: If they do.
    """

    def function(params: PyTree, x: PyTree) -> PyTree:
        return model_fn(input=x, params=params)

    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((EXAMPLES, *x.shape), x.dtype), example)
    try:
        jaxpr, consts, _ = jaxprs.trace(function, params, batch)
    except Exception:
        return  # a model for batches of one size; any other error comes again when it is parsed
    inputs = len(jax.tree.leaves(batch))
    known = len(jaxpr.invars) - inputs
    try:
        found = follow(jaxpr, [None] * known + [Along(0)] * inputs)
    except (Mixed, Unknown) as error:
        reason, certain = str(error), isinstance(error, Mixed)
    else:
        if all(value in (None, Along(0)) for value in found):
            return
        reason, certain = "the output, which has no batch axis in front", True
    changed = others_change(function, params, batch, consts)
    if changed or (changed is None and certain):
        msg = (
            "`vmap_over_data=False` needs a model that treats the examples of a batch one by one; "
            f"in this one they depend on one another, through {reason}. Batch norm in training "
            f"mode does that: use the model's evaluation mode, {EVALUATION}."
        )
        raise ValueError(msg)


def others_change(
    function: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree, consts: PyTree
) -> bool | None:
    """Whether outputs change with the input of another example; None if that cannot be told."""
    rng = np.random.default_rng(0)

    def drawn(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return rng.normal(size=x.shape).astype(x.dtype)
        return rng.integers(0, 2, x.shape).astype(x.dtype)

    if jaxprs.is_traced(consts):
        return None
    unknown = jaxprs.is_traced(params) or any(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)
    )
    params = jax.tree.map(drawn, params) if unknown else params
    settled = False
    try:
        with jax.ensure_compile_time_eval():
            run = jax.jit(function)
            for trial in range(2 * EXAMPLES):
                others = np.arange(EXAMPLES) != trial % EXAMPLES
                first, new = jax.tree.map(drawn, batch), jax.tree.map(drawn, batch)
                second = jax.tree.map(functools.partial(kept_where, others), first, new)
                pair = [jax.tree.leaves(run(params, x)) for x in (first, second)]
                leaves = zip(*pair, strict=True)
                found = [(np.asarray(a)[others], np.asarray(b)[others]) for a, b in leaves]
                if not all(np.isfinite(x).all() for rest in found for x in rest):
                    continue
                settled = True
                if any(not np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in found):
                    return True
    except Exception:
        return None  # what cannot be run here, or has no batch axis in its output
    return False if settled else None


def kept_where(flags: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Examples as they were where flags say so, else new ones."""
    return np.where(flags.reshape(-1, *[1] * (old.ndim - 1)), old, new)


@dataclass(frozen=True)
class Loop:
    """A scan or while loop: where the examples of its carries lie, the same in every iteration."""

    body: Jaxpr
    fixed: list[Along | None]
    rest: list[Along | None]

    def settle(self, carries: list[Along | None]) -> tuple[list[Along | None], list[Along | None]]:
        """Carries that the body hands on as they come, and its other outputs."""
        while True:
            outputs = follow(self.body, [*self.fixed, *carries, *self.rest])
            new = [joined("a loop", *p) for p in zip(carries, outputs[: len(carries)], strict=True)]
            if new == carries:
                return carries, outputs[len(carries) :]
            carries = new


def follow(jaxpr: Jaxpr, values: Sequence[Along | None]) -> list[Along | None]:
    """Where the examples lie in the outputs, from where they lie in the inputs.

    Raises:
        Mixed: If an equation mixes examples.
        Unknown: If an equation may do so.
    """
    known: dict[Var, Along | None] = dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Var | Literal) -> Along | None:
        return None if isinstance(atom, Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if any(operands):
            known.update(zip(eqn.outvars, through(eqn, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def through(eqn: JaxprEqn, operands: list[Along | None]) -> list[Along | None]:
    """Where the examples lie in the outputs of an equation."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        scan = jaxprs.scan_parts(eqn)
        first_carry, first_x = scan.num_consts, scan.num_consts + scan.num_carry
        if any(x is not None and x.axis == 0 for x in operands[first_x:]):
            msg = "`scan` along the examples"
            raise Unknown(msg)
        rest = [x and x.moved(x.axis - 1) for x in operands[first_x:]]
        loop = Loop(scan.body, operands[:first_carry], rest)
        found, stacked = loop.settle(operands[first_carry:first_x])
        return [*found, *(x and x.moved(x.axis + 1) for x in stacked)]
    if name == "while":
        # The condition is of all examples, but what it decides is only when all have finished.
        first, second = params["cond_nconsts"], params["body_nconsts"]
        loop = Loop(opened(params["body_jaxpr"]), operands[first : first + second], [])
        return loop.settle(operands[first + second :])[0]
    if name == "cond":
        branches = [follow(opened(branch), operands[1:]) for branch in params["branches"]]
        return [joined("`cond`", *values) for values in zip(*branches, strict=True)]
    body = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
    if body is not None and len(opened(body).invars) == len(operands):
        return follow(opened(body), operands)
    return [rule_of(name)(eqn, operands)] * len(eqn.outvars)


def opened(body: object) -> Jaxpr:
    """The equations of a body; its constants hold no examples."""
    return jaxprs.open_jaxpr(body)[0]
