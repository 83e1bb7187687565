"""Jaxprs are read and evaluated as JAX does, on this version of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.extend.core import DropVar, Literal
from jax.sharding import AxisType, PartitionSpec

from laplax_kfac import jaxprs


def equations(function, *args):
    jaxpr, _, _ = jaxprs.trace(function, *args)
    return jaxpr, jaxpr.eqns


def run(jaxpr, args):
    """Evaluate a jaxpr one equation at a time with `jaxprs.evaluate`."""
    env = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outputs = jaxprs.evaluate(jaxpr, eqn, [read(a) for a in eqn.invars])
        assert len(outputs) == len(eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(a) for a in jaxpr.outvars]


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))


# -- trace -------------------------------------------------------------------------------------


def test_trace_has_one_input_a_leaf_and_the_outputs_structure():
    constant = np.arange(3.0)

    def function(params, x):
        return {"y": params["a"] * x + constant, "n": jnp.sum(params["b"])}

    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    jaxpr, consts, out = jaxprs.trace(function, params, jnp.ones(3))
    assert jaxpr.constvars == []
    assert [jaxprs.shape(v) for v in jaxpr.invars[len(consts) :]] == [(3,), (2, 2), (3,)]
    assert jax.tree.map(lambda o: o.shape, out) == {"y": (3,), "n": ()}
    args = [*consts, *jax.tree.leaves(params), jnp.ones(3)]
    np.testing.assert_array_equal(run(jaxpr, args)[1], 1.0 + constant)


def test_trace_drops_dead_equations_also_inside():
    @jax.jit
    def inner(x):
        return jnp.sin(x), jnp.cos(x)

    def function(x):
        jnp.exp(x)
        sine, _ = inner(x)
        return lax.scan(lambda c, _: ((c[0] * 2.0, jnp.tan(c[1])), None), (sine, x), length=2)[0][0]

    names = str(jaxprs.trace(function, X)[0])
    assert "sin" in names
    assert "mul" in names
    for dead in ("exp", "cos", "tan"):
        assert f" {dead} " not in names


def test_trace_keeps_inputs_that_are_not_used():
    jaxpr, _, _ = jaxprs.trace(lambda p, x: x + p["used"], {"idle": X, "used": X}, X)
    assert len(jaxpr.invars) == 3


def test_trace_takes_shapes():
    jaxpr, _, out = jaxprs.trace(jnp.sin, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert jaxprs.shape(jaxpr.invars[0]) == out.shape == (4,)


# -- atoms -------------------------------------------------------------------------------------


def test_sizes_of_variables_and_literals():
    jaxpr, (eqn,) = equations(lambda x: x * 2.0, X)
    variable, literal = eqn.invars
    assert isinstance(literal, Literal)
    assert (jaxprs.shape(variable), jaxprs.ndim(variable), jaxprs.size(variable)) == ((2, 3), 2, 6)
    assert (jaxprs.shape(literal), jaxprs.ndim(literal), jaxprs.size(literal)) == ((), 0, 1)
    np.testing.assert_array_equal(jaxprs.numbered(variable), [[0, 1, 2], [3, 4, 5]])
    assert jaxprs.consumers(jaxpr.eqns, jaxpr.outvars) == {variable: 1, eqn.outvars[0]: 1}


@pytest.mark.parametrize(
    ("dtype", "inexact"),
    [(jnp.float32, True), (jnp.bfloat16, True), (jnp.complex64, True), (jnp.int32, False),
     (jnp.bool_, False)],
)  # fmt: skip
def test_is_inexact(dtype, inexact):
    jaxpr, _, _ = jaxprs.trace(lambda x: x, jnp.zeros(2, dtype))
    assert jaxprs.is_inexact(jaxpr.invars[0]) is inexact


def test_keys_are_not_inexact():
    jaxpr, _, _ = jaxprs.trace(lambda k: jax.random.normal(k), jax.random.key(0))
    assert not jaxprs.is_inexact(jaxpr.invars[0])


def test_consumers_counts_every_read():
    jaxpr, _, _ = jaxprs.trace(lambda x, y: (x + x, x * y, y), X, X)
    counts = jaxprs.consumers(jaxpr.eqns, jaxpr.outvars)
    x, y = jaxpr.invars
    assert (counts[x], counts[y]) == (3, 2)
    assert all(counts[e.outvars[0]] == 1 for e in jaxpr.eqns)


def test_only_some_equations_have_a_derivative():
    def function(x):
        y = jnp.exp(x)
        levels = jnp.floor(2.0 * jnp.cos(y)).astype(jnp.int8).astype(x.dtype)
        return jnp.sin(y) + levels * lax.stop_gradient(jnp.tanh(y)), jnp.argmax(jnp.cosh(y))

    jaxpr, _, _ = jaxprs.trace(function, X)
    names = {eqn.primitive.name for eqn in jaxprs.with_derivative(jaxpr).values()}
    assert {"exp", "sin", "add"} <= names
    assert not {"cos", "tanh", "stop_gradient", "cosh", "argmax"} & names


# -- evaluate ----------------------------------------------------------------------------------


@jax.custom_jvp
def halved(x):
    return jnp.sin(x)


halved.defjvps(lambda t, _, x: 0.5 * t * jnp.cos(x))


def several(x, n):
    first, *_ = jnp.split(jax.jit(jnp.tanh)(x) * 2.0 + x, 3, axis=1)  # drops two outputs
    looped = lax.scan(lambda c, v: (c * v, c), first[0], x.T[0])[0]  # drops the stacked output
    chosen = lax.cond(n > 1, jnp.sin, lambda v: -v, looped)
    key = jax.random.fold_in(jax.random.key(0), n)
    return chosen, halved(x) + jax.random.normal(key, x.shape), jax.checkpoint(jnp.exp)(x)


def test_evaluate_is_what_jax_does():
    jaxpr, consts, _ = jaxprs.trace(several, X, 2)
    read = jaxprs.consumers(jaxpr.eqns, jaxpr.outvars)
    assert any(v not in read for e in jaxpr.eqns for v in e.outvars)
    assert any(isinstance(a, Literal) for e in jaxpr.eqns for a in e.invars)
    found = jax.jit(lambda *args: run(jaxpr, args))(*consts, X, 2)
    for ours, theirs in zip(found, jax.jit(several)(X, 2), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_outputs_that_nobody_reads_are_none():
    """`DropVar` is what some versions of JAX, or a transformation, put in place of a variable."""
    jaxpr, (eqn,) = equations(lambda x: jnp.split(x, 3, axis=1), X)
    first, second, third = eqn.outvars
    dropping = eqn.replace(outvars=[DropVar(first.aval), second, DropVar(third.aval)])
    found = jaxprs.evaluate(jaxpr.replace(eqns=[dropping]), dropping, [X])
    assert found[0] is None
    assert found[2] is None
    np.testing.assert_array_equal(found[1], X[:, 1:2])


def test_evaluate_takes_one_variable_in_two_places():
    jaxpr, (eqn,) = equations(lambda x: x * x, X)
    (found,) = jaxprs.evaluate(jaxpr, eqn, [X, X])
    np.testing.assert_array_equal(found, X * X)


def test_evaluate_keeps_rules_of_derivatives():
    jaxpr, (eqn,) = equations(halved, X)
    _, pullback = jax.vjp(lambda x: jaxprs.evaluate(jaxpr, eqn, [x])[0], X)
    np.testing.assert_allclose(pullback(jnp.ones_like(X))[0], 0.5 * jnp.cos(X), rtol=1e-6)


def test_evaluate_keeps_the_context_of_an_equation():
    def function(x):
        with jax.default_matmul_precision("highest"):
            return x @ x.T

    jaxpr, _, _ = jaxprs.trace(function, X)
    eqn = jaxpr.eqns[-1]
    again = jax.make_jaxpr(lambda a, b: jaxprs.evaluate(jaxpr, eqn, [a, b]))(X, X.T)
    assert again.eqns[-1].params["precision"] == eqn.params["precision"]
    assert "HIGHEST" in str(eqn.params["precision"])


# -- sub-jaxprs --------------------------------------------------------------------------------


def test_scan_parts():
    offset = jnp.asarray([1.0, 2.0, 3.0])

    def function(offset, carry, xs):
        def body(carry, x):
            total, product = carry
            return (total + jnp.sum(x * offset), product * total), x + offset

        return lax.scan(body, carry, xs, reverse=True)

    carry, xs = (jnp.asarray(0.5), jnp.asarray([2.0, 3.0])), jnp.ones((5, 3))
    jaxpr, _, _ = jaxprs.trace(function, offset, carry, xs)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    scan = jaxprs.scan_parts(eqn)
    assert (scan.num_consts, scan.num_carry, scan.length, scan.reverse) == (1, 2, 5, True)
    operands = [offset, *carry, xs[0]]
    assert [jaxprs.shape(v) for v in scan.body.invars] == [jnp.shape(v) for v in operands]
    assert len(scan.body.constvars) == len(scan.consts)
    total, product, y = jax.core.eval_jaxpr(scan.body, scan.consts, *operands)
    np.testing.assert_allclose(total, 6.5)
    np.testing.assert_allclose(product, [1.0, 1.5])
    np.testing.assert_allclose(y, [2.0, 3.0, 4.0])
    assert not any(scan.passes_carry(k) for k in range(3))


def test_scan_parts_passes_carry():
    """Of a body that hands one of its carries on; JAX itself makes constants of such carries."""
    body = jax.make_jaxpr(lambda c, kept, x: (c + x, kept, x))(1.0, 2.0, 3.0)
    parts = jaxprs.ScanParts(
        body.jaxpr, [], num_consts=0, num_carry=2, length=3, reverse=False
    )  # fmt: skip
    assert [parts.passes_carry(k) for k in range(3)] == [False, True, False]


def test_cond_branches():
    def function(n, x):
        return lax.switch(n, [jnp.sin, jnp.cos, lambda v: v * 3.0], x)

    jaxpr, _, _ = jaxprs.trace(function, 1, X)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    branches = jaxprs.cond_branches(eqn)
    found = [jax.core.eval_jaxpr(body, consts, X)[0] for body, consts in branches]
    for ours, theirs in zip(found, [jnp.sin(X), jnp.cos(X), X * 3.0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def linearly_solved(x):
    return lax.custom_linear_solve(lambda v: 2.0 * v, x, lambda _, b: b / 2.0)


def scaled_backwards(x):
    return linear_call(lambda _, x: x, lambda _, g: 10.0 * g, (), x)


def on_one_device(x):
    mesh = jax.make_mesh((1,), ("t",), (AxisType.Auto,), devices=jax.devices()[:1])
    return jax.shard_map(jnp.sin, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())(x)


CALLS = {
    "jit": jax.jit(jnp.sin),
    "nested_jit": jax.jit(jax.jit(lambda x: jnp.sin(x) * 2.0)),
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
}
NO_CALLS = {
    "sin": jnp.sin,
    "custom_jvp": halved,
    "custom_vjp": jax.custom_gradient(lambda x: (x * 2.0, lambda g: (g,))),
    "scan": lambda x: lax.scan(lambda c, _: (c * 2.0, None), x, length=2)[0],
    "while": lambda x: lax.while_loop(lambda v: jnp.sum(v) < 9.0, lambda v: v + 1.0, x),
    "cond": lambda x: lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x),
    "linear_solve": linearly_solved,
    "linear_call": scaled_backwards,
    "shard_map": on_one_device,
    "sort": lax.sort,
    "reduce": lambda x: lax.reduce(x, np.float32(0.0), lambda a, b: a + 2.0 * b, (0,)),
    "reduce_window": lambda x: lax.reduce_window(
        x, np.float32(0.0), lambda a, b: a + 2.0 * b, (1, 2), (1, 1), "VALID"
    ),
}


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS.keys())
def test_called_jaxpr_is_the_body(function):
    _, (eqn,) = equations(function, X)
    called = jaxprs.called_jaxpr(eqn)
    assert called is not None
    body, consts = called
    (found,) = jax.core.eval_jaxpr(body, consts, X)
    np.testing.assert_allclose(found, function(X), rtol=1e-6)


@pytest.mark.parametrize("function", NO_CALLS.values(), ids=NO_CALLS.keys())
def test_other_equations_are_no_calls(function):
    _, eqns = equations(function, X)
    assert all(jaxprs.called_jaxpr(eqn) is None for eqn in eqns)


def test_with_consts_makes_inputs_of_constants():
    constant = jnp.arange(3.0)
    body, consts = jaxprs.open_jaxpr(jax.make_jaxpr(lambda x: x * constant)(X))
    flat = jaxprs.with_consts(body)
    assert flat.constvars == []
    (found,) = jax.core.eval_jaxpr(flat, [], *consts, X)
    np.testing.assert_array_equal(found, X * constant)


# -- loops without a fixed number of iterations ------------------------------------------------


def while_operands(function):
    jaxpr, _, _ = jaxprs.trace(function, 1.0, 2.0)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "while"]
    return jaxprs.differentiated_in_while(jaxpr, eqn)


def test_only_what_moves_a_loops_output_has_a_derivative():
    def constant_of_the_condition(w, x):
        return lax.while_loop(lambda c: c < w, lambda c: c * x, x)

    def carry_of_the_condition(w, x):
        return lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] * x, 2.0 * c[1]), (x, w))[0]

    def carry_that_feeds_another(w, x):
        def body(c):
            return c[1], c[2] * x, c[2]

        return lax.while_loop(lambda c: c[0] < 9.0, body, (x, x, w))[0]

    # Operands are the condition's constants, the body's, and the carries.
    assert while_operands(constant_of_the_condition) == [False, True, True]
    assert while_operands(carry_of_the_condition) == [True, True, False]
    assert while_operands(carry_that_feeds_another) == [True, True, True, True]
