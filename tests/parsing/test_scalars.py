"""Single numbers of one module have one exact block together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from support import oracles
from support.models import normal

import laplax_kfac
from laplax_kfac.parsing.program import parse

pytestmark = pytest.mark.usefixtures("x64")

FEATURES = 4


def gains_of_branches(params, x):
    """Two gains, a temperature, and a number that is added at every place, in one module."""
    own = params["own"]
    y = own["first"] * jnp.sin(x) + own["second"] * jnp.cos(x) + own["offset"]
    return jax.nn.softmax(own["temperature"] * y, axis=-1).mean(axis=0)


def gains_in_an_order(params, x):
    """Leaves that others lie between, of one entry, in a loop."""

    def layer(x, _):
        return x + params["own"]["offset"][0] * jnp.sin(
            params["own"]["second"] * x @ params["w"]
        ), None

    return lax.scan(layer, x, None, length=2)[0].mean(axis=0)


class _Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, second = (self.param(n, nn.initializers.ones, ()) for n in ("first", "second"))
        return jnp.tanh(first * x + second * nn.Dense(FEATURES, use_bias=False)(x)).mean(axis=0)


def of_linen(params, x):
    return _Gated().apply({"params": {**params["own"], "Dense_0": {"kernel": params["w"]}}}, x)


GROUPS = {
    gains_of_branches: ["first", "offset", "second", "temperature"],
    gains_in_an_order: ["offset", "second"],
    of_linen: ["first", "second"],
}


def model_of(apply, names):
    shapes: dict[str, Any] = {
        "other": {"gain": ()},
        "own": {name: (1,) if name == "offset" else () for name in names},
        "w": (FEATURES, FEATURES),
    }
    if apply is gains_in_an_order:
        shapes["own"]["rows"] = (FEATURES,)

    def model_fn(input, params):
        y = apply(params, input * params["other"]["gain"])
        return y + params["own"].get("rows", 0.0)

    return model_fn, normal(shapes, 1)


@pytest.mark.parametrize("apply", GROUPS)
def test_numbers_of_a_module_have_their_exact_block(apply):
    names = GROUPS[apply]
    model_fn, params = model_of(apply, names)
    data = normal((5, 3, FEATURES), 2), normal((5, FEATURES), 3)
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    (layer,) = [found for found in curvature.layers if found.size == len(names) > 1 == found.stack
                and found.block == "dense"]  # fmt: skip
    assert layer.params == tuple(f"['own']['{name}']" for name in names)
    exact = oracles.dense_ggn(model_fn, params, data, "mse")
    (ids,) = (parse(model_fn, params, data[0][0]).space.ids(s) for s in layer.segments)
    places = np.ix_(ids, ids)
    np.testing.assert_allclose(curvature.to_dense()[places], exact[places], rtol=1e-9, atol=1e-11)
    apart = laplax_kfac.kfac(
        model_fn, params, data, loss_fn="mse", separate_weight_and_bias=True
    ).to_dense()
    assert jnp.linalg.norm(curvature.to_dense() - exact) < jnp.linalg.norm(apart - exact)
    error = laplax_kfac.relative_error(curvature, model_fn, params, data, loss_fn="mse")
    assert error[layer.name] < 1e-9


def test_a_number_of_another_module_stays_apart():
    model_fn, params = model_of(gains_of_branches, GROUPS[gains_of_branches])
    layers = laplax_kfac.find_layers(model_fn, params, jnp.ones((3, FEATURES)))
    assert layers["other"].params == ("['other']['gain']",)
    assert "4 single numbers" in layers["own"].reason
    diagonal = laplax_kfac.find_layers(
        model_fn, params, jnp.ones((3, FEATURES)), fallback="diagonal"
    )
    assert diagonal["own/first"].block == "diagonal"
