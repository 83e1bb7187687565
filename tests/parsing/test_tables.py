"""Class tokens and tables of positions: exact blocks, one a row."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from support import oracles
from support.models import normal

import laplax_kfac
from laplax_kfac.parsing import tables
from laplax_kfac.parsing.program import parse
from laplax_kfac.parsing.selection import select

pytestmark = pytest.mark.usefixtures("x64")

TOKENS, FEATURES = 4, 6
SHAPES = {"cls": (1, FEATURES), "pos": (TOKENS + 1, FEATURES), "w": (3, FEATURES)}


def attended(x):
    return jnp.tanh(jax.nn.softmax(x @ x.T) @ x)


def concatenated(params, x):
    """As in a vision transformer: a token in front of the patches, and positions of all."""
    y = jnp.concatenate([params["cls"], x @ params["w"]]) + params["pos"]
    return attended(y)[0]


def sliced(params, x):
    """A table for longer sequences; what is beyond them is idle."""
    return attended(x @ params["w"] + params["pos"][:TOKENS])[0]


def features_first(params, x):
    y = jnp.concatenate([params["cls"].T, (x @ params["w"]).T], axis=1) + params["pos"].T
    return attended(y.T)[-1]


def in_every_layer(params, x):
    """Stacked tables in a scan, added again before every layer, and each at two places."""

    def layer(x, pos):
        return attended(x + jnp.concatenate([pos, pos])), None

    return lax.scan(layer, x @ params["w"], params["pos"][:4].reshape(2, 2, FEATURES))[0][0]


class _Embedding(eqx.Module):
    cls: jax.Array
    pos: jax.Array
    w: jax.Array

    def __call__(self, x):
        y = jnp.concatenate([self.cls, x @ self.w])
        return attended(y + self.pos[: len(y)])[0]


def of_equinox(params, x):
    return _Embedding(params["cls"], params["pos"], params["w"])(x)


class _Positions(nn.Module):
    @nn.compact
    def __call__(self, x, w):
        cls = self.param("cls", nn.initializers.zeros, (1, FEATURES))
        pos = self.param("pos", nn.initializers.zeros, (TOKENS + 1, FEATURES))
        return attended(jnp.concatenate([cls, x @ w]) + pos)[0]


def of_linen(params, x):
    own = {"cls": params["cls"], "pos": params["pos"]}
    return _Positions().apply({"params": own}, x, params["w"])


def model_of(embed):
    return lambda input, params: embed(params, input)


def data():
    return normal((5, TOKENS, 3), 2), normal((5, FEATURES), 3)


ROWS = {
    concatenated: {"cls": 1, "pos": TOKENS + 1},
    sliced: {"pos": TOKENS + 1},
    features_first: {"cls": 1, "pos": TOKENS + 1},
    in_every_layer: {"pos": TOKENS + 1},
    of_equinox: {"cls": 1, "pos": TOKENS + 1},
    of_linen: {"cls": 1, "pos": TOKENS + 1},
}


@pytest.mark.parametrize("embed", ROWS)
def test_rows_have_their_exact_blocks(embed):
    model_fn, params = model_of(embed), normal(SHAPES, 1)
    program = parse(model_fn, params, data()[0][0], selection=select(dense_limit=0))
    found = [layer for layer in program.layers if layer.pattern == "table"]
    assert {layer.name.partition("[")[0]: layer.stack for layer in found} == ROWS[embed]
    assert all((layer.block, layer.rows) == ("kronecker", FEATURES) for layer in found)
    exact = oracles.dense_ggn(model_fn, params, data(), "mse")
    curvature = laplax_kfac.ekfac(model_fn, params, data(), loss_fn="mse", dense_limit=0)
    dense = curvature.to_dense()
    for layer in found:
        (ids,) = (program.space.ids(s)[..., 0] for s in layer.segments)
        places = ids[:, :, None], ids[:, None, :]
        np.testing.assert_allclose(dense[places], exact[places], rtol=1e-9, atol=1e-11)
    apart = laplax_kfac.ekfac(
        model_fn, params, data(), loss_fn="mse", dense_limit=0, fallback="diagonal"
    ).to_dense()
    assert jnp.linalg.norm(dense - exact) < 0.99 * jnp.linalg.norm(apart - exact)
    error = laplax_kfac.relative_error(curvature, model_fn, params, data(), loss_fn="mse")
    assert all(error[layer.name] < 1e-9 for layer in found)


def test_the_blocks_of_a_large_table_are_parts_of_rows(monkeypatch):
    monkeypatch.setattr(tables, "LARGEST", 4 * SHAPES["pos"][0] * FEATURES)
    model_fn, params = model_of(concatenated), normal(SHAPES, 1)
    layers = laplax_kfac.find_layers(model_fn, params, data()[0][0], dense_limit=0)
    table = next(layer for layer in layers if layer.name == "pos")
    assert (table.rows, table.stack) == (3, 2 * (TOKENS + 1))
    assert "3 of the 6 features" in table.reason
    monkeypatch.setattr(tables, "LARGEST", SHAPES["pos"][0] * FEATURES)
    layers = laplax_kfac.find_layers(model_fn, params, data()[0][0], dense_limit=0)
    assert next(layer for layer in layers if layer.name == "pos").block == "diagonal"


def two_weights(params, x):
    """A sum of weights is no table, whatever its shape."""
    return attended(x @ (params["w"] + params["v"]))[0]


def test_a_sum_of_weights_is_no_table():
    params = normal({**SHAPES, "v": SHAPES["w"]}, 1)
    layers = laplax_kfac.find_layers(model_of(two_weights), params, data()[0][0], dense_limit=0)
    assert next(layer for layer in layers if layer.name == "v").pattern == "dense"


@pytest.mark.parametrize(
    ("ids", "row"),
    [
        (np.delete(np.arange(12), [0, 6]), 6),  # a row without its first feature
        (np.arange(10), 4),  # half a row at the end
        (np.arange(5), 1),  # rows of one number have diagonals
    ],
)
def test_what_is_no_whole_row_is_no_table(ids, row):
    assert tables.layer_of("pos", ids, (row,)) is None


@pytest.mark.parametrize("options", [{}, {"dense_limit": 0, "fallback": "diagonal"}])
def test_other_blocks_are_as_they_are_asked_for(options):
    params = normal(SHAPES, 1)
    layers = laplax_kfac.find_layers(model_of(concatenated), params, data()[0][0], **options)
    assert "table" not in {layer.pattern for layer in layers}
