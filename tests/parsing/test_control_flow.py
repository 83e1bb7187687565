"""Uses inside scans, conditionals and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.models import normal

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")


def test_while_loops_over_parameters_are_an_error():
    def loop(input, params):
        def step(h):
            return jnp.tanh(h @ params["w"])

        return lax.while_loop(lambda h: jnp.sum(h) > 1.0, step, input)

    params = {"w": jnp.zeros((3, 3))}
    for model_fn in (loop, jax.jit(loop), jax.checkpoint(loop)):
        with pytest.raises(
            ValueError, match=r"`model_fn` uses parameters inside a `while_loop`"
        ) as e:
            laplax_kfac.find_layers(
                lambda input, params, f=model_fn: f(input, params), params, jnp.ones(3)
            )
        assert "Use `lax.scan`" in str(e.value)


def test_while_loops_over_data_are_fine():
    def model_fn(input, params):
        h = lax.while_loop(lambda h: jnp.sum(h) < 1.0, lambda h: h + 1.0, input)
        return h @ params["w"]

    layers = laplax_kfac.find_layers(model_fn, {"w": jnp.zeros((3, 2))}, jnp.ones(3))
    assert layers["w"].block == "kronecker"


def stopped_by_a_constant(h, limit):
    return lax.while_loop(lambda h: jnp.sum(h) < limit, lambda h: 2.0 * h, h)


def stopped_by_a_carry(h, limit):
    def body(carry):
        return 2.0 * carry[0], carry[1]

    return lax.while_loop(lambda carry: jnp.sum(carry[0]) < carry[1], body, (h, limit))[0]


@pytest.mark.parametrize("loop", [stopped_by_a_constant, stopped_by_a_carry])
def test_what_only_a_loops_condition_reads_has_no_derivative(loop):
    """Adaptive computation: a learned limit ends the loop, and is learned by other means."""

    def model_fn(input, params):
        return loop(input, params["limit"][0]) @ params["lin"]["w"] + params["limit"][1]

    params = {"lin": normal({"w": (3, 2)}), "limit": jnp.asarray([5.0, 1.0])}
    layers = laplax_kfac.find_layers(model_fn, params, jnp.ones(3))
    assert layers["lin"].block == "kronecker"
    x, y = lax.stop_gradient(normal((2, 3)) ** 2), jnp.zeros((2, 2))
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse")
    np.testing.assert_allclose(curvature.diagonal()["limit"], [0.0, 8.0], rtol=1e-12)
