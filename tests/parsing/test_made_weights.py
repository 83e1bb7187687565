"""Weights that are made of parameters: their blocks are the exact ones of one example."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from support import oracles
from support.models import from_equinox, from_haiku, from_nnx, inputs, normal

import laplax_kfac
from laplax_kfac.parsing.layout import ParameterSpace

pytestmark = pytest.mark.usefixtures("x64")

CASES: dict[str, Any] = {}


def case(*expected):
    """A model, and its layers: (name, inputs, outputs) and whether a bias is joint."""

    def add(build):
        CASES[build.__name__] = build, expected
        return build

    return add


def dense(x, w, params):
    return jnp.tanh(x @ w + params["b"]) @ params["out"]


@case(("u", 6, 2, False), ("v", 2, 5, True))
def low_rank():
    def model_fn(input, params):
        return dense(input, params["u"] @ params["v"], params)

    return model_fn, normal({"u": (6, 2), "v": (2, 5), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("u", 6, 2, False), ("v", 2, 5, True))
def low_rank_from_the_left_in_a_jitted_layer():
    @jax.jit
    def layer(x, u, v, b):
        return jnp.tanh(jnp.einsum("ri,or->oi", u, v) @ x + b)

    def model_fn(input, params):
        return layer(input, params["u"], params["v"], params["b"]) @ params["out"]

    return model_fn, normal({"u": (2, 6), "v": (5, 2), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("w", 6, 5, True), ("u", 6, 2, False), ("v", 2, 5, False))
def merged_adapter():
    def model_fn(input, params):
        return dense(input, params["w"] + 0.3 * (params["u"] @ params["v"]), params)

    params = {"w": (6, 5), "u": (6, 2), "v": (2, 5), "b": (5,), "out": (5, 3)}
    return model_fn, normal(params), inputs(6)


@case(("u", 7, 2, False), ("v", 2, 5, True))
def low_rank_table():
    def model_fn(input, params):
        table = params["u"] @ params["v"]
        return jnp.tanh(table[jnp.argmax(input)] + params["b"]) @ params["out"]

    return model_fn, normal({"u": (7, 2), "v": (2, 5), "b": (5,), "out": (5, 3)}), inputs(7)


@case(("w", 7, 5, False))
def table_with_scaled_rows():
    def model_fn(input, params):
        table = params["w"] * params["s"][:, None]
        return jnp.tanh(table[jnp.argmax(input)] + params["b"]) @ params["out"]

    return model_fn, normal({"w": (7, 5), "s": (7,), "b": (5,), "out": (5, 3)}), inputs(7)


@case(("w", 6, 5, False))
def columns_scaled_by_another_parameter():
    def model_fn(input, params):
        return dense(input, params["w"] * jax.nn.softplus(params["s"]), params)

    return model_fn, normal({"w": (6, 5), "s": (5,), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("w", 6, 5, True))
def rows_scaled_by_another_parameter():
    def model_fn(input, params):
        return dense(input, params["w"] / jnp.exp(params["s"])[:, None], params)

    return model_fn, normal({"w": (6, 5), "s": (6,), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("w", 6, 5, True))
def gated_by_a_sum_over_another_parameter():
    def model_fn(input, params):
        gate = jax.nn.sigmoid(jnp.einsum("ik,k->i", params["g"], params["h"]))
        return dense(input, gate[:, None] * params["w"], params)

    params = {"w": (6, 5), "g": (6, 2), "h": (2,), "b": (5,), "out": (5, 3)}
    return model_fn, normal(params), inputs(6)


@case(("w", 6, 5, True))
def centred_over_inputs():
    def model_fn(input, params):
        return dense(input, params["w"] - jnp.mean(params["w"], axis=0), params)

    return model_fn, normal({"w": (6, 5), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("w", 6, 5, False))
def centred_over_outputs_of_a_transposed_weight():
    def model_fn(input, params):
        w = params["w"] - jnp.mean(params["w"], axis=0, keepdims=True)
        return dense(input, w.T, params)

    return model_fn, normal({"w": (5, 6), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("[0:30]", 6, 5, False))
def centred_part_of_a_flat_vector():
    def model_fn(input, params):
        w, out = params[:30].reshape(6, 5), params[30:].reshape(5, 3)
        return jnp.tanh(input @ (w - jnp.mean(w, axis=0))) @ out

    return model_fn, normal((45,)), inputs(6)


@case(("w", 6, 5, True))
def divided_by_a_norm_without_derivative():
    def model_fn(input, params):
        w = params["w"]
        v = w @ jnp.ones(5)
        norm = jnp.linalg.norm(w.T @ (v / jnp.linalg.norm(v)))
        return dense(input, w / lax.stop_gradient(norm), params)

    return model_fn, normal({"w": (6, 5), "b": (5,), "out": (5, 3)}), inputs(6)


@case(("linear", 6, 5, True))
def haiku_centred():
    def forward(x):
        def centred(next_getter, value, context):
            w = next_getter(value)
            return w - jnp.mean(w, axis=0) if context.name == "w" else w

        with hk.custom_getter(centred):
            h = hk.Linear(5)(x)
        return hk.Linear(3)(jnp.tanh(h))

    return from_haiku(forward, inputs(6))


@case(("lin", 6, 5, False))
def equinox_with_scaled_outputs():
    class Net(eqx.Module):
        lin: eqx.nn.Linear
        gain: jax.Array
        out: eqx.nn.Linear

        def __call__(self, x):
            scaled = eqx.tree_at(
                lambda lin: lin.weight, self.lin, self.lin.weight * self.gain[:, None]
            )
            return self.out(jnp.tanh(scaled(x)))

    def make(key):
        keys = jax.random.split(key)
        return Net(
            eqx.nn.Linear(6, 5, use_bias=False, key=keys[0]),
            jnp.ones(5) * 2,
            eqx.nn.Linear(5, 3, key=keys[1]),
        )

    return from_equinox(make, inputs(6))


@case(("w", 6, 5, True))
def nnx_with_mixed_inputs():
    mixing = normal((6, 6), seed=3)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.zeros((6, 5)))
            self.bias = nnx.Param(jnp.zeros(5))
            self.out = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            h = x @ (mixing @ self.w[...]) + self.bias[...]
            return self.out(jnp.tanh(h))

    return from_nnx(Net, inputs(6))


@pytest.mark.parametrize("name", CASES)
def test_the_block_of_one_example_is_exact(name):
    build, expected = CASES[name]
    model_fn, params, inputs = build()
    data = inputs[:1], jnp.asarray(normal((1, 3), seed=7))
    layers = laplax_kfac.find_layers(model_fn, params, inputs[0])
    made = []
    for layer_name, rows, columns, bias in expected:
        layer = next(layer for layer in layers if layer.name.endswith(layer_name))
        assert layer.block == "kronecker", layer.reason
        assert (layer.in_features, layer.out_features, layer.bias) == (rows, columns, bias)
        made.append(layer)
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    found = np.asarray(curvature.to_dense())
    space = ParameterSpace.of(params)
    for layer in made:
        ids = np.concatenate([space.ids(s).ravel() for s in layer.segments])
        block = np.ix_(ids, ids)
        np.testing.assert_allclose(found[block], exact[block], atol=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize(
    "name", ["merged_adapter", "columns_scaled_by_another_parameter", "centred_over_inputs"]
)
def test_gradients_are_sums_of_outer_products(name):
    """So that the second moments along eigenvectors have the trace of the exact curvature."""
    model_fn, params, _ = CASES[name][0]()
    data = normal(((6, 6), (6, 3)), seed=7)
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    curvature = laplax_kfac.ekfac(model_fn, params, data, loss_fn="mse")
    np.testing.assert_allclose(curvature.trace(), jnp.trace(exact), rtol=1e-10)
    diagonal = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", curvature="diagonal")
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(diagonal.diagonal())[0], jnp.diag(exact), rtol=1e-9
    )
    records = laplax_kfac.intermediates_and_gradients(model_fn, params, data, loss_fn="mse")

    def loss(params, x, y):
        return jnp.sum((model_fn(input=x, params=params) - y) ** 2)

    gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *data)
    for leaf in {"w", "u", "v"} & set(params):
        found = jnp.einsum("nsi,nso->nio", records[leaf].inputs, records[leaf].gradients)
        np.testing.assert_allclose(found, gradients[leaf], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["low_rank", "merged_adapter", "rows_scaled_by_another_parameter", "haiku_centred"]
)
def test_blocks_are_nearer_than_diagonals(name):
    build, expected = CASES[name]
    model_fn, params, _ = build()
    data = normal(((128, 6), (128, 3)), seed=7)
    ours, diagonal = (
        laplax_kfac.relative_error(
            laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", curvature=kind),
            model_fn, params, data, loss_fn="mse",
        )
        for kind in ("kronecker", "diagonal")
    )  # fmt: skip
    for layer in ours.layers:
        if layer.rpartition("/")[2] in {name for name, *_ in expected}:
            assert ours[layer] < diagonal[layer]


# -- what has no such block ----------------------------------------------------------------------


def by_norm(w, limit):
    return w * jnp.minimum(1.0, limit / jnp.linalg.norm(w))


REFUSED = {
    "exp": (jnp.exp, "used by `exp`"),
    "symmetric": (lambda w: w + w.T, "added to another parameter"),
    "normalised columns": (lambda w: w / jnp.linalg.norm(w, axis=0), "multiplied by another"),
    "normalised": (lambda w: w / jnp.linalg.norm(w), "multiplied by another"),
    "standardised": (lambda w: (w - w.mean(0)) / w.std(0), "used by `reduce_sum`"),
    "cut": (lambda w: jnp.clip(w, -0.5, 0.5), "used by"),
    "bounded": (lambda w: by_norm(w, 2.0), "multiplied by another"),
    "bounded loosely": (lambda w: by_norm(w, 100.0), "multiplied by another"),
    "flipped far away": (lambda w: jnp.where(jnp.max(w) > 1e9, w[::-1], w), "used by `select_n`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_leave_an_exact_dense_block(name):
    function, _ = REFUSED[name]

    def model_fn(input, params):
        return jnp.tanh(input @ function(params))

    params = normal((4, 4))
    data = normal(((5, 4), (5, 4)), seed=7)
    (layer,) = laplax_kfac.find_layers(model_fn, params, data[0][0])
    assert layer.block == "dense"
    assert REFUSED[name][1] in layer.reason
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    found = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse").to_dense()
    np.testing.assert_allclose(found, exact, atol=1e-9 * np.abs(exact).max())


def test_a_product_that_is_a_weight_and_more_has_exact_blocks():
    def model_fn(input, params):
        w = params["u"] @ params["v"]
        return jnp.tanh(input @ w) * jnp.sum(jnp.sin(w), axis=0)

    params = normal({"u": (4, 2), "v": (2, 3)})
    data = normal(((5, 4), (5, 3)), seed=7)
    layers = laplax_kfac.find_layers(model_fn, params, data[0][0])
    assert {layer.block for layer in layers} == {"dense"}


def test_parameters_of_a_weight_in_one_place_and_a_weight_in_another_are_one_layer():
    """A weight that is centred for the first product and not for the second: two uses."""

    def model_fn(input, params):
        h = jnp.tanh(input @ (params - params.mean(0)))
        return h @ params

    params = normal((4, 4))
    data = normal(((1, 4), (1, 4)), seed=7)
    (layer,) = laplax_kfac.find_layers(model_fn, params, data[0][0])
    assert (layer.block, layer.uses) == ("kronecker", 2)
    curvature = laplax_kfac.ekfac(model_fn, params, data, loss_fn="mse")
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    np.testing.assert_allclose(curvature.trace(), jnp.trace(exact), rtol=1e-10)


def test_a_second_fit_finds_what_was_compiled(monkeypatch):
    model_fn, params, _ = CASES["rows_scaled_by_another_parameter"][0]()
    data = normal(((4, 6), (4, 3)), seed=7)
    first = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    monkeypatch.setattr(
        "laplax_kfac.parsing.separable_maps.MadeWeight.pullback",
        lambda *_: pytest.fail("the weight was looked at again"),
    )
    second = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    np.testing.assert_array_equal(first.to_dense(), second.to_dense())


def test_layers_are_found_and_fitted_under_jit():
    model_fn, params, _ = CASES["merged_adapter"][0]()
    data = normal(((4, 6), (4, 3)), seed=7)

    def fit(params):
        return laplax_kfac.kfac(model_fn, params, data, loss_fn="mse").trace()

    np.testing.assert_allclose(jax.jit(fit)(params), fit(params))


# -- what is put off is never lost ---------------------------------------------------------------


def through_a_call(x, w):
    return jax.jit(lambda a, b: a @ b)(x, jnp.exp(w))


def through_calls_within_calls(x, w):
    return jax.jit(lambda b: jax.jit(lambda a: jnp.where(a > 0, 2 * a, a))(jnp.sin(b)))(w) @ x


def through_a_call_of_it_alone(x, w):
    return x @ jnp.tril(jnp.exp(w))


def through_rematerialisation(x, w):
    return jax.checkpoint(lambda a, b: jnp.tanh(a) * b.sum())(x, jnp.exp(w))


def through_a_branch(x, w):
    return lax.cond(x[0] > 0, lambda a, b: a @ b, lambda a, b: a * b[0], x, jnp.exp(w))


def through_a_loop(x, w):
    made = jnp.exp(w)
    return lax.scan(lambda h, _: (jnp.tanh(h @ made), None), x, None, length=2)[0]


def carried_by_a_loop(x, w):
    return lax.fori_loop(0, 2, lambda _, c: (c[0], 2 * c[1]), (x, jnp.exp(w)))[1] @ x


def through_a_factorisation(x, w):
    factor = jax.scipy.linalg.cho_factor(w @ w.T + jnp.eye(WIDTH))
    return x @ jax.scipy.linalg.cho_solve(factor, jnp.eye(WIDTH))


def through_a_solve(x, w):
    return jnp.linalg.solve(jnp.exp(w) + 3 * jnp.eye(WIDTH), x)


def through_a_rule(x, w):
    return jax.nn.relu(jnp.exp(w)).sum() * x


def through_an_axis(x, w):
    rows = jnp.stack([x, 2 * x])
    return jax.vmap(lambda row: jax.jit(jnp.matmul)(row, jnp.exp(w)))(rows).sum(axis=0)


WIDTH = 3
PUT_OFF = [
    through_a_call,
    through_calls_within_calls,
    through_a_call_of_it_alone,
    through_rematerialisation,
    through_a_branch,
    through_a_loop,
    carried_by_a_loop,
    through_a_factorisation,
    through_a_solve,
    through_a_rule,
    through_an_axis,
]


@pytest.mark.parametrize("function", PUT_OFF)
def test_parameters_made_into_anything_have_a_block_with_the_trace_of_the_exact_one(function):
    rng = np.random.default_rng(0)
    params, x = {"w": rng.normal(size=(WIDTH, WIDTH))}, rng.normal(size=(4, WIDTH))

    def model_fn(input, params):
        return function(jnp.asarray(input), jnp.asarray(params["w"]))

    jacobians = jax.vmap(lambda x: jax.jacrev(lambda w: function(x, w))(params["w"]))(x)
    exact = 2 * float(jnp.sum(jacobians**2))
    curvature = laplax_kfac.ekfac(model_fn, params, (x, jnp.zeros_like(x)), loss_fn="mse")
    assert exact > 0
    assert float(curvature.trace()) == pytest.approx(exact, rel=1e-9)


# -- matrices of their own gradients --------------------------------------------------------------

NEAREST = {
    "weight_norm": lambda w: 1.5 * w / jnp.linalg.norm(w, axis=0),
    "norm_with_derivative": lambda w: 3.0 * w / jnp.linalg.norm(w @ jnp.ones(8)),
    "exponential": lambda w: jnp.exp(w) / 4,
    "standardised": lambda w: (w - w.mean(0)) / w.std(0) / 4,
    "masked": lambda w: w * (np.arange(8)[:, None] % 3 <= np.arange(8) % 3),
    "symmetric": lambda w: w + w.T,
}


@pytest.mark.parametrize("name", NEAREST)
def test_other_functions_of_large_weights_have_the_product_of_their_second_moments(name):
    def model_fn(input, params):
        return jnp.tanh(input @ NEAREST[name](params["w"])) @ params["out"]

    params = normal({"w": (8, 8), "out": (8, 3)})
    data = normal(((64, 8), (64, 3)), seed=7)
    layer = laplax_kfac.find_layers(model_fn, params, data[0][0], dense_limit=63)["w"]
    assert (layer.pattern, layer.block, layer.in_features) == ("made", "kronecker", 8)
    assert laplax_kfac.find_layers(model_fn, params, data[0][0])["w"].block == "dense"
    fits = {
        "ours": laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", dense_limit=63),
        "corrected": laplax_kfac.ekfac(model_fn, params, data, loss_fn="mse", dense_limit=63),
        "diagonal": laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", fallback="diagonal"),
    }
    trace = jnp.trace(oracles.dense_ggn(model_fn, params, data, "mse"))
    np.testing.assert_allclose(fits["corrected"].trace(), trace, rtol=1e-10)
    errors = {
        key: laplax_kfac.relative_error(fit, model_fn, params, data, loss_fn="mse")["w"]
        for key, fit in fits.items()
    }
    assert errors["ours"] < errors["diagonal"]
    assert errors["corrected"] < errors["diagonal"]


def test_curvature_without_cotangents_is_a_multiple_of_the_identity():
    def model_fn(input, params):
        return jnp.tanh(input @ jnp.exp(params))

    params, data = normal((8, 8)), normal(((5, 8), (5, 8)), seed=7)
    curvature = laplax_kfac.kfac(
        model_fn, params, data, loss_fn="mse", dense_limit=63, fisher_type="forward_only"
    )
    np.testing.assert_allclose(curvature.to_dense(), 5 * np.eye(64), atol=1e-10)
