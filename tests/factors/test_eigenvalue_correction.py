"""`ekfac` against the dense curvature: its diagonal in the Kronecker eigenbases is exact."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from support import models
from support.oracles import dense_empirical_fisher, dense_ggn
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.blocks.blocks import rotate_back

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
ORACLES = {"type2": dense_ggn, "empirical": dense_empirical_fisher}
NAMES = [
    "mlp",
    "nnx_cnn",
    "fused_product",  # attention
    "scan_over_layers",
    "scan_over_time",
    "tied",
    "tied_autoencoder",
    "embedding",
    "embedding_tied_to_the_output",
    "nnx_layer_norm",
    "weight_norm",
]
CASES = [(name, "type2") for name in NAMES] + [
    (name, "empirical") for name in ("mlp", "tied_autoencoder")
]


@functools.cache
def fitted(name, fisher_type="type2"):
    """The curvature without and with the correction, from one compilation."""
    model_fn, params, data = models.classified(name)
    acc = laplax_kfac.accumulator(
        model_fn, params, loss_fn="cross_entropy", fisher_type=fisher_type
    )
    batch = dict(zip(("input", "target"), data, strict=True))
    plain = acc.finalize(acc.update(acc.init(), batch))
    return plain, acc.correct(plain, [(batch, jnp.ones(models.NUM_EXAMPLES))])


@functools.cache
def exact(name, fisher_type="type2"):
    model_fn, params, data = models.classified(name)
    return np.asarray(ORACLES[fisher_type](model_fn, params, data, "cross_entropy"))


@jax.jit
def bases(curvature):
    """The basis of every block as one dense matrix, its vectors in columns."""
    found = []
    for layer, block in zip(curvature.layers, curvature.blocks, strict=True):
        units = jnp.eye(layer.size).reshape(layer.size, *layer.shape)
        columns = jax.vmap(functools.partial(rotate_back, block))(units)
        found.append(columns.reshape(layer.size, layer.size).T)
    return found


def blocks_of(curvature, dense):
    """(layer, block, its part of a dense matrix, its basis as one dense matrix) of every block."""
    matrices = map(np.asarray, bases(curvature))
    for layer, block, basis in zip(curvature.layers, curvature.blocks, matrices, strict=True):
        rows = [curvature.space.ids(segment) for segment in layer.segments]
        ids = np.concatenate(rows, axis=-2 if rows[0].ndim > 1 else 0).ravel()
        yield layer, block, dense[np.ix_(ids, ids)], basis


@pytest.mark.parametrize(("name", "fisher_type"), CASES)
def test_eigenvalues_are_the_diagonal_of_the_exact_block_in_its_basis(name, fisher_type):
    (_, curvature), dense = fitted(name, fisher_type), exact(name, fisher_type)
    kronecker = 0
    for layer, block, matrix, basis in blocks_of(curvature, dense):
        np.testing.assert_allclose(basis.T @ basis, np.eye(layer.size), **CLOSE)
        if layer.block == "kronecker":
            kronecker += 1
            # Of a stack, the matrices on the diagonal are blocks; their bases do not mix them.
            expected = np.diag(basis.T @ matrix @ basis).reshape(layer.shape)
            np.testing.assert_allclose(block.eigenvalues, expected, **CLOSE)
        np.testing.assert_allclose(np.sum(block.eigenvalues), np.trace(matrix), **CLOSE)
    assert kronecker > 0
    np.testing.assert_allclose(curvature.trace(), np.trace(dense), **CLOSE)


# The one Kronecker block of weight norm is a bias, and exact.
@pytest.mark.parametrize(("name", "fisher_type"), [c for c in CASES if c[0] != "weight_norm"])
def test_corrected_blocks_are_nearer_to_the_exact_ones(name, fisher_type):
    plain, corrected = fitted(name, fisher_type)
    dense, gains = exact(name, fisher_type), []
    pairs = zip(blocks_of(corrected, dense), blocks_of(plain, dense), strict=True)
    for (layer, new, matrix, basis), (_, old, _, old_basis) in pairs:
        np.testing.assert_array_equal(basis, old_basis)
        if layer.block != "kronecker":
            np.testing.assert_array_equal(new.eigenvalues, old.eigenvalues)
            continue
        ours, theirs = (
            (basis * np.ravel(block.eigenvalues)) @ basis.T - matrix for block in (new, old)
        )
        change = np.linalg.norm(np.asarray(new.eigenvalues) - np.asarray(old.eigenvalues))
        # The diagonal is a projection: by Pythagoras the correction can only help.
        squares = np.linalg.norm(ours) ** 2 + change**2
        np.testing.assert_allclose(np.linalg.norm(theirs) ** 2, squares, **CLOSE)
        gains.append(change / np.linalg.norm(matrix))
    assert max(gains) > 1e-4


def test_ekfac_is_kfac_with_the_correction():
    model_fn, params, data = models.classified("mlp")
    options: Any = {"loss_fn": "cross_entropy"}
    for found in (
        laplax_kfac.ekfac(model_fn, params, data, **options),
        laplax_kfac.kfac(model_fn, params, data, eigenvalue_correction=True, **options),
    ):
        assert isinstance(found, laplax_kfac.Curvature)
        assert found.layers == fitted("mlp")[1].layers
        np.testing.assert_allclose(found.to_dense(), fitted("mlp")[1].to_dense(), **CLOSE)
    plain = laplax_kfac.kfac(model_fn, params, data, **options)
    np.testing.assert_allclose(plain.to_dense(), fitted("mlp")[0].to_dense(), **CLOSE)


def test_the_correction_is_exact_in_the_bases_of_either_approximation():
    model_fn, params, data = models.classified("vmapped_over_tokens")
    traces = []
    for correction in (False, True):
        for approx in ("expand", "reduce"):
            curvature = laplax_kfac.kfac(
                model_fn, params, data, loss_fn="cross_entropy", kfac_approx=approx,
                eigenvalue_correction=correction,
            )  # fmt: skip
            traces.append(curvature.trace())
    right = np.trace(exact("vmapped_over_tokens"))
    assert abs(traces[1] - right) > 0.01 * right  # plain, and reduce
    np.testing.assert_allclose(traces[2:], right, **CLOSE)


def test_separate_biases_are_corrected_too():
    model_fn, params, data = models.classified("mlp")
    curvature = laplax_kfac.ekfac(
        model_fn, params, data, loss_fn="cross_entropy", separate_weight_and_bias=True
    )
    assert len(curvature.layers) == 4
    for layer, block, matrix, basis in blocks_of(curvature, exact("mlp")):
        expected = np.diag(basis.T @ matrix @ basis).reshape(layer.shape)
        np.testing.assert_allclose(block.eigenvalues, expected, **CLOSE)


# -- data --------------------------------------------------------------------------------------


def cut(data, *starts):
    pairs = zip([0, *starts], [*starts, models.NUM_EXAMPLES], strict=True)
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], data) for a, b in pairs]


@pytest.mark.parametrize(
    ("name", "starts", "batch_size"),
    [
        ("mlp", (1, 2), 256),
        ("mlp", (2,), 256),
        ("mlp", (), 2),
        ("embedding_tied_to_the_output", (2,), 256),
    ],
    ids=["batches", "a ragged list", "split by us", "a ragged list of tokens"],
)
def test_the_split_of_the_data_does_not_matter(name, starts, batch_size):
    model_fn, params, data = models.classified(name)
    batches = cut(data, *starts) if starts else data
    found = laplax_kfac.ekfac(
        model_fn, params, batches, loss_fn="cross_entropy", batch_size=batch_size
    )
    np.testing.assert_allclose(found.trace(), fitted(name)[1].trace(), **CLOSE)
    # Eigenvectors of a degenerate space are arbitrary, and corrected eigenvalues depend on them:
    # what must hold for any split is that they are exact in their own basis.
    for layer, block, matrix, basis in blocks_of(found, exact(name)):
        if layer.block == "kronecker":
            expected = np.diag(basis.T @ matrix @ basis).reshape(layer.shape)
            np.testing.assert_allclose(block.eigenvalues, expected, **CLOSE)


def test_a_generator_cannot_be_iterated_twice():
    model_fn, params, data = models.classified("mlp")
    once = (batch for batch in cut(data, 1))
    with pytest.raises(TypeError, match=r"is an iterator, which ends after one pass\. Pass"):
        laplax_kfac.ekfac(model_fn, params, once, loss_fn="cross_entropy")


def test_both_passes_draw_the_same_targets_and_every_batch_others():
    model_fn, params, (x, _) = models.classified("mlp")
    acc = laplax_kfac.accumulator(
        model_fn, params, loss_fn="mse", fisher_type="mc", key=jax.random.key(3)
    )
    batch, weights = {"input": x[:1], "target": np.zeros((1, 3))}, jnp.ones(1)
    # For one example and one position the Kronecker product of one draw is exact: the correction
    # leaves it as it is, unless the second pass draws anew.
    once = acc.finalize(acc.update(acc.init(), batch))
    corrected = acc.correct(once, [(batch, weights)])
    assert once.trace() > 0.1
    for found, expected in zip(corrected.blocks, once.blocks, strict=True):
        np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, **CLOSE)
    twice = acc.correct(once, [(batch, weights)] * 2).trace()
    assert abs(twice - 2 * once.trace()) > 0.01 * once.trace()


# -- transformations and laplax ----------------------------------------------------------------


def test_a_whole_fit_works_under_jit():
    model_fn, params, data = models.classified("mlp")
    found = jax.jit(
        lambda p, data: laplax_kfac.ekfac(model_fn, p, data, loss_fn="cross_entropy").trace()
    )(params, data)
    np.testing.assert_allclose(found, np.trace(exact("mlp")), **CLOSE)


def test_laplax_runs_it():
    model_fn, params, data = models.classified("mlp")
    posterior_fn, curvature = laplax.laplace(
        model_fn, params, data, loss_fn="cross_entropy", curv_type="ekfac"
    )
    assert curvature.layers == fitted("mlp")[1].layers
    np.testing.assert_allclose(curvature.to_dense(), fitted("mlp")[1].to_dense(), **CLOSE)
    posterior = posterior_fn({"prior_prec": 0.5})
    v = jax.tree.map(jnp.ones_like, params)
    found = posterior.cov_mv(posterior.state)(v)
    expected = fitted("mlp")[1].inverse_mv(v, prior_prec=0.5)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)
