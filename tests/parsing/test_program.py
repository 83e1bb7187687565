"""Every parameter gets the layer that the model's use of it allows, with a name and a reason."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import models, oracles
from support.models import normal

import laplax_kfac
from laplax_kfac.parsing.program import parse
from laplax_kfac.parsing.selection import Selection

pytestmark = pytest.mark.usefixtures("x64")

FIELDS = ("pattern", "block", "in_features", "out_features", "positions", "stack", "bias")


def facts(layers):
    return {layer.name: {f: getattr(layer, f) for f in FIELDS} for layer in layers}


def first(inputs):
    return jax.tree.map(lambda x: x[0], inputs)


# -- the catalogue -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name)
def test_layers(model):
    model_fn, params, inputs, n_out = model.make()
    program = parse(model_fn, params, first(inputs))
    assert facts(program.layers) == facts(model.layers)
    for expected in model.layers:
        (layer,) = [found for found in program.layers if found.name == expected.name]
        assert expected.because in layer.reason
        assert layer.reason
    assert n_out == sum(o.size for o in jax.tree.leaves(program.output))


@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name)
def test_layers_hold_the_leaves_that_they_name(model, separate):
    model_fn, params, inputs, _ = model.make()
    selection = Selection(separate_weight_and_bias=separate)
    program = parse(model_fn, params, first(inputs), selection=selection)
    leaves = jax.tree.leaves_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    sizes = [leaf.size * (1 + jnp.iscomplexobj(leaf)) for _, leaf in leaves]
    leaf_of_id = np.repeat(np.arange(len(leaves)), sizes)
    for layer in program.layers:
        ids = np.concatenate([program.space.ids(s).ravel() for s in layer.segments])
        assert ids.size == layer.size
        if ids.size:
            assert layer.params == tuple(paths[k] for k in np.unique(leaf_of_id[ids]))
        assert set(layer.params) <= set(paths)
    names = [layer.name for layer in program.layers]
    assert len(set(names)) == len(names)
    order = [paths.index(layer.params[0]) for layer in program.layers]
    assert order == sorted(order)
    assert not (separate and any(layer.bias for layer in program.layers))


@pytest.mark.parametrize("name", ["mlp", "nnx_cnn", "scan_over_layers", "tied", "embedding"])
def test_shapes_are_enough(name):
    model_fn, params, inputs, _ = models.by_name(name).make()
    exact = laplax_kfac.find_layers(model_fn, params, first(inputs))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, first(inputs))
    )  # fmt: skip
    assert laplax_kfac.find_layers(model_fn, *shapes) == exact


@pytest.mark.parametrize("name", ["mlp", "scan_over_layers", "masked_weight", "two_biases"])
def test_layers_are_found_while_tracing(name):
    model_fn, params, inputs, _ = models.by_name(name).make()
    found = []

    @jax.jit
    @jax.vmap
    def trace(params):
        found.append(laplax_kfac.find_layers(model_fn, params, first(inputs)))
        return 0

    trace(jax.tree.map(lambda p: jnp.stack([p, p]), params))
    assert found == [laplax_kfac.find_layers(model_fn, params, first(inputs))]


@pytest.mark.parametrize(
    "name", ["mlp", "mixer", "nnx_attention", "depthwise_conv", "scan_over_time"]
)
def test_models_of_a_batch_have_the_same_layers(name):
    model_fn, params, inputs, _ = models.by_name(name).make()

    def batched(input, params):
        return jax.vmap(lambda x: model_fn(input=x, params=params))(input)

    exact = laplax_kfac.find_layers(model_fn, params, first(inputs))
    found = laplax_kfac.find_layers(batched, params, inputs, vmap_over_data=False)
    assert facts(found) == facts(exact)


# -- paths and names ---------------------------------------------------------------------------

PATHS: dict[str, list[tuple[str, ...]]] = {
    "mlp": [("['lin1']['b']", "['lin1']['w']"), ("['lin2']['b']", "['lin2']['w']")],
    "mlp_without_bias": [("[0]",), ("[1]",)],
    "nnx_mlp": [
        ("['lin1']['bias'].value", "['lin1']['kernel'].value"),
        ("['lin2']['bias'].value", "['lin2']['kernel'].value"),
    ],
    "linen_mlp": [
        ("['layers_0']['bias']", "['layers_0']['kernel']"),
        ("['layers_2']['kernel']",),
    ],
    "equinox_mlp": [
        (".layers[0].weight", ".layers[0].bias"),
        (".layers[1].weight", ".layers[1].bias"),
    ],
    "haiku_mlp": [
        ("['mlp/~/linear_0']['b']", "['mlp/~/linear_0']['w']"),
        ("['mlp/~/linear_1']['b']", "['mlp/~/linear_1']['w']"),
    ],
    "fused_leaves": [("['k']", "['q']", "['v']")],
    "flat_vector": [("",), ("",)],
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_those_of_jax(name):
    model_fn, params, inputs, _ = models.by_name(name).make()
    layers = laplax_kfac.find_layers(model_fn, params, first(inputs))
    known = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    for layer, expected in zip(layers, PATHS[name], strict=True):
        assert layer.params == expected
        assert set(expected) <= set(known)


# -- errors and borders ------------------------------------------------------------------------


def test_a_rule_that_is_not_the_bodys_derivative_survives():
    """`linear_call` brings its own transpose: its body is no plain call."""

    def model_fn(input, params):
        outer = lambda x, g: 10.0 * jnp.outer(x, g)  # noqa: E731
        product = linear_call(lambda x, w: x @ w, outer, input, params["w"])
        return jnp.tanh(product)

    params, x = normal({"w": (4, 3)}), normal((1, 4), seed=1)
    assert laplax_kfac.find_layers(model_fn, params, x[0])["w"].block == "dense"
    y = jnp.zeros((1, 3))
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse")
    # JAX has no batching rule for it, so the Jacobian is taken row by row.
    rows = [jax.grad(lambda p, c=c: model_fn(x[0], p)[c])(params)["w"].ravel() for c in range(3)]
    jacobian = jnp.stack(rows)
    np.testing.assert_allclose(curvature.to_dense(), 2.0 * jacobian.T @ jacobian, atol=1e-10)


def test_bodies_that_name_an_axis_of_their_own_are_exact():
    mesh = jax.make_mesh((1,), ("t",), (AxisType.Auto,), devices=jax.devices()[:1])
    split = P(None, "t"), P("t", None)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), *split), out_specs=P())
    def body(x, w1, w2):
        return lax.psum(jnp.tanh(x @ w1) @ w2, "t")

    def model_fn(input, params):
        return body(input, params["w1"], params["w2"])

    params, x = normal({"w1": (4, 5), "w2": (5, 3)}), normal((1, 4), seed=1)
    y = jnp.zeros((1, 3))
    curvature = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse")
    exact = oracles.dense_ggn(model_fn, params, (x, y), "mse")
    np.testing.assert_allclose(curvature.to_dense()[:20, :20], exact[:20, :20], atol=1e-12)


def test_no_parameters_are_an_error():
    with pytest.raises(ValueError, match="`params` has no leaves"):
        laplax_kfac.find_layers(lambda input, **_: input, {}, jnp.ones(3))


def test_leaves_that_are_no_arrays_are_an_error():
    params = {"lin": {"w": jnp.zeros((3, 2)), "scale": 0.5}}
    message = re.escape("found float at ['lin']['scale']; convert it with jnp.asarray")
    with pytest.raises(TypeError, match=message):
        laplax_kfac.find_layers(
            lambda input, params: input @ params["lin"]["w"], params, jnp.ones(3)
        )


@pytest.mark.parametrize(("size", "block"), [(16, "dense"), (17, "diagonal")])
def test_blocks_of_fallback_parameters_are_dense_where_they_are_small(size, block):
    params = {"gain": jnp.zeros((16, size))}
    layers = laplax_kfac.find_layers(
        lambda input, params: input * jnp.exp(params["gain"]), params, jnp.ones((16, size))
    )
    assert (layers["gain"].block, layers["gain"].size) == (block, 16 * size)


def test_a_model_may_ignore_its_parameters():
    layers = laplax_kfac.find_layers(
        lambda input, **_: 2.0 * input, {"w": jnp.zeros(3)}, jnp.ones(3)
    )
    assert [(layer.name, layer.block, layer.pattern) for layer in layers] == [
        ("w", "none", "unused")
    ]


def test_constants_that_are_being_traced_are_data():
    """A factor that is not known while tracing cannot scale a weight, which is a fallback then."""
    params, found = normal({"w": (4, 3)}), []

    def record(factor):
        def model_fn(input, params):
            return input @ (params["w"] * factor)

        found.append(laplax_kfac.find_layers(model_fn, params, jnp.ones(4))["w"])
        return 0

    jax.jit(record)(2.0)
    record(2.0)
    assert [(layer.pattern, layer.block) for layer in found] == [
        ("scale", "dense"),
        ("dense", "kronecker"),
    ]


@pytest.mark.parametrize(
    "model_fn",
    [lambda x, params: x @ params, lambda params, input, scale: scale * input @ params],
)
def test_models_with_other_keywords_are_explained(model_fn):
    message = r"must take the keywords `input` and `params`, .*Wrap it: `lambda input, params"
    with pytest.raises(TypeError, match=message):
        laplax_kfac.find_layers(model_fn, jnp.ones((3, 2)), jnp.ones(3))


def test_models_with_further_defaults_are_taken():
    partial = functools.partial(lambda scale, input, params: scale * input @ params, 2.0)
    for model_fn in (partial, lambda input, params, scale=1.0: scale * input @ params):
        layers = laplax_kfac.find_layers(model_fn, jnp.ones((3, 2)), jnp.ones(3))
        assert [layer.block for layer in layers] == ["kronecker"]
