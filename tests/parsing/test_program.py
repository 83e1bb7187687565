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
    leaf_of_id = np.repeat(np.arange(len(leaves)), [leaf.size for _, leaf in leaves])
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


def product_of(*paths):
    """A model that multiplies the weights at these paths, one after the other."""

    def model_fn(input, params):
        for path in paths:
            weight = params
            for key in path:
                weight = weight[key]
            input = jnp.tanh(input @ weight)
        return input

    return model_fn


@pytest.mark.parametrize(
    ("params", "paths", "names"),
    [
        ({"net": {"w": 0}}, [("net", "w")], ["net"]),
        ({"w": 0}, [("w",)], ["w"]),
        ({"net": {"v": 0, "w": 0}}, [("net", "v"), ("net", "w")], ["net/v", "net/w"]),
        ({"a": {"w": 0, "b": {"w": 0}}}, [("a", "w"), ("a", "b", "w")], ["a/b", "a"]),
        ([[0, 0], [0]], [(0, 0), (0, 1), (1, 0)], ["0/0", "0/1", "1"]),
    ],
)  # fmt: skip
def test_a_layer_is_named_by_its_module_or_else_by_its_leaf(params, paths, names):
    params = jax.tree.map(lambda _: jnp.zeros((3, 3)), params)
    layers = laplax_kfac.find_layers(product_of(*paths), params, jnp.zeros(3))
    assert [layer.name for layer in layers] == names


@pytest.mark.parametrize(
    "params", [{"net": {"policy": 0, "value": 0}}, {"a": {"w": 0}, "a/w": 0}], ids=str
)
def test_names_are_unique(params):
    params = jax.tree.map(lambda _: jnp.zeros((3, 3)), params)
    paths = [[key.key for key in path] for path, _ in jax.tree.leaves_with_path(params)]
    layers = laplax_kfac.find_layers(product_of(*paths), params, jnp.zeros(3))
    assert len({layer.name for layer in layers}) == 2


def test_a_leaf_named_value_keeps_its_name():
    """Only flax.nnx's attribute `value` is no part of a name."""
    params = {"attn": {key: jnp.zeros((3, 3)) for key in ("key", "query", "value")}}
    paths = [("attn", key) for key in params["attn"]]
    layers = laplax_kfac.find_layers(product_of(*paths), params, jnp.zeros(3))
    assert [layer.name for layer in layers] == ["attn/key", "attn/query", "attn/value"]


# -- errors and borders ------------------------------------------------------------------------


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


def test_bodies_that_name_an_axis_of_their_own_are_evaluated_as_they_stand():
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
def test_probed_blocks_are_dense_where_they_are_small(size, block):
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
    """A factor that is not known while tracing cannot scale a weight: its layer is probed."""
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


# -- selections --------------------------------------------------------------------------------


def found(name, **options):
    model_fn, params, inputs, _ = models.by_name(name).make()
    return laplax_kfac.find_layers(model_fn, params, first(inputs), **options)


@pytest.mark.parametrize(
    ("params_filter", "covered"),
    [
        (None, {"lin1", "lin2"}),
        ("lin1", {"lin1"}),
        ("lin*", {"lin1", "lin2"}),
        (["lin2/*", "nothing"], {"lin2"}),
        (lambda path: path.startswith("lin1/"), {"lin1"}),
        ("last_layer", {"lin2"}),
        ("nothing", set()),
    ],
)
def test_params_filter_leaves_parameters_out(params_filter, covered):
    layers = found("mlp", params_filter=params_filter)
    assert {layer.name for layer in layers if layer.block != "none"} == covered
    assert sum(layer.size for layer in layers) == 43
    for layer in layers:
        if layer.block == "none":
            assert (layer.pattern, layer.frozen) == ("frozen", True)
            assert layer.reason == "left out by `params_filter`: fixed at its value"
        else:
            assert layer.bias


def test_last_layer_has_its_bias_and_no_other():
    layers = found("scan_over_layers", params_filter="last_layer")
    covered = [layer for layer in layers if layer.block != "none"]
    assert [(layer.name, layer.bias) for layer in covered] == [("head", True)]
    with pytest.raises(ValueError, match="'last_layer'` needs a layer with a weight"):
        found("product_written_as_a_sum", params_filter="last_layer")


@pytest.mark.parametrize("block", ["dense", "diagonal", "none"])
def test_fallback_is_for_what_has_no_kronecker_form(block):
    blocks = {layer.name: layer.block for layer in found("nnx_layer_norm", fallback=block)}
    assert blocks == {"lin": "kronecker", "norm/bias": block, "norm/scale": block}
    chosen = found("nnx_layer_norm", fallback={"*/scale": block, "*": "diagonal"})
    assert chosen["norm/scale"].block == block
    assert chosen["norm/bias"].block == "diagonal"


def test_fallback_may_be_an_error():
    message = (
        r"the parameters at 'norm/\w+' have no Kronecker form \(.*\), and `fallback` is 'error'"
    )
    with pytest.raises(ValueError, match=message):
        found("nnx_layer_norm", fallback="error")
    assert found("mlp", fallback="error") == found("mlp")


def test_dense_limit_counts_the_entries_of_a_leaf():
    assert found("product_written_as_a_sum", dense_limit=12)["w"].block == "dense"
    assert found("product_written_as_a_sum", dense_limit=11)["w"].block == "diagonal"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fallback": "full"}, ValueError, "`fallback` must be one of .*, found 'full'"),
        ({"fallback": {"*": "full"}}, ValueError, "`fallback` must be one of .*, found 'full'"),
        ({"dense_limit": -1}, ValueError, "`dense_limit` must be an integer of at least 0"),
        (
            {"params_filter": 3},
            TypeError,
            r"`params_filter` must be a pattern such as 'encoder/\*'",
        ),
    ],
    ids=str,
)
def test_bad_selections_are_clear_errors(options, error, message):
    with pytest.raises(error, match=message):
        found("mlp", **options)
