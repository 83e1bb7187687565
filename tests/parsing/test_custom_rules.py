"""Equations with a derivative rule: what it does not use, and whether it is their derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import oracles
from support.models import normal

import laplax_kfac
from laplax_kfac.parsing.program import parse

pytestmark = pytest.mark.usefixtures("x64")


def given():
    """Parameters and an input."""
    return normal({"w": (4, 4), "v": (4, 4)}), normal((4,), seed=1)


def plain(w, x):
    return jnp.tanh(x @ w)


def slope(w, x):
    return 1.0 - jnp.tanh(x @ w) ** 2


def kinked(w, x):
    return jnp.maximum(x @ w, 0.0)


def iterated(w, x):
    return lax.fori_loop(0, 40, lambda _, z: jnp.tanh(0.1 * z @ w + x), x)


def implicit(w, x, g):
    """The pullback of the fixed point that `iterated` arrives at."""
    z = iterated(w, x)
    step = lambda w, x, z: jnp.tanh(0.1 * z @ w + x)  # noqa: E731
    jacobian = jax.jacrev(lambda z: step(w, x, z))(z)
    return jax.vjp(lambda w, x: step(w, x, z), w, x)[1](
        jnp.linalg.solve(jnp.eye(4) - jacobian.T, g)
    )


def exact(function):
    return lambda w, x, g: jax.vjp(function, w, x)[1](g)


def scaled(w, x, g):
    along_w, along_x = exact(plain)(w, x, g)
    return 2.0 * along_w, along_x


def bent(w, x, g):
    return exact(plain)(w, x, g + jnp.maximum(g - 50.0, 0.0))


# A function, the pullback that is its rule, and whether the two are found to belong together.
RULES = {
    "its own": (kinked, exact(kinked), True),
    "written out": (
        plain,
        lambda w, x, g: (jnp.outer(x, g * slope(w, x)), w @ (g * slope(w, x))),
        True,
    ),
    "scaled": (plain, scaled, False),
    "a little off": (
        plain,
        lambda w, x, g: (jnp.outer(x, g * (slope(w, x) + 1e-6)), w @ (g * slope(w, x))),
        False,
    ),
    "another function of the input": (
        plain,
        lambda w, x, g: (jnp.outer(x, g * slope(w, x)), w @ g),
        False,
    ),
    "clipped": (plain, lambda w, x, g: exact(plain)(w, x, jnp.clip(g, -50.0, 50.0)), False),
    "with a kink": (plain, bent, False),
    "of another piece": (
        kinked,
        lambda w, x, g: (jnp.outer(x, g * (x @ w >= 0)), w @ (g * (x @ w >= 0))),
        False,
    ),
    "implicit": (iterated, implicit, False),
}  # fmt: skip


def with_rule(function, pullback):
    """The function with a rule, called on a tree with a weight that it does not read."""
    ruled = jax.custom_vjp(lambda params, x: function(params["w"], x))

    def backward(kept, g):
        params, x = kept
        w, along = pullback(params["w"], x, g)
        return {"w": w, "v": jnp.zeros_like(params["v"])}, along

    ruled.defvjp(lambda params, x: (ruled(params, x), (params, x)), backward)
    return lambda input, params: ruled(params, jnp.sin(input)) @ params["v"]


@pytest.mark.parametrize("name", RULES)
def test_a_function_is_entered_where_its_rule_is_its_derivative(name):
    function, pullback, same = RULES[name]
    layers = laplax_kfac.find_layers(with_rule(function, pullback), *given())
    assert layers["v"].block == "kronecker"
    assert layers["w"].block == ("kronecker" if same else "dense")
    assert ("derivative of its own" in layers["w"].reason) is not same


@pytest.mark.parametrize("name", ["its own", "written out", "scaled", "clipped"])
def test_curvature_follows_the_rule(name):
    model_fn = with_rule(*RULES[name][:2])
    params, x = given()
    data = x[None], jnp.zeros((1, 4))
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", eigenvalue_correction=True)
    ggn = oracles.dense_ggn(model_fn, params, data, "mse")
    np.testing.assert_allclose(curvature.trace(), jnp.trace(ggn), rtol=1e-8)


def test_layers_are_the_same_while_tracing_and_in_single_precision():
    def blocks(dtype):
        params, x = jax.tree.map(lambda a: a.astype(dtype), given())
        model_fn = with_rule(*RULES["written out"][:2])
        return [layer.block for layer in parse(model_fn, params, x).layers]

    seen = []

    @jax.jit
    def traced(x):
        seen.extend(blocks(jnp.float64))
        return x

    traced(1.0)
    assert seen == ["kronecker"] * 2
    assert blocks(jnp.float32) == ["kronecker"] * 2


def test_weights_carried_through_a_loop_keep_their_block():
    def model_fn(input, params):
        def body(state):
            number, w, h = state
            return number + 1, w, jnp.tanh(h)

        _, w, h = lax.while_loop(
            lambda s: s[0] < 3, body, (0, params["w"], lax.stop_gradient(input))
        )
        return h @ w

    (layer,) = laplax_kfac.find_layers(model_fn, normal({"w": (4, 4)}), normal((4,)))
    assert layer.block == "kronecker"
