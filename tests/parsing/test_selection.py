"""Chosen parameters get the blocks that they have anyway; the others are fixed."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import models
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.parsing.program import parse
from laplax_kfac.parsing.selection import matches, select

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)


# -- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "patterns", "expected"),
    [
        ("encoder/attention/kernel", ["encoder"], True),
        ("encoder/attention/kernel", ["encoder/*"], True),
        ("encoder/attention/kernel", ["*/kernel"], True),
        ("encoder/attention/kernel", ["encoder/attention"], True),
        ("encoder/attention/kernel", ["kernel"], False),
        ("encoder/attention/kernel", ["attention/*"], False),
        ("encoder/attention/kernel", ["Encoder/*"], False),
        ("encoder2/kernel", ["encoder"], False),
        ("encoder2/kernel", ["encoder?", "nothing"], True),
        ("encoder2/kernel", ["encoder[13]/*"], False),
        ("kernel", [], False),
        ("layers/2/weight", [".layers[2].weight"], True),
        ("layers/2/weight", ["layers[2]*"], True),
        ("layers/2/weight", ["layers[1]*"], False),
        ("layers/21/weight", ["layers[2]"], False),
        ("layers2/weight", ["layers[2]*"], True),
        ("layers/2/weight", ["layers.2"], True),
        ("first/w", ["['first']['w']"], True),
        ("first/w", ['["first"]'], True),
        ("first/kernel", ["['first']['kernel'].value"], True),
        ("blocks.0.w", ["blocks.0.w"], True),
        ("blocks.0/w", ["['blocks.0']['w']"], True),
        ("mlp/~/linear_0/w", ["['mlp/~/linear_0']['w']"], True),
        ("mlp/~/linear_0/w", ["['mlp/~/linear_1']['w']"], False),
        ("encoder/layers/2/weight", ["encoder/layers[2]"], True),
        ("layers/21/weight", ["layers[2]*"], False),
        ("layers/2/mlp/weight", ["layers[2]*.weight"], True),
        ("layers/21/mlp/weight", ["layers[2]*.weight"], False),
        ("~/pos", ["['~']['pos']"], True),
        ("params/pos", ["['params']['pos']"], True),
    ],
)
def test_patterns_match_a_path_or_a_module_above_it(path, patterns, expected):
    assert matches(path, patterns) is expected


@pytest.mark.parametrize(
    ("params_filter", "covered"),
    [
        (None, {"a/w", "a/b", "b/w"}),
        ("a", {"a/w", "a/b"}),
        ("*/w", {"a/w", "b/w"}),
        (["b/*", "a/b"], {"a/b", "b/w"}),
        (("a/w",), {"a/w"}),
        ([], set()),
        (lambda path: path.endswith("b"), {"a/b"}),
        (lambda path: path.count("b"), {"a/b", "b/w"}),
    ],
)
def test_filters_cover_paths(params_filter, covered):
    selection = select(params_filter)
    assert {p for p in ("a/w", "a/b", "b/w") if selection.covers(p)} == covered
    assert all(isinstance(selection.covers(p), bool) for p in ("a/w", "a/b"))


@pytest.mark.parametrize("name", ["nnx_mlp", "linen_mlp", "equinox_mlp", "haiku_mlp"])
def test_paths_that_frontends_print_choose_one_leaf(name):
    model_fn, params, inputs, _ = models.by_name(name).make()
    paths = [path for layer in laplax_kfac.find_layers(model_fn, params, inputs[0])
             for path in layer.params]  # fmt: skip
    for path in paths:
        filtered = laplax_kfac.find_layers(model_fn, params, inputs[0], params_filter=path)
        assert [p for layer in filtered for p in layer.params if not layer.frozen] == [path]
        selection = select(fallback={path: "none"})
        kinds = [
            selection.fallback_for(name) for name in parse(model_fn, params, inputs[0]).space.names
        ]
        assert sorted(kinds) == ["dense"] * (len(paths) - 1) + ["none"]


def test_the_first_pattern_that_matches_decides_the_fallback():
    selection = select(fallback={"norm/scale": "none", "norm": "diagonal", "*/bias": "error"})
    assert [
        selection.fallback_for(p) for p in ("norm/scale", "norm/bias", "lin/bias", "lin/kernel")
    ] == ["none", "diagonal", "error", "dense"]
    assert select(fallback="diagonal").fallback_for("anything/at/all") == "diagonal"


# -- layers ------------------------------------------------------------------------------------


def found(name, **options):
    model_fn, params, inputs, _ = models.by_name(name).make()
    one = jax.tree.map(lambda x: x[0], inputs)
    return laplax_kfac.find_layers(model_fn, params, one, **options)


def covered(layers):
    return {layer.name: layer.block for layer in layers if layer.block != "none"}


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("mlp", "lin2"),
        ("mlp_weight_on_the_left", "lin2"),
        ("nnx_mlp", "lin2"),
        ("nnx_cnn", "lin"),
        ("scan_over_layers", "head"),
        ("embedding", "out"),
        ("flat_vector", None),
        ("siamese", "head"),
    ],
)
def test_the_last_layer_is_the_last_weight_with_its_bias(name, last):
    layers = found(name, params_filter="last_layer")
    if last is None:  # all layers in one leaf: it is covered as a whole
        assert covered(layers) == covered(found(name))
        return
    (layer,) = [ly for ly in layers if ly.block != "none"]
    whole = found(name)[last]
    assert (layer.name, layer.bias, layer.size) == (last, whole.bias, whole.size)
    left_out = [ly for ly in layers if ly.block == "none"]
    assert left_out
    assert all(ly.frozen for ly in left_out)
    assert {ly.reason for ly in left_out} == {"left out by `params_filter`: fixed at its value"}


def test_a_model_without_a_weight_has_no_last_layer():
    with pytest.raises(ValueError, match="'last_layer'` needs a layer with a weight; the model ha"):
        found("product_written_as_a_sum", params_filter="last_layer")


@pytest.mark.parametrize("kind", ["dense", "diagonal", "none"])
def test_fallbacks_by_pattern_are_for_the_leaves_that_match(kind):
    layers = found("weight_norm", fallback={"v": kind, "*": "diagonal"})
    blocks = {layer.name: layer.block for layer in layers}
    assert blocks == {"b": "kronecker", "g": "diagonal", "v": kind}


def test_a_fallback_that_is_an_error_names_the_leaf_and_the_reason():
    message = re.escape(
        "the parameters at 'g' have no Kronecker form (multiplied by another parameter"
    )
    with pytest.raises(ValueError, match=message + ".*`fallback` is 'error' for them"):
        found("weight_norm", fallback={"g": "error"})
    # Left out, or not met by a pattern, nothing is wrong.
    assert covered(found("weight_norm", fallback={"b": "error"}))["g"] == "dense"
    chosen = found("weight_norm", fallback="error", params_filter="b")
    assert covered(chosen) == {"b": "kronecker"}


@pytest.mark.parametrize(
    ("limit", "blocks"),
    [
        (12, {"g": "dense", "v": "dense"}),
        (11, {"g": "dense", "v": "kronecker"}),
        (3, {"g": "dense", "v": "kronecker"}),
        (2, {"g": "diagonal", "v": "kronecker"}),
        (0, {"g": "diagonal", "v": "kronecker"}),
    ],
)
def test_the_limit_of_dense_blocks_is_inclusive(limit, blocks):
    assert covered(found("weight_norm", dense_limit=limit)) == {"b": "kronecker"} | blocks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"params_filter": 3}, TypeError, "found 3"),
        ({"params_filter": ["lin1", 2]}, TypeError, r"found \['lin1', 2\]"),
        ({"params_filter": {"lin1"}}, TypeError, "must be a pattern such as 'encoder/\\*', a list"),
        ({"fallback": "full"}, ValueError, "`fallback` must be one of .*; found 'full'"),
        ({"fallback": None}, ValueError, "`fallback` must be one of .*; found None"),
        ({"fallback": {"lin1": "kfac"}}, ValueError, "`fallback` must be one of .*; found 'kfac'"),
        ({"dense_limit": -1}, ValueError, "must be an integer of at least 0, found -1"),
        ({"dense_limit": 2.5}, ValueError, r"must be an integer of at least 0, found 2\.5"),
        ({"dense_limit": "all"}, ValueError, "must be an integer of at least 0, found 'all'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [laplax_kfac.kfac, laplax_kfac.accumulator])
def test_bad_values_are_clear_errors(function, options, error, message):
    model_fn, params, *data = fit_of("mlp")
    arguments = [tuple(data)] if function is laplax_kfac.kfac else []
    with pytest.raises(error, match=message):
        function(model_fn, params, *arguments, loss_fn="mse", **options)


@pytest.mark.parametrize(
    ("params_filter", "covered"),
    [
        (None, {"lin1", "lin2"}),
        ("lin1", {"lin1"}),
        ("lin*", {"lin1", "lin2"}),
        (["lin2/*", "lin1"], {"lin1", "lin2"}),
        (lambda path: path.startswith("lin1/"), {"lin1"}),
        ("last_layer", {"lin2"}),
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
        ({"fallback": "full"}, ValueError, "`fallback` must be one of .*; found 'full'"),
        ({"fallback": {"*": "full"}}, ValueError, "`fallback` must be one of .*; found 'full'"),
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


# -- fits --------------------------------------------------------------------------------------


@functools.cache
def fit_of(name):
    """A model, its parameters, inputs and targets."""
    model_fn, params, inputs, _ = models.by_name(name).make()
    outputs = jax.eval_shape(jax.vmap(lambda x: model_fn(input=x, params=params)), inputs)
    return model_fn, params, inputs, np.zeros(outputs.shape)


@jax.jit
def _dense(curvature):
    return curvature.to_dense()


def to_dense(curvature):
    return np.asarray(_dense(curvature))


@functools.cache
def whole(name, correction=False):
    model_fn, params, *data = fit_of(name)
    return laplax_kfac.kfac(
        model_fn, params, tuple(data), loss_fn="mse", eigenvalue_correction=correction
    )


@pytest.mark.parametrize(
    ("name", "params_filter", "kept", "correction"),
    [
        ("mlp", "last_layer", ["lin2"], False),
        ("mlp", ["lin1"], ["lin1"], True),
        ("nnx_layer_norm", "norm/*", ["norm/bias", "norm/scale"], False),
        ("scan_over_layers", lambda path: "layers" in path, ["layers"], False),
        ("embedding", "table", ["table"], False),
        ("weight_norm", "v", ["v"], False),
    ],
)
def test_a_filter_leaves_the_other_blocks_as_they_are(name, params_filter, kept, correction):
    model_fn, params, *data = fit_of(name)
    curvature = laplax_kfac.kfac(
        model_fn, params, tuple(data), loss_fn="mse", params_filter=params_filter,
        eigenvalue_correction=correction,
    )  # fmt: skip
    assert list(covered(curvature.layers)) == kept
    assert sum(layer.size for layer in curvature.layers) == curvature.space.size
    # The paths that are left out, from the unfiltered layers: those of no layer that is kept.
    paths = {p for ly in whole(name).layers if ly.name in kept for p in ly.params}
    inside = np.concatenate([
        np.full(leaf.size, jax.tree_util.keystr(path) in paths)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ])  # fmt: skip
    assert inside.any() == bool(kept)
    assert not inside.all()
    dense = to_dense(whole(name, correction))
    expected = np.where(np.outer(inside, inside), dense, 0.0)
    assert not np.allclose(dense, expected)
    np.testing.assert_allclose(to_dense(curvature), expected, **CLOSE)


def test_a_weight_without_its_bias_has_a_block_of_its_own():
    model_fn, params, *data = fit_of("mlp")
    options: Any = {"loss_fn": "mse"}
    found, separate = (
        laplax_kfac.kfac(model_fn, params, tuple(data), **options, **other)
        for other in ({"params_filter": "*/w"}, {"separate_weight_and_bias": True})
    )
    assert covered(found.layers) == {"lin1/w": "kronecker", "lin2/w": "kronecker"}
    assert not any(layer.bias for layer in found.layers)
    weights = np.asarray(ravel_pytree({k: {"b": np.zeros_like(p["b"]), "w": np.ones_like(p["w"])}
                                       for k, p in params.items()})[0]) == 1  # fmt: skip
    expected = np.where(np.outer(weights, weights), to_dense(separate), 0.0)
    np.testing.assert_allclose(to_dense(found), expected, **CLOSE)


LEFT_OUT: dict[str, tuple[dict[str, Any], float]] = {
    "filtered": ({"params_filter": "lin"}, 0.0),  # fixed at their value
    "no fallback": ({"fallback": "none"}, 0.25),  # the prior's variance
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_filtered_parameters_are_fixed_and_those_without_a_block_keep_their_prior(case):
    options, variance = LEFT_OUT[case]
    model_fn, params, *data = fit_of("nnx_layer_norm")
    curvature = laplax_kfac.kfac(model_fn, params, tuple(data), loss_fn="mse", **options)
    left_out = {layer.name: layer for layer in curvature.layers if layer.block == "none"}
    assert set(left_out) == {"norm/bias", "norm/scale"}
    assert all(layer.frozen is (variance == 0.0) for layer in left_out.values())
    outside = np.zeros(35, bool)
    for layer in left_out.values():
        outside[np.ravel(curvature.space.ids(layer.segments[0]))] = True
    assert outside.sum() == 10

    @jax.jit
    def posterior(curvature):
        ones = jax.tree.map(jnp.ones_like, params)
        samples = curvature.sample(jax.random.key(0), 20_000, params, prior_prec=4.0)
        return (
            ravel_pytree(curvature.diagonal())[0],
            ravel_pytree(laplax_kfac.make_posterior(curvature, 4.0).covariance_diagonal())[0],
            ravel_pytree(curvature.inverse_mv(ones, prior_prec=4.0))[0],
            jax.vmap(lambda s: ravel_pytree(s)[0])(samples) - ravel_pytree(params)[0],
            curvature.logdet(prior_prec=4.0),
        )

    diagonal, variances, product, offsets, determinant = map(np.asarray, posterior(curvature))
    np.testing.assert_array_equal(diagonal[outside], 0.0)
    np.testing.assert_allclose(variances[outside], variance, rtol=1e-12)
    np.testing.assert_allclose(product[outside], variance, rtol=1e-12)
    spread = np.std(offsets[:, outside], axis=0)
    np.testing.assert_allclose(spread, np.sqrt(variance), rtol=6 / np.sqrt(40_000))
    # Elsewhere the curvature has been heeded.
    assert variances[~outside].min() < 0.2
    assert (variances[~outside] > 0).all()
    free = ~outside if variance == 0.0 else np.ones(35, bool)
    precision = to_dense(curvature)[np.ix_(free, free)] + 4.0 * np.eye(free.sum())
    np.testing.assert_allclose(determinant, np.linalg.slogdet(precision)[1], **CLOSE)
