"""A symbolic array is a Jacobian: entry i is a constant plus scale[i] times entry index[i]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.symbolic import traced

from laplax_kfac import jaxprs
from laplax_kfac.parsing.index_rules import SELECTIONS
from laplax_kfac.parsing.steps import Scope
from laplax_kfac.parsing.uses import Findings
from laplax_kfac.parsing.values import FOREIGN, PARAMETERS, Symbolic, constant
from laplax_kfac.parsing.walk import walk

pytestmark = pytest.mark.usefixtures("x64")

KEPT = np.asarray([[True, False, True], [False, True, True]])
OTHER = np.arange(6.0).reshape(2, 3)


@jax.custom_vjp
def doubled_backwards(x):
    return jnp.sign(x)


doubled_backwards.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (2.0 * g,))


FUNCTIONS = {
    "gather": lambda x: x[np.asarray([1, 1, 0]), np.asarray([2, 0, 1])],
    "gather_clipped": lambda x: jnp.take(x, np.asarray([9]), axis=1, mode="clip"),
    "gather_filled": lambda x: x.at[np.asarray([1, 5])].get(mode="fill", fill_value=7.0),
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (1, 1), (1, 2)),
    "pad": lambda x: lax.pad(x, 7.0, ((1, 0, 1), (-1, 2, 0))),
    "where": lambda x: jnp.where(KEPT, x, OTHER),
    "where_otherwise": lambda x: jnp.where(KEPT, 7.0, x),
    "where_twice": lambda x: jnp.where(KEPT, x, x[::-1]),
    "triangle": jnp.triu,
    "set": lambda x: x.at[0].set(7.0),
    "set_twice": lambda x: (2.0 * x).at[0, 1:].set(OTHER[0, 1:]).at[:, 0].set(7.0),
    "set_into": lambda x: jnp.ones((4, 3)).at[np.asarray([3, 1])].set(x),
    "set_rows_into_rows": lambda x: x.at[0].set(x[1]),
    "update": lambda x: lax.dynamic_update_slice(OTHER.repeat(2, 0), x, (1, 0)),
    "updated": lambda x: lax.dynamic_update_slice(x, OTHER[:1, :2], (1, 1)),
    "add_into": lambda x: jnp.ones((4, 3)).at[np.asarray([3, 1])].add(x),
    "add_constants": lambda x: x.at[0].add(7.0),
    "affine": lambda x: (3.0 - x / OTHER.clip(1.0)) * -0.5,
    "roll": lambda x: jnp.roll(x, 1, axis=1),
    "rule_of_its_own": lambda x: doubled_backwards(x).T,
    "jit": lambda x: jax.jit(lambda y: jnp.flip(y, 0) * 2.0)(x),
    "remat_of_a_branch": lambda x: jax.checkpoint(lambda y: y.reshape(-1)[2:])(x),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_symbolic_array_is_a_jacobian(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    found, findings = traced(FUNCTIONS[name], x)
    assert not findings.fallbacks
    jacobian = np.zeros((found.index.size, x.size))
    entries = np.flatnonzero(found.index.ravel() != FOREIGN)
    jacobian[entries, found.index.ravel()[entries]] = found.factors.ravel()[entries]
    exact = jax.jacrev(FUNCTIONS[name])(x)
    assert found.index.shape == exact.shape[: found.index.ndim]
    np.testing.assert_array_equal(jacobian, np.reshape(exact, jacobian.shape))


def test_a_constant_in_the_place_of_a_parameter_counts_as_the_parameter_times_zero():
    found, _ = traced(FUNCTIONS["where"], jnp.zeros((2, 3)))
    np.testing.assert_array_equal(found.index, np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found.scale, KEPT)


def test_selections_by_data_end_a_view():
    def walked(function, *data):
        jaxpr, _, _ = jaxprs.trace(function, jnp.zeros((2, 3)), *data)
        findings = Findings()
        parameter = Symbolic(PARAMETERS, np.arange(6).reshape(2, 3))
        (found,) = walk(jaxpr, [parameter, *[None] * len(data)], Scope(findings))
        return found, [entry.reason for entry in findings.fallbacks]

    found, reasons = walked(lambda w, kept: jnp.where(kept, w, 0.0), jnp.ones((2, 3), bool))
    assert found is None
    assert reasons == ["used by `select_n`, which no pattern covers"]
    found, reasons = walked(lambda w, k, x: x.at[k].add(w), jnp.asarray([0, 1]), jnp.ones((4, 3)))
    assert found is None
    assert reasons == ["scattered to places that data decide, or several times to one"]


def test_what_no_data_enter_is_told_apart():
    def function(w):
        return w @ w.T, jnp.sin(w) + 1.0, lax.stop_gradient(w), w * OTHER, jnp.argmax(w)

    jaxpr, consts, _ = jaxprs.trace(function, jnp.ones((2, 3)))
    findings = Findings()
    for value in (Symbolic(PARAMETERS, np.arange(6).reshape(2, 3)), None):
        found = walk(jaxpr, [*map(constant, consts), value], Scope(findings))
        assert [findings.is_fixed(v) for v in found] == [value is not None] * 5


def test_every_selection_is_in_the_functions():
    def names(function):
        jaxpr, _, _ = jaxprs.trace(function, jnp.zeros((2, 3)))
        bodies = [jaxpr, *(b[0] for e in jaxpr.eqns if (b := jaxprs.called_jaxpr(e)))]
        return {eqn.primitive.name for body in bodies for eqn in body.eqns}

    used = functools.reduce(set.union, map(names, FUNCTIONS.values()))
    assert set(SELECTIONS) <= used
