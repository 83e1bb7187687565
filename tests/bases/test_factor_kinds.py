"""Kinds of factors from the keyword to the predictive: all that is done with a curvature."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import models
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.bases import kind_of
from laplax_kfac.blocks.blocks import rotate_back
from laplax_kfac.parsing.selection import select

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
NAMES = ["mlp", "nnx_cnn", "scan_over_layers"]
KINDS = [("blocked:3", "blocked:2"), ("identity", "dense"), ("dense", "diagonal")]
some = pytest.mark.parametrize("name", NAMES)
kinds = pytest.mark.parametrize("kinds", KINDS, ids="-".join)


@functools.cache
def fitted(name: str, kinds: tuple[str, str] | None, refine: str = "kfac") -> Any:
    model_fn, params, data = models.classified(name)
    wanted = None if kinds is None else {"*": kinds}
    fit = getattr(laplax_kfac, refine)
    found = fit(model_fn, params, data, loss_fn="cross_entropy", factor_kinds=wanted)
    return model_fn, params, data, found


def ids_of(layer, space):
    rows = [space.ids(segment) for segment in layer.segments]
    return np.concatenate(rows, axis=-2).reshape(layer.stack, -1)


def restricted(text, matrices):
    """Of a stack of matrices, what is of the kind."""
    kind, size = kind_of(text), matrices.shape[-1]
    total = kind.finished(kind.of_matrix(jnp.asarray(matrices)))
    units = jnp.eye(size)[:, None] * jnp.ones((len(matrices), 1))
    return np.moveaxis(np.asarray(kind.times(units, total)), 0, -2)


def partial_traces(blocks, layer):
    """A tr(B) and B tr(A) for every matrix A kron B of a stack."""
    shape = (-1, layer.rows, layer.out_features) * 1
    blocks = blocks.reshape(*shape, layer.rows, layer.out_features)
    return np.einsum("kiojo->kij", blocks), np.einsum("kioip->kop", blocks)


def kronecker(curvature):
    """(layer, stack of dense blocks) of the Kronecker layers."""
    dense = np.asarray(curvature.to_dense())
    for layer in curvature.layers:
        if layer.block == "kronecker":
            ids = ids_of(layer, curvature.space)
            yield layer, np.stack([dense[np.ix_(i, i)] for i in ids])


@kinds
@some
def test_factors_are_restricted(name, kinds):
    free, found = fitted(name, None)[-1], fitted(name, kinds)[-1]
    for (layer, ours), (_, theirs) in zip(kronecker(found), kronecker(free), strict=True):
        assert layer.sides == kinds
        pairs = zip(*partial_traces(theirs, layer), theirs, ours, strict=True)
        for a, b, all_entries, mine in pairs:
            np.testing.assert_allclose(  # theirs is a kron b over its own trace
                np.kron(a, b), np.trace(all_entries) * all_entries, **CLOSE
            )
            expected = np.kron(restricted(kinds[0], a[None])[0], restricted(kinds[1], b[None])[0])
            np.testing.assert_allclose(np.trace(all_entries) * mine, expected, **CLOSE)


@kinds
@some
def test_corrected_eigenvalues_are_exact_in_the_bases(name, kinds):
    model_fn, params, data, corrected = fitted(name, kinds, "ekfac")
    exact = laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy", curvature="block")
    np.testing.assert_allclose(corrected.trace(), exact.trace(), **CLOSE)
    dense = np.asarray(exact.to_dense())
    for layer, block in zip(corrected.layers, corrected.blocks, strict=True):
        if layer.block != "kronecker":
            continue
        units = jnp.eye(layer.rows * layer.out_features)
        units = units.reshape(len(units), *layer.shape[-2:])
        for k, ids in enumerate(ids_of(layer, corrected.space)):
            one = jax.tree.map(lambda x, k=k: x[k], block) if layer.stack > 1 else block
            back = functools.partial(rotate_back, one)
            basis = np.asarray(jax.vmap(back)(units)).reshape(len(units), -1)
            expected = np.diag(basis @ dense[np.ix_(ids, ids)] @ basis.T)
            np.testing.assert_allclose(one.eigenvalues.ravel(), expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "nnx_cnn"])
@kinds
def test_optimal_factors_are_the_nearest_of_their_kinds(name, kinds):
    """At the nearest product every factor is the best given the other: the error is orthogonal."""
    model_fn, params, data, found = fitted(name, kinds, "kfoc")
    exact = laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy", curvature="block")
    dense, plain = np.asarray(exact.to_dense()), dict_of(fitted(name, kinds)[-1])
    for layer, blocks in kronecker(found):
        (ids,), (block,) = ids_of(layer, found.space), blocks
        error = (dense[np.ix_(ids, ids)] - block).reshape(layer.shape * 2)
        a, b = (m[0] for m in partial_traces(blocks, layer))
        scale = np.linalg.norm(block)
        left = restricted(kinds[0], np.einsum("iojp,op->ij", error, b)[None])
        right = restricted(kinds[1], np.einsum("iojp,ij->op", error, a)[None])
        np.testing.assert_allclose(left / scale / np.linalg.norm(b), 0.0, atol=1e-6)
        np.testing.assert_allclose(right / scale / np.linalg.norm(a), 0.0, atol=1e-6)
        theirs = np.linalg.norm(dense[np.ix_(ids, ids)] - plain[layer.name][0])
        assert np.linalg.norm(error) <= theirs * (1 + 1e-9)


def dict_of(curvature):
    return {layer.name: blocks for layer, blocks in kronecker(curvature)}


@kinds
def test_posteriors_and_predictives_are_those_of_the_dense_matrix(kinds):
    model_fn, params, (inputs, _), curvature = fitted("mlp", kinds)
    precision = np.asarray(curvature.to_dense()) + 0.7 * np.eye(curvature.space.size)
    posterior = laplax_kfac.make_posterior(curvature, 0.7)
    covariance = np.linalg.inv(precision)
    v = jax.tree.map(lambda x: models.normal(x.shape), params)
    np.testing.assert_allclose(
        ravel_pytree(posterior.covariance_mv(v))[0], covariance @ ravel_pytree(v)[0], **CLOSE
    )
    np.testing.assert_allclose(
        ravel_pytree(curvature.diagonal())[0], np.diag(curvature.to_dense()), **CLOSE
    )
    expected = np.linalg.slogdet(precision)[1]
    np.testing.assert_allclose(curvature.logdet(prior_prec=0.7), expected, **CLOSE)
    jacobian = jax.vmap(
        lambda x: ravel_jacobian(jax.jacrev(lambda p: model_fn(input=x, params=p))(params))
    )(inputs)
    expected = np.einsum("ncp,pq,ndq->ncd", jacobian, covariance, jacobian)
    predictive = laplax_kfac.predictive_variance(
        curvature, model_fn, params, inputs, prior_prec=0.7
    )
    np.testing.assert_allclose(predictive.variance, np.einsum("ncc->nc", expected), **CLOSE)


def ravel_jacobian(tree):
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


@kinds
@some
def test_evidence_sums_and_files(name, kinds, tmp_path):
    model_fn, params, data, curvature = fitted(name, kinds)
    laplax_kfac.save(tmp_path / "file", curvature)
    again = laplax_kfac.load(tmp_path / "file", params)
    assert again.layers == curvature.layers
    np.testing.assert_array_equal(again.to_dense(), curvature.to_dense())
    doubled = laplax_kfac.merge(curvature, again)
    assert doubled.layers == curvature.layers
    np.testing.assert_allclose(doubled.to_dense(), 2 * curvature.to_dense(), **CLOSE)
    error = laplax_kfac.relative_error(again, model_fn, params, data, loss_fn="cross_entropy")
    assert 0.0 < error.total < 1.5
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="cross_entropy")

    def evidence(matrix):
        return laplax_kfac.log_marginal_likelihood(
            matrix, params, log_likelihood=fit, prior_prec=0.7
        ).value

    precision = np.asarray(curvature.to_dense()) + 0.7 * np.eye(curvature.space.size)
    zero = curvature.map(jnp.zeros_like)
    change = np.linalg.slogdet(precision)[1] - curvature.space.size * np.log(0.7)
    np.testing.assert_allclose(
        evidence(zero) - evidence(curvature), 0.5 * change, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("other", [None, *KINDS], ids=str)
def test_sums_of_different_kinds(other):
    first, second = fitted("mlp", KINDS[0])[-1], fitted("mlp", other)[-1]
    total = laplax_kfac.merge(first, second)
    np.testing.assert_allclose(total.trace(), first.trace() + second.trace(), **CLOSE)
    for layer, block in zip(total.layers, total.blocks, strict=True):
        assert layer.sides == tuple(basis.kind.text for basis in block.sides)
    exact = first.to_dense() + second.to_dense()
    assert np.linalg.norm(total.to_dense() - exact) < 0.3 * np.linalg.norm(exact)
    back = laplax_kfac.merge(second, first)
    np.testing.assert_allclose(back.to_dense(), total.to_dense(), **CLOSE)


def test_accumulated_states_have_the_kinds():
    model_fn, params, data = models.classified("mlp")
    whole = fitted("mlp", KINDS[0])[-1]
    acc = laplax_kfac.accumulator(
        model_fn, params, loss_fn="cross_entropy", factor_kinds={"*": KINDS[0]}
    )
    halves = [jax.tree.map(lambda x, k=k: x[k::2], data) for k in range(2)]
    states = [acc.update(acc.init(), half) for half in halves]
    found = acc.finalize(acc.merge(*states))
    np.testing.assert_allclose(found.to_dense(), whole.to_dense(), **CLOSE)
    assert found.layers == whole.layers


# -- what may be asked for ---------------------------------------------------------------------


def layers_of(name, **options):
    model_fn, params, inputs, _ = models.by_name(name).make()
    one = jax.tree.map(lambda x: x[0], inputs)
    return {ly.name: ly for ly in laplax_kfac.find_layers(model_fn, params, one, **options)}


def test_one_kind_is_for_all_inputs_but_those_of_lookups():
    found = layers_of("embedding", factor_kinds="blocked:2")
    sides = {layer.pattern: layer.sides for layer in found.values()}
    assert sides == {"dense": ("blocked:2", "dense"), "embedding": ("diagonal", "dense")}


def test_kinds_by_layer():
    found = layers_of("mlp", factor_kinds={"lin1": "diagonal", "lin*": ("blocked:4", "identity")})
    assert found["lin1"].sides == ("diagonal", "diagonal")
    assert found["lin2"].sides == ("blocked:4", "identity")
    assert layers_of("mlp")["lin1"].sides == ("dense", "dense")


def test_smaller_factors_take_less_memory():
    dense, blocked, diagonal = (
        layers_of("mlp", factor_kinds={"*": kind})["lin1"]
        for kind in ("dense", "blocked:2", "diagonal")
    )
    assert dense.factor_elements > blocked.factor_elements > diagonal.factor_elements
    assert dense.basis_elements > blocked.basis_elements > diagonal.basis_elements == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "sparse",
            "'sparse' is no kind of factor; the kinds of `factor_kinds` are 'identity', 'diagonal'",
        ),
        ({"*": "sparse"}, "'sparse' is no kind of factor"),
        (
            {"*": ("dense", "dense", "dense")},
            r"a pair of them.*found \('dense', 'dense', 'dense'\)",
        ),
        ({"conv": "dense"}, "names 'conv', which matches none of the layers: 'out'"),
        ({"*": "blocked:2"}, "asks for 'blocked:2' in layer 'table'.* of rows that data pick"),
    ],
)
def test_other_kinds_and_layers_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        layers_of("embedding", factor_kinds=wanted)


@pytest.mark.parametrize(
    ("wide", "kind"), [("diagonal", "diagonal"), ("blocks", "blocked:3"), (None, "diagonal")]
)
def test_wide_factors_are_of_another_kind_and_the_report_says_so(wide, kind):
    options = {} if wide is None else {"wide_factors": wide}
    model_fn, params, data = models.classified("mlp")
    limited = functools.partial(laplax_kfac.kfac, model_fn, params, data, loss_fn="cross_entropy")
    found = limited(max_factor_size=3, **options)
    sizes = {layer.name: (layer.rows, layer.out_features) for layer in found.layers}
    expected = {n: tuple(kind if s > 3 else "dense" for s in sizes[n]) for n in sizes}
    assert {layer.name: layer.sides for layer in found.layers} == expected
    assert {*expected.values()} == {(kind, "dense"), (kind, kind)}
    same = limited(factor_kinds=expected)
    np.testing.assert_array_equal(found.to_dense(), same.to_dense())
    inputs = jax.tree.map(lambda x: x[0], data[0])
    report = laplax_kfac.find_layers(model_fn, params, inputs, max_factor_size=3, **options)
    assert f"the output factor is {kind}: 5 features are more than `max_factor_size`" in str(report)


def test_wide_factors_by_layer_stop_where_a_kind_is_asked_for():
    wide = {"lin1": "error", "*": "blocks"}
    with pytest.raises(ValueError, match="layer 'lin1' has a factor of 5 features, more than"):
        layers_of("mlp", max_factor_size=3, wide_factors=wide)
    kinds = {"lin1": "dense"}
    found = layers_of("mlp", max_factor_size=3, wide_factors=wide, factor_kinds=kinds)
    assert found["lin1"].sides == ("dense", "dense")
    assert found["lin2"].sides[0] == "blocked:3"
    assert "max_factor_size" not in found["lin1"].reason
    largest = max(layer.rows for layer in found.values())
    assert layers_of("mlp", max_factor_size=largest, wide_factors="error") == layers_of("mlp")


def test_rows_that_data_pick_are_no_wide_factor():
    found = layers_of("embedding", max_factor_size=5, wide_factors="error")
    assert found["table"].rows > 5
    assert found["table"].sides == ("diagonal", "dense")


def test_dense_blocks_are_limited_and_met_again():
    model_fn, params, data = models.classified("mlp")
    fit = functools.partial(
        laplax_kfac.kfac, model_fn, params, data, loss_fn="cross_entropy", curvature="block"
    )
    with pytest.raises(ValueError, match=r"at most 24 are allowed.*raise `max_factor_size`"):
        fit(max_factor_size=24)
    found = fit(max_factor_size=25)
    error = laplax_kfac.relative_error(found, model_fn, params, data, loss_fn="cross_entropy")
    np.testing.assert_allclose(error.total, 0.0, atol=1e-10)


def test_a_selection_has_kinds_as_texts():
    assert select(factor_kinds="blocked").kinds_for("any") == ("blocked:64", None)
    assert select().kinds_for("any") == (None, None)


def test_nothing_pulled_back_leaves_the_identity():
    model_fn, params, data = models.classified("mlp")
    curvature = laplax_kfac.kfac(
        model_fn, params, data, loss_fn="cross_entropy", fisher_type="forward_only"
    )
    assert {layer.sides for layer in curvature.layers} == {("dense", "identity")}
    assert [block.sides[1].num_elements for block in curvature.blocks] == [0, 0]
    acc = laplax_kfac.accumulator(
        model_fn, params, loss_fn="cross_entropy", fisher_type="forward_only"
    )
    state: Any = acc.update(acc.init(), data)
    assert {layer.sides for layer in state.layers} == {("dense", "identity")}
    assert all(sums.outputs.scale.shape == (1, 1) for sums in state.sums)
