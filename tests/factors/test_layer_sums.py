"""The sums of every layer over data follow their definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.machines import tune_machine
from support.matrices import normal
from support.sums import sums_of, twice
from support.tolerances import tolerance

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")


N, S, IN, OUT = 5, 3, 4, 2
PARAMS = {"b": normal(OUT, seed=1), "w": normal(IN, OUT, seed=2)}
X, Y = normal(N, S, IN), normal(N, OUT, seed=3)


def attend(z):
    """Outputs that mix the positions: no sum over positions can be left out."""
    return jnp.sum(jnp.tanh(z) * jnp.arange(1.0, S + 1)[:, None], axis=0) + z[0] * z[1]


def tokens(input, params):
    return attend(input @ params["w"] + params["b"])


def output_jacobians():
    """d f / d z for every example, shape (N, C, S, OUT), and the outputs f."""
    z = X @ PARAMS["w"] + PARAMS["b"]
    return np.asarray(jax.vmap(jax.jacrev(attend))(z)), np.asarray(jax.vmap(attend)(z))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_sums_follow_their_definition(approx, fisher_type, separate):
    jacobians, f = output_jacobians()
    # The loss is ||f - y||^2: Hessian 2 I, gradient 2 (f - y).
    if fisher_type == "type2":
        g = np.sqrt(2.0) * jacobians
    else:
        g = np.einsum("nc,ncso->nso", 2 * (f - Y), jacobians)[:, None]
    a, ones = X, np.ones((N, S, 1))
    inputs = [ones, a] if separate else [np.concatenate([a, ones], axis=-1)]
    expected_count = N * S
    if approx == "reduce":
        g = g.sum(axis=2, keepdims=True)
        inputs = [x.mean(axis=1, keepdims=True) for x in inputs]
        expected_count = N

    found = sums_of(
        tokens, PARAMS, (X, Y), loss_fn="mse", fisher_type=fisher_type, kfac_approx=approx,
        separate_weight_and_bias=separate,
    )  # fmt: skip
    outputs = np.einsum("nrsi,nrsj->ij", g, g)
    for sums, x in zip(found, inputs, strict=True):
        gram = np.einsum("nsi,nsj->ij", x, x)
        np.testing.assert_allclose(sums.inputs[0, 0], gram, **tolerance(jnp.float64))
        np.testing.assert_allclose(sums.outputs[0, 0], outputs, **tolerance(jnp.float64))
        np.testing.assert_array_equal(sums.count, [[expected_count]])


def test_a_weight_used_twice_has_a_sum_for_each_use():
    w = normal(3, 3)
    x, y = normal(N, 3, seed=1), normal(N, 3, seed=2)
    (sums,) = sums_of(twice, w, (x, y), loss_fn="mse")
    hidden = np.tanh(x @ w)
    np.testing.assert_allclose(sums.inputs[:, 0], [x.T @ x, hidden.T @ hidden], rtol=1e-9)
    # Cotangents sqrt(2) at the second use; through w^T and tanh' = 1 - tanh^2 at the first.
    slope = 1 - hidden**2
    first = 2 * np.einsum("ni,nj,ij->ij", slope, slope, w @ w.T)
    np.testing.assert_allclose(sums.outputs[:, 0], [first, 2 * N * np.eye(3)], atol=1e-12)
    np.testing.assert_array_equal(sums.count, [[N], [N]])


def test_a_transposed_use_swaps_the_sides():
    w = normal(4, 3)
    x, y = normal(N, 4, seed=1), normal(N, 4, seed=2)
    (sums,) = sums_of(lambda input, params: (input @ params) @ params.T, w, (x, y), loss_fn="mse")
    hidden = x @ w
    np.testing.assert_allclose(sums.inputs[:, 0], [x.T @ x, 2 * N * np.eye(4)], atol=1e-12)
    np.testing.assert_allclose(
        sums.outputs[:, 0], [2 * N * w.T @ w, hidden.T @ hidden], rtol=1e-9, atol=1e-12
    )


def test_weights_choose_the_examples_that_count():
    weights = jnp.asarray([1.0, 0.0, 1.0, 1.0, 0.0])
    acc = laplax_kfac.accumulator(tokens, PARAMS, loss_fn="mse")
    state: Any = acc.update(acc.init(), (X, Y), weights)
    (sums,) = state.sums
    a = np.concatenate([X, np.ones((N, S, 1))], axis=-1)
    g = np.sqrt(2.0) * output_jacobians()[0]
    gram = np.einsum("n,nsi,nsj->ij", weights, a, a)
    np.testing.assert_allclose(sums.inputs[0, 0], gram, **tolerance(jnp.float64))
    outputs = np.einsum("n,nrsi,nrsj->ij", weights, g, g)
    np.testing.assert_allclose(sums.outputs[0, 0], outputs, **tolerance(jnp.float64))
    assert sums.count[0, 0] == S * weights.sum()
    assert state.num_examples == weights.sum()


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_input_factor_of_a_convolution_in_a_branch(approx, separate, monkeypatch):
    """Patches are not formed for `expand`; weights, biases and branches are as elsewhere."""
    tune_machine(monkeypatch, least_moment_work=0)
    images, weights = normal(N, 5, 4, 2), jnp.asarray([1.0, 3.0, 2.0, 0.0, 1.0])
    params = {"b": normal(3, seed=1), "w": normal(3, 2, 2, 3, seed=2)}

    def convolve(x, params):
        y = jax.lax.conv_general_dilated(
            x[None], params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y[0] + 2.0 * params["b"]).sum((0, 1))

    def model_fn(input, params):
        taken = input[0, 0, 0] > 0
        return jax.lax.cond(taken, convolve, lambda x, _: x[0, 0, :1].repeat(3), input, params)

    acc: Any = laplax_kfac.accumulator(
        model_fn, params, loss_fn="mse", kfac_approx=approx, separate_weight_and_bias=separate
    )
    state = acc.update(acc.init(), (images, normal(N, 3)), weights)
    places = [(i, j) for i in range(3) for j in range(3)]
    a = np.stack([images[:, i : i + 3, j : j + 2].reshape(N, -1) for i, j in places], axis=1)
    if not separate:
        a = np.concatenate([a, np.full((*a.shape[:2], 1), 2.0)], axis=-1)
    if approx == "reduce":
        a = a.mean(axis=1, keepdims=True)
    taken = images[:, 0, 0, 0] > 0
    assert 0 < (taken * weights).sum() < weights.sum()
    expected = np.einsum("n,nsp,nsq->pq", weights * taken, a, a)
    names = [layer.name for layer in state.layers]
    sums = state.sums[names.index("w") if separate else 0]
    np.testing.assert_allclose(sums.inputs[0, 0], expected, **tolerance(jnp.float64))
    np.testing.assert_allclose(sums.count, (weights * taken).sum() * a.shape[1])


# -- nearest Kronecker product -----------------------------------------------------------------
