"""From a model to its program: the traced jaxpr, and the layers found in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Jaxpr
from jaxtyping import Array, PyTree

from laplax_kfac import jaxprs
from laplax_kfac.layers import Layer
from laplax_kfac.layout import ParameterSpace
from laplax_kfac.resolve import Resolved, resolve
from laplax_kfac.walk import PARAMETERS, Findings, Scope, Trace, Use, Value, constant, walk

ModelFn = Callable[..., PyTree]


@dataclass(frozen=True)
class Program:
    """A model traced for one example, and its layers.

    Attributes:
        jaxpr: Inputs are the constants, then the leaves of the parameters, then those of the
            example; every equation matters for the output.
        consts: Arrays that the model closes over.
        space: Structure of the parameters.
        resolved: The layers, and how their statistics are read.
        uses: The uses that the layers' members refer to.
        output: The model's output for one example, as a pytree of ``jax.ShapeDtypeStruct``.
    """

    jaxpr: Jaxpr
    consts: list[Array]
    space: ParameterSpace
    resolved: tuple[Resolved, ...]
    uses: tuple[Use, ...]
    output: PyTree

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, ordered by their first parameter."""
        return tuple(r.layer for r in self.resolved)


def per_example(model_fn: ModelFn, *, vmap_over_data: bool) -> Callable[[PyTree, PyTree], PyTree]:
    """The model as a function of (params, one example without a batch axis)."""
    if vmap_over_data:
        return lambda params, x: model_fn(input=x, params=params)

    def single(params: PyTree, x: PyTree) -> PyTree:
        out = model_fn(input=jax.tree.map(lambda a: a[None], x), params=params)
        return jax.tree.map(lambda a: a[0], out)

    return single


def parse(
    model_fn: ModelFn,
    params: PyTree,
    example: PyTree,
    *,
    vmap_over_data: bool = True,
    separate_weight_and_bias: bool = False,
) -> Program:
    """Trace a model for one example and find its layers.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters; only shapes and dtypes matter.
        example: One input, without a batch axis; only shapes and dtypes matter.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        separate_weight_and_bias: Whether biases get blocks of their own.

    Raises:
        ValueError: If parameters are used inside a while loop, or the parameters are empty.
    """
    space = ParameterSpace.of(params)
    function = per_example(model_fn, vmap_over_data=vmap_over_data)
    jaxpr, consts, output = jaxprs.trace(function, params, example)
    findings = Findings()
    values = _initial_values(jaxpr, consts, space)
    for value in walk(jaxpr, values, Scope(findings)):
        findings.mark(value, "direct", "is part of the output itself")
    resolved = resolve(findings, space, separate_weight_and_bias=separate_weight_and_bias)
    return Program(jaxpr, consts, space, resolved, tuple(findings.uses), output)


def _initial_values(jaxpr: Jaxpr, consts: list[Any], space: ParameterSpace) -> list[Value]:
    constants: list[Value] = [constant(c) for c in consts]
    first = len(consts)
    leaves: list[Value] = [
        Trace(PARAMETERS, space.leaf_ids(k)) if jaxprs.is_inexact(jaxpr.invars[first + k]) else None
        for k in range(len(space.shapes))
    ]
    rest = len(jaxpr.invars) - len(constants) - len(leaves)
    return [*constants, *leaves, *[None] * rest]
