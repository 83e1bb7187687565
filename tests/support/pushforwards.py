"""Models fitted for laplax's pushforward, and laplax's generic pushforward for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import laplax.eval.pushforward
import numpy as np
from laplax.curv.cov import set_posterior_fn
from laplax.eval.pushforward import (
    lin_samples,
    nonlin_setup,
    set_lin_pushforward,
)

import laplax_kfac
from laplax_kfac.laplax_adapter import closed_form, dataset
from laplax_kfac.laplax_adapter.rebinding import original_of
from laplax_kfac.predictive import jacobians
from support import models
from support.matrices import normal


def generic_setup(results, aux, input, dist_state, **_):
    """laplax's own setup, where the covariance is a product with that of all parameters."""
    generic = original_of(laplax.eval.pushforward.set_output_mv)
    products = generic(dist_state["posterior_state"], input, dist_state["jvp"], dist_state["vjp"])
    aux |= products
    return results, aux


PRIOR = {"prior_prec": 0.3, "sigma_squared": 0.7}
RELATIVE = {jnp.dtype("float32"): 1e-5, jnp.dtype("float64"): 1e-10}


def image_to_image(input, params):
    return jnp.tanh(params["left"] @ input) @ params["right"] + params["bias"]


def one_number(input, params):
    return jnp.tanh(input @ params["w"]) @ params["v"]


def of_two_inputs(input, params):
    return jnp.tanh(input["a"] @ params["w"]) * (input["b"] @ params["v"])


BUILT = {
    "matrix output": lambda: (
        image_to_image,
        {"left": normal(2, 4), "right": normal(3, 3), "bias": normal(3)},
        normal(5, 4, 3, seed=1),
    ),
    "one number": lambda: (one_number, {"w": normal(3, 4), "v": normal(4)}, normal(5, 3, seed=1)),
    "two inputs": lambda: (
        of_two_inputs,
        {"w": normal(3, 4), "v": normal(2, 4)},
        {"a": normal(5, 3, seed=1), "b": normal(5, 2, seed=2)},
    ),
}


@functools.cache
def fitted(name: str, dtype: str) -> Any:
    """A model, its parameters, inputs and laplax's posterior function; x64 is as the caller's."""
    built = BUILT[name]() if name in BUILT else models.by_name(name).build()
    model_fn, *arrays = built
    params, inputs = jax.tree.map(
        lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None), arrays
    )
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    data = inputs, jnp.zeros_like(outputs)
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    return model_fn, params, inputs, set_posterior_fn("kfac", curvature, layout=params), curvature


def predictions(name: str, dtype: str, fns: Any, setter: Any = set_lin_pushforward) -> Any:
    model_fn, params, inputs, posterior_fn, _ = fitted(name, dtype)
    predict = setter(
        model_fn, params, posterior_fn, PRIOR, pushforward_fns=fns,
        num_samples=4 if {lin_samples, nonlin_setup} & set(fns) else 0,
        key=jax.random.key(1), loss_scaling_factor=2.0,
    )  # fmt: skip
    return jax.jit(jax.vmap(predict))(inputs)


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for entry, values in expected.items():
        got = found[entry]
        assert (got.shape, got.dtype) == (values.shape, values.dtype), entry
        error, size = np.abs(got - values).max(), np.abs(values).max()
        assert 0 < size < np.inf, entry
        assert error <= RELATIVE[values.dtype] * size, (entry, error, size)


def count_linearisations(monkeypatch: Any) -> list[int]:
    """Grows by one whenever the model is linearised: for one input while tracing, or for many."""
    count: list[int] = []

    def counting(function):
        def counted(*args, **kwargs):
            count.append(1)
            return function(*args, **kwargs)

        return counted

    compiled = jacobians.compiled_linearise
    monkeypatch.setattr(dataset, "compiled_linearise", lambda *args: counting(compiled(*args)))
    monkeypatch.setattr(closed_form, "linearise", counting(jacobians.linearise))
    return count
