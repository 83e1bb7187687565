"""One forward pass, R pullbacks: the inputs of every layer and the cotangents at its outputs.

The program's jaxpr is evaluated with a zero, the *probe*, added to the output of every use and to
every parameter without a Kronecker form. One ``jax.vjp`` with respect to all probes, vmapped over
the R vectors at the model's output, gives the cotangents; no gradient of a Kronecker layer's
parameters is ever formed. Equations without a use inside are evaluated by JAX as they stand.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from laplax_kfac import jaxprs, pytrees
from laplax_kfac.capture.batches import Batch, as_batch, batch_size, first_example, to_arrays
from laplax_kfac.capture.rewrites import has_rewrite, rewrite
from laplax_kfac.fisher import Columns, fisher_type_of
from laplax_kfac.likelihood.named import resolve_likelihood
from laplax_kfac.parsing.claims import Part
from laplax_kfac.parsing.grouping import Member, Resolved
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.program import ModelFn, Program, parse
from laplax_kfac.parsing.uses import Use
from laplax_kfac.patterns import one_hot

Probes = dict[int, Array]
Inputs = dict[int, tuple[ArrayLike, Array, tuple[ArrayLike, ...]]]
"""Use -> its inputs, 1 where its equation ran, and what sums of inputs are formed from, if so."""


@pytrees.register
@dataclass(frozen=True)
class UseRecord:
    """What one use of a layer saw for one example.

    Attributes:
        inputs: Layer inputs a, shape (S, stack, rows); a joint bias is the last row. Row numbers
            (S, stack, 1) where the use is indexed, -1 for none: they stand for one-hot inputs.
        gradients: Cotangents g of the layer's output, shape (R, S, stack, out).
        active: 1 where the use was evaluated, 0 where a cond did not take it; (S, stack).
        operands: The equation's other operands, where sums of inputs are formed from them.
    """

    inputs: Shaped[Array, "*batch S stack _"]
    gradients: Float[Array, "*batch R S stack out"]
    active: Float[Array, "*batch S stack"]
    operands: tuple[ArrayLike, ...] = ()


@pytrees.register
@dataclass(frozen=True)
class ParameterRecord:
    """What a probe on parameters saw for one example.

    Attributes:
        gradients: Cotangents of the parameters: the exact per-example gradients, (R, p).
    """

    gradients: Float[Array, "*batch R p"]


Record = tuple[UseRecord, ...] | ParameterRecord | None


def capture(
    program: Program,
    leaves: Sequence[Array],
    consts: Sequence[ArrayLike],
    example: PyTree,
    vectors: Callable[[PyTree], PyTree] | None,
    *,
    by_units: bool = False,
    sequential: bool = False,
) -> tuple[PyTree, list[Record]]:
    """Evaluate the model on one example and pull ``vectors(output)`` back to all layers.

    Args:
        program: The parsed model.
        leaves: Leaves of the parameters.
        consts: Values of ``program.consts``.
        example: One input without a batch axis.
        vectors: Output -> R vectors like the output, stacked in front; None pulls nothing back:
            the records then have R = 0.
        by_units: Whether to pull the unit vectors back and to combine the results. That makes a
            difference only for rules that are not linear: then it defines the Jacobian.
        sequential: Whether to pull them back one after another, not vmapped.

    Returns:
        The model's output, and for every layer what its uses, or its parameters, saw; None for a
        layer that does not influence the output.
    """
    plan = _plan(program)
    treedef = jax.tree.structure(program.output)

    def forward(probes: tuple[Probes, Probes]) -> tuple[list[Array], Inputs]:
        at_uses, at_parameters = probes
        moved = _add_probes(program, leaves, at_parameters)
        arguments = [*consts, *moved, *jax.tree.leaves(example)]
        return run(program.jaxpr, arguments, plan, at_uses)

    zeros = (_use_probes(program), _parameter_probes(program))
    if vectors is None:
        outputs, inputs = forward(zeros)
        none = jax.tree.map(lambda zero: jnp.zeros((0, *zero.shape), zero.dtype), zeros)
        return jax.tree.unflatten(treedef, outputs), _records(program, inputs, *none)
    outputs, pullback, inputs = jax.vjp(forward, zeros, has_aux=True)
    output = jax.tree.unflatten(treedef, outputs)
    wanted = jax.tree.leaves(vectors(output))
    pulled = jax.tree.leaves(unit_vectors(output)) if by_units else wanted
    cotangents = [_cotangent(v, o) for v, o in zip(pulled, outputs, strict=True)]
    if sequential:
        ((at_uses, at_parameters),) = lax.map(pullback, cotangents)
    elif len(pulled[0]) == 1:  # on a CPU, reductions beside an axis of one entry are slow
        (single,) = pullback([c.reshape(c.shape[1:]) for c in cotangents])
        at_uses, at_parameters = jax.tree.map(lambda g: g[None], single)
    else:
        ((at_uses, at_parameters),) = jax.vmap(pullback)(cotangents)
    if by_units:
        mix = jnp.concatenate([v.reshape(len(v), -1) for v in wanted], axis=1)  # (R, C)
        at_uses, at_parameters = jax.tree.map(
            lambda g: jnp.tensordot(mix.astype(g.dtype), g, 1, precision=lax.Precision.HIGHEST),
            (at_uses, at_parameters),
        )
    return output, _records(program, inputs, at_uses, at_parameters)


def unit_vectors(output: PyTree) -> PyTree:
    """The unit vectors at an output, stacked in front."""
    leaves, treedef = jax.tree.flatten(output)
    ends = np.cumsum([x.size for x in leaves])
    columns = jnp.split(jnp.eye(int(ends[-1])), ends[:-1], axis=1)
    parts = [c.reshape(-1, *x.shape) for c, x in zip(columns, leaves, strict=True)]
    return jax.tree.unflatten(treedef, parts)


def record_size(layer: Layer, pulled: int, *, inputs: bool = True) -> int:
    """Numbers that the record of one layer holds for one example.

    Args:
        layer: The layer.
        pulled: The number R of columns.
        inputs: Whether those of its inputs count.
    """
    gradients = 0 if layer.block == "none" else pulled * layer.size
    if not layer.is_matrix:
        return gradients
    rows = 1 if layer.pattern == "embedding" else layer.rows
    each = (rows if inputs else 0) + pulled * layer.out_features
    uses = layer.positions * layer.stack * each
    return uses + (gradients if layer.block == "dense" else 0)


def _cotangent(vector: Array, output: Array) -> Array | np.ndarray:
    if jnp.issubdtype(output.dtype, jnp.inexact):
        return vector.astype(output.dtype)
    return np.zeros(vector.shape, jax.dtypes.float0)


# -- probes ------------------------------------------------------------------------------------


def _probe_of(program: Program, use: int) -> int:
    """Uses of one equation (a product of two parameters) share the probe at its output."""
    site = program.uses[use].site
    return min(number for number, use in program.uses.items() if use.site == site)


def _members(program: Program) -> list[Member]:
    return [m for r in program.resolved for m in r.members]


def _use_probes(program: Program) -> Probes:
    probes = {}
    for member in _members(program):
        use = program.uses[member.claim.use]
        output: Any = use.eqn.outvars[0].aval
        shape = (*use.lanes, *output.shape)
        probes[_probe_of(program, member.claim.use)] = jnp.zeros(shape, output.dtype)
    return probes


def _is_probed(resolved: Resolved) -> bool:
    return resolved.layer.block in ("dense", "diagonal") and not resolved.members


def _parameter_probes(program: Program) -> Probes:
    dtype = dict(zip(program.space.paths, program.space.dtypes, strict=True))
    return {
        number: jnp.zeros(resolved.layer.size, dtype[resolved.layer.params[0]])
        for number, resolved in enumerate(program.resolved)
        if _is_probed(resolved)
    }


def _add_probes(program: Program, leaves: Sequence[Array], probes: Probes) -> list[Array]:
    space, moved = program.space, list(leaves)
    for number, probe in probes.items():
        ids = space.ids(program.layers[number].segments[0])
        leaf = space.leaf_at(int(ids[0]))
        if ids.size == moved[leaf].size:
            moved[leaf] = moved[leaf] + probe.reshape(moved[leaf].shape)
        else:
            flat = moved[leaf].reshape(-1).at[ids - space.offsets[leaf]].add(probe)
            moved[leaf] = flat.reshape(moved[leaf].shape)
    return moved


# -- records -----------------------------------------------------------------------------------


def _records(
    program: Program, inputs: Inputs, at_uses: Probes, at_parameters: Probes
) -> list[Record]:
    records: list[Record] = []
    for number, resolved in enumerate(program.resolved):
        if resolved.members:
            records.append(
                tuple(_use_record(program, m, inputs, at_uses) for m in resolved.members)
            )
        elif number in at_parameters:
            records.append(ParameterRecord(at_parameters[number]))
        else:
            records.append(None)
    return records


def _use_record(program: Program, member: Member, inputs: Inputs, at_uses: Probes) -> UseRecord:
    claim, use = member.claim, program.uses[member.claim.use]
    found, active, operands = inputs[claim.use]
    values = jnp.asarray(found)
    positions = use.pattern.outputs(
        use.eqn, use.operand, np.empty(jaxprs.shape(use.eqn.outvars[0]), bool)
    ).shape[0]
    active = jnp.broadcast_to(active[..., None], (*use.lanes, positions, values.shape[-2], 1))
    gradients = at_uses[_probe_of(program, claim.use)]
    outputs = lambda g: use.pattern.outputs(use.eqn, use.operand, g)  # noqa: E731
    for _ in range(1 + len(use.lanes)):
        outputs = jax.vmap(outputs)
    a = values if claim.bias is None else claim.bias * active.astype(values.dtype)
    a, active = _canonical(a, claim.shared), _canonical(active, claim.shared)
    g = jax.vmap(lambda x: _canonical(x, claim.shared))(outputs(gradients))
    if claim.part is not None:
        a, g = _in_part(claim.part, use, a), _features(g, claim.part[1])
    if use.pattern.active is not None:
        g = g * active.astype(g.dtype)
    if claim.input_scale is not None and claim.indexed:
        rows = jnp.asarray(claim.input_scale, g.dtype)  # (stack, rows)
        g = g * jnp.take_along_axis(rows, a[..., 0].T, axis=1).T[..., None]
    elif claim.input_scale is not None:
        a = a * jnp.asarray(claim.input_scale, a.dtype)
    if claim.output_scale is not None:
        g = g * jnp.asarray(claim.output_scale, g.dtype)
    if member.joint_bias is not None:
        a = jnp.concatenate([a, member.joint_bias * active.astype(a.dtype)], axis=-1)
    return UseRecord(a, g, active[..., 0], operands)


def _in_part(part: Part, use: Use, inputs: Array) -> Array:
    """The inputs of a part of a weight; row numbers are counted in the part, -1 for other rows."""
    rows, _ = part
    if not use.pattern.indexed:
        return _features(inputs, rows)
    numbers = np.full(use.ids.shape[-2] + 1, -1)  # the last is that of -1
    numbers[rows] = np.arange(rows.size)
    return jnp.asarray(numbers, inputs.dtype)[inputs]


def _features(x: Array, index: Int[np.ndarray, " n"]) -> Array:
    """Some entries along the last axis; mostly neighbours, which a slice takes without a search."""
    first, last = int(index[0]), int(index[-1])
    return x[..., first : last + 1] if last - first + 1 == index.size else x[..., index]


def _canonical(x: Array, shared: tuple[bool, ...]) -> Array:
    """(*lanes, positions, stack, features) -> (S, stack, features).

    Lanes and stack axes along which the weight is shared become positions, the others stack.
    """
    lanes = len(shared) - 1
    axes = [*range(lanes), lanes + 1]  # of shared; axis `lanes` holds the pattern's positions
    along = [axis for axis, s in zip(axes, shared, strict=True) if s]
    stacked = [axis for axis, s in zip(axes, shared, strict=True) if not s]
    order = [*(a for a in along if a < lanes), lanes, *(a for a in along if a > lanes)]
    x = x.transpose(*order, *stacked, x.ndim - 1)
    positions = int(np.prod(x.shape[: len(order)]))
    return x.reshape(positions, -1, x.shape[-1])


# -- the evaluator -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The equations of one jaxpr that need more than plain evaluation.

    Attributes:
        uses: Equation number -> (number, use) of the uses of that equation.
        probes: Equation number -> number of the probe at its output.
        inside: Equation number -> sub-jaxpr number -> plan of the sub-jaxpr.
    """

    uses: dict[int, list[tuple[int, Use]]]
    probes: dict[int, int]
    inside: dict[int, dict[int, "Plan"]]

    def all_probes(self) -> list[int]:
        """Numbers of the probes here and inside."""
        nested = [
            p for plans in self.inside.values() for q in plans.values() for p in q.all_probes()
        ]
        return [*self.probes.values(), *nested]


def _plan(program: Program) -> Plan:
    root = Plan({}, {}, {})
    for number in sorted({m.claim.use for m in _members(program)}):
        use, plan = program.uses[number], root
        *path, last = use.site
        for equation, branch in zip(path[::2], path[1::2], strict=True):
            plans = plan.inside.setdefault(equation, {})
            plan = plans.setdefault(branch, Plan({}, {}, {}))
        plan.uses.setdefault(last, []).append((number, use))
        plan.probes[last] = _probe_of(program, number)
    _enter_rewrites(program.jaxpr, root)
    return root


def _enter_rewrites(jaxpr: Jaxpr, plan: Plan) -> None:
    """Plan to enter bodies without uses, too, where a better way to evaluate them is inside."""
    for number, eqn in enumerate(jaxpr.eqns):
        for branch, body in enumerate(jaxprs.bodies(eqn)):
            if has_rewrite(body):
                inside = plan.inside.setdefault(number, {}).setdefault(branch, Plan({}, {}, {}))
                _enter_rewrites(body, inside)


def run(
    jaxpr: Jaxpr, arguments: Sequence[Any], plan: Plan, probes: Probes
) -> tuple[list[Any], Inputs]:
    """Evaluate a jaxpr, adding probes to the outputs of uses and keeping the uses' inputs."""
    env: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
    inputs: Inputs = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(a) for a in eqn.invars]
        if number in plan.inside:
            outputs, found = _run_nested(eqn, values, plan.inside[number], probes)
            inputs |= found
        else:
            better = rewrite(eqn, layer=number in plan.uses)
            outputs = better(values) if better else jaxprs.evaluate(jaxpr, eqn, values)
        for key, use in plan.uses.get(number, []):
            others = tuple(v for k, v in enumerate(values) if k != use.operand)
            active = use.pattern.active or _always
            inputs[key] = (
                use.pattern.inputs(eqn, use.operand, others),
                active(eqn, use.operand, others),
                others if use.moments else (),
            )
        if number in plan.probes:
            outputs[0] = outputs[0] + probes[plan.probes[number]]
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(a) for a in jaxpr.outvars], inputs


def _always(_: JaxprEqn, __: int, ___: tuple[Any, ...]) -> Array:
    return jnp.ones((1, 1))


def _run_nested(
    eqn: JaxprEqn, values: list[Any], plans: dict[int, Plan], probes: Probes
) -> tuple[list[Any], Inputs]:
    """Evaluate an equation with uses in its sub-jaxprs."""
    name = eqn.primitive.name
    if name == "scan":
        return _run_scan(eqn, values, plans[0], probes)
    if name == "cond":
        return _run_cond(eqn, values, plans, probes)
    called = jaxprs.called_jaxpr(eqn)
    assert called is not None
    body, consts = called
    mine = {p: probes[p] for p in plans[0].all_probes()}

    def call(values: list[Any], probes: Probes) -> tuple[list[Any], Inputs]:
        return run(jaxprs.with_consts(body), [*consts, *values], plans[0], probes)

    if name in jaxprs.REMAT:
        options = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
        return jax.checkpoint(call, **options)(values, mine)
    return call(values, mine)


def _run_scan(
    eqn: JaxprEqn, values: list[Any], plan: Plan, probes: Probes
) -> tuple[list[Any], Inputs]:
    """Probes go in as scanned inputs, the uses' inputs come out stacked."""
    scan = jaxprs.scan_parts(eqn)
    body = jaxprs.with_consts(scan.body)
    first_x = scan.num_consts + scan.num_carry
    fixed = [*scan.consts, *values[: scan.num_consts]]

    def step(carry: list[Any], xs: tuple[list[Any], Probes]) -> tuple[list[Any], Any]:
        outs, inputs = run(body, [*fixed, *carry, *xs[0]], plan, xs[1])
        return outs[: scan.num_carry], (outs[scan.num_carry :], inputs)

    mine = {p: probes[p] for p in plan.all_probes()}
    carry, (ys, inputs) = lax.scan(
        step,
        values[scan.num_consts : first_x],
        (values[first_x:], mine),
        length=scan.length,
        reverse=scan.reverse,
        unroll=eqn.params.get("unroll", 1),
    )
    return [*carry, *ys], inputs


def _run_cond(
    eqn: JaxprEqn, values: list[Any], plans: dict[int, Plan], probes: Probes
) -> tuple[list[Any], Inputs]:
    """Uses in branches that are not taken have zero inputs and are not active."""
    index, *operands = values
    branches = jaxprs.cond_branches(eqn)

    def branch(k: int) -> Callable[..., tuple[list[Any], Inputs]]:
        body, consts = branches[k]
        plan = plans.get(k, Plan({}, {}, {}))
        return lambda ops, probes: run(jaxprs.with_consts(body), [*consts, *ops], plan, probes)

    mine = {p: probes[p] for plan in plans.values() for p in plan.all_probes()}
    calls = [branch(k) for k in range(len(branches))]
    found = [jax.eval_shape(call, operands, mine)[1] for call in calls]
    everything = {use: shape for shapes in found for use, shape in shapes.items()}

    def padded(call: Callable[..., tuple[list[Any], Inputs]]) -> Callable[..., Any]:
        def evaluate(ops: list[Any], probes: Probes) -> tuple[list[Any], Inputs]:
            outs, inputs = call(ops, probes)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), everything)
            return outs, {**zeros, **inputs}

        return evaluate

    return lax.switch(index, [padded(c) for c in calls], operands, mine)


# -- batches -----------------------------------------------------------------------------------


def capture_batch(
    program: Program,
    values: tuple[Sequence[Array], Sequence[ArrayLike]],
    batch: Batch,
    columns: Columns,
    *,
    key: Key[Array, ""],
    window: tuple[Int[Array, ""], int] | None = None,
) -> list[Record]:
    """`capture` every example of a batch; the records' leaves get a leading axis N.

    With a window (first column, number) only these columns are pulled back; zeros beyond the last.
    """
    leaves, consts = values

    def one(
        example: tuple[PyTree, PyTree, Key[Array, ""]], *, sequential: bool = False
    ) -> list[Record]:
        x, y, key = example

        def vectors(f: PyTree) -> PyTree:
            everything = columns.vectors(key, f, y)
            return everything if window is None else _in_window(everything, *window)

        by_units = program.custom_vjp and columns.are_root(program.output, y)
        pulled = vectors if columns.pull_back else None
        return capture(
            program, leaves, consts, x, pulled, by_units=by_units, sequential=sequential
        )[1]

    keys = jax.random.split(key, batch_size(batch))
    return map_examples(one, (batch["input"], batch["target"], keys))


def _in_window(vectors: PyTree, first: Int[Array, ""], number: int) -> PyTree:
    def cut(v: Float[Array, "R *output"]) -> Float[Array, "number *output"]:
        padded = jnp.pad(v, [(0, number), *[(0, 0)] * (v.ndim - 1)])
        return lax.dynamic_slice_in_dim(padded, first, number)

    return jax.tree.map(cut, vectors)


def map_examples(
    function: Callable[..., Any], examples: PyTree, batch_size: int | None = None
) -> Any:
    """Vmap a function of one example; loop where a primitive of the model has no vmap rule.

    Args:
        function: Takes an example, and whether to do without vmap itself as ``sequential``.
        examples: Examples stacked in front.
        batch_size: Most examples that are vmapped at once; all by default.
    """
    try:
        if batch_size is not None:
            return lax.map(function, examples, batch_size=batch_size)
        return jax.vmap(function)(examples)
    except NotImplementedError:
        return lax.map(functools.partial(function, sequential=True), examples)


@pytrees.register
@dataclass(frozen=True)
class LayerRecord:
    """Inputs and output gradients of one layer, for every example.

    Attributes:
        inputs: Layer inputs, shape (N, S, in); (N, S, stack, in) for a stack of layers. Without
            the trailing 1 that stands for a joint bias.
        gradients: Gradients of each example's loss at the layer's output, (N, S, out) or
            (N, S, stack, out). S counts the positions that the weight is shared over; those of
            several uses of one weight are concatenated.
    """

    inputs: Float[Array, "N S *stack in"]
    gradients: Float[Array, "N S *stack out"]


def intermediates_and_gradients(
    model_fn: ModelFn,
    params: PyTree,
    data: Any,
    *,
    loss_fn: Any,
    vmap_over_data: bool = True,
) -> dict[str, LayerRecord]:
    """Inputs of every Kronecker layer and loss gradients at its output.

    For every layer ``sum_s inputs[n, s] gradients[n, s]^T`` is the gradient of example n's loss in
    the weight, viewed as an (in, out) matrix, and ``sum_s gradients[n, s]`` that in a joint bias.
    Works under ``jit`` and ``vmap``.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters.
        data: One batch: ``(input, target)`` or ``{"input": ..., "target": ...}``; weights of
            examples play no part.
        loss_fn: A laplax ``LossFn``, its string, or a callable ``loss(output, target)`` of one
            example; the gradients are those of its value at the observed target.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.

    Returns:
        Layer name -> record. Parameters without a Kronecker form have no record: `find_layers`
        says which and why.

    Raises:
        TypeError: If ``data`` is not one batch.
        ValueError: If the batch, the loss or the model is not of a supported form.
    """
    batch = to_arrays(as_batch(data))
    program = parse(
        model_fn, params, first_example(batch), vmap_over_data=vmap_over_data,
    )  # fmt: skip
    records = capture_batch(
        program,
        (jax.tree.leaves(params), program.consts),
        batch,
        Columns(resolve_likelihood(loss_fn), fisher_type_of("empirical")),
        key=jax.random.key(0),
    )
    return {
        resolved.layer.name: _layer_record(resolved, record)
        for resolved, record in zip(program.resolved, records, strict=True)
        if isinstance(record, tuple)
    }


def _layer_record(resolved: Resolved, record: tuple[UseRecord, ...]) -> LayerRecord:
    layer = resolved.layer
    inputs, gradients = [], []
    for member, use in zip(resolved.members, record, strict=True):
        a, g = use.inputs, use.gradients[:, 0]
        if member.claim.indexed:
            a = one_hot(a, member.claim.ids.shape[1], g.dtype)
        if member.claim.transposed:
            a, g = g, a
        inputs.append(a[..., : layer.in_features])
        gradients.append(g)
    a, g = jnp.concatenate(inputs, axis=1), jnp.concatenate(gradients, axis=1)
    return LayerRecord(a, g) if layer.stack > 1 else LayerRecord(a[:, :, 0], g[:, :, 0])
