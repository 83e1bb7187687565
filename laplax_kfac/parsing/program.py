"""From a model to its program: the traced jaxpr, and the layers found in it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike
from jaxtyping import PyTree

from laplax_kfac import jaxprs, meshes
from laplax_kfac.parsing import made_weights
from laplax_kfac.parsing.biases import Bias
from laplax_kfac.parsing.complex_weights import with_real_weights
from laplax_kfac.parsing.expansion import expanded
from laplax_kfac.parsing.grouping import Resolved, resolve, resolve_entries
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.model_calls import ModelFn as ModelFn
from laplax_kfac.parsing.model_calls import call
from laplax_kfac.parsing.model_calls import require_model as require_model
from laplax_kfac.parsing.products import Product
from laplax_kfac.parsing.selection import Selection
from laplax_kfac.parsing.steps import Given, Scope
from laplax_kfac.parsing.uses import Findings, Use
from laplax_kfac.parsing.values import PARAMETERS, Symbolic, Value, constant
from laplax_kfac.parsing.walk import walk

ALL = Selection()


@dataclass(frozen=True)
class Program:
    """A model traced for one example, and its layers.

    Attributes:
        jaxpr: Inputs are the constants, then the leaves of the parameters as real numbers, then
            those of the example; every equation matters for the output.
        consts: Arrays that the model closes over.
        space: Structure of the parameters.
        resolved: The layers, and how their statistics are read.
        uses: The uses that the layers' members refer to, by number.
        custom_vjp: Whether the model has derivative rules that may not be linear in the cotangent.
        selection: Which parameters are covered, and how.
        output: The model's output for one example, as a pytree of ``jax.ShapeDtypeStruct``.
    """

    jaxpr: Jaxpr
    consts: list[ArrayLike]
    space: ParameterSpace
    resolved: tuple[Resolved, ...]
    uses: dict[int, Use]
    custom_vjp: bool
    selection: Selection
    output: PyTree

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, ordered by their first parameter."""
        return tuple(r.layer for r in self.resolved)

    @property
    def input_ranks(self) -> tuple[int, ...]:
        """How many axes the arrays of the example have."""
        before = len(self.consts) + len(self.space.shapes)
        return tuple(map(jaxprs.ndim, self.jaxpr.invars[before:]))


def per_example(model_fn: ModelFn, *, vmap_over_data: bool) -> Callable[[PyTree, PyTree], PyTree]:
    """The model as a function of (params, one example without a batch axis)."""
    if vmap_over_data:
        return meshes.on_any_axes(functools.partial(call, model_fn, batched=False))

    def single(params: PyTree, x: PyTree) -> PyTree:
        out = call(model_fn, params, jax.tree.map(lambda a: a[None], x), batched=True)
        return jax.tree.map(lambda a: a[0], out)

    return meshes.on_any_axes(single)


def parse(
    model_fn: ModelFn,
    params: PyTree,
    example: PyTree,
    *,
    vmap_over_data: bool = True,
    selection: Selection = ALL,
) -> Program:
    """Trace a model for one example and find its layers.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters; only shapes and dtypes matter.
        example: One input, without a batch axis; only shapes and dtypes matter.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        selection: Which parameters are covered, and how.

    Raises:
        ValueError: If parameters are used inside a while loop, if there are none, if some have no
            Kronecker form and their fallback is ``"error"``, or if a pattern matches none.
        TypeError: If the model fails on the example, or its output has no derivative.
    """
    space = ParameterSpace.of(params)
    trainable = [jnp.issubdtype(dtype, jnp.inexact) for dtype in space.dtypes]
    selection.check_paths(space.names, trainable)
    function = per_example(model_fn, vmap_over_data=vmap_over_data)
    jaxpr, consts, output = jaxprs.trace(function, params, example)
    jaxpr, consts = expanded(jaxpr, consts)
    covered = [selection.covers(name) for name in space.names]
    jaxpr, consts = with_real_weights(jaxpr, consts, covered)
    findings = _find(jaxpr, consts, space, covered)
    if selection.last_layer:
        covered = _of_last_layer(findings, space)
        names = {name for name, used in zip(space.names, covered, strict=True) if used}
        selection = replace(selection, params_filter=lambda path: path in names)
        findings = _find(jaxpr, consts, space, covered)
    if selection.by_entries:
        resolved = resolve_entries(space, covered, selection)
    else:
        resolved = resolve(findings, space, selection)
    used = {number for r in resolved for m in r.members for number in m.claim.used}
    uses = {number: findings.uses[number] for number in used}
    custom_vjp = jaxprs.has_custom_vjp(jaxpr)
    return Program(jaxpr, consts, space, resolved, uses, custom_vjp, selection, output)


def _find(
    jaxpr: Jaxpr, consts: list[Any], space: ParameterSpace, covered: Sequence[bool]
) -> Findings:
    """Walk the jaxpr with the leaves that are covered."""
    findings = Findings()
    values = _initial_values(jaxpr, consts, space, covered)
    types = list(map(jaxprs.spec, jaxpr.invars[: len(consts) + len(covered)]))
    given = Given(space, consts, types, list)
    for value in walk(jaxpr, values, Scope(findings, given=given)):
        findings.mark(value, "direct", "is part of the output itself")
        for ending in made_weights.endings_of([value]):
            findings.end(ending)
    return findings


def _of_last_layer(findings: Findings, space: ParameterSpace) -> list[bool]:
    """The leaves of the last weight in the jaxpr, and of what is added to its output."""
    weights = [k for k, use in enumerate(findings.uses) if not isinstance(use.role, Bias | Product)]
    if not weights:
        msg = "`params_filter='last_layer'` needs a layer with a weight; the model has none."
        raise ValueError(msg)
    ids = [findings.uses[weights[-1]].role.view.ids]
    roles = [use.role for use in findings.uses]
    biases = [r for r in roles if isinstance(r, Bias) and r.output is not None]
    ids += [r.weight.ids for r in biases if r.output and r.output.source == weights[-1]]
    leaves = {leaf for i in ids for leaf in space.leaves_of(i)}
    return [leaf in leaves for leaf in range(len(space.names))]


def _initial_values(
    jaxpr: Jaxpr, consts: list[Any], space: ParameterSpace, covered: Sequence[bool]
) -> list[Value]:
    constants: list[Value] = [constant(c) for c in consts]
    leaves: list[Value] = [
        Symbolic(PARAMETERS, space.leaf_ids(leaf))
        if covered[leaf]
        and jnp.issubdtype(space.dtypes[leaf], jnp.inexact)
        and 0 not in space.shapes[leaf]
        else None
        for leaf in range(len(space.shapes))
    ]
    rest = len(jaxpr.invars) - len(constants) - len(leaves)
    return [*constants, *leaves, *[None] * rest]
