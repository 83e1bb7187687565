"""Every flavour of curvature with every kind of layer, against its definition written densely."""

import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from support import models
from support.oracles import LOSSES, dense_empirical_fisher, dense_ggn
from support.tolerances import tolerance

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
LOSS = "cross_entropy"
MODELS = [
    "mlp",
    "nnx_cnn",
    "fused_product",  # attention
    "grouped_einsum",  # a stack
    "scan_over_layers",
    "scan_over_time",
    "cond_branches",
    "tied",
    "tied_autoencoder",
    "embedding",
    "embedding_tied_to_the_output",
    "nnx_layer_norm",
    "weight_norm",
]


@functools.cache
def fitted(name: str, **options: Any) -> laplax_kfac.Curvature:
    model_fn, params, data = models.classified(name)
    return laplax_kfac.kfac(model_fn, params, data, loss_fn=LOSS, **options)


@functools.cache
def exact(name: str, fisher_type: str = "type2") -> np.ndarray:
    oracle = dense_empirical_fisher if fisher_type == "empirical" else dense_ggn
    model_fn, params, data = models.classified(name)
    return np.asarray(oracle(model_fn, params, data, LOSS))


def ids_of(layer: Any, space: Any) -> np.ndarray:
    """Numbers of a layer's parameters; (stack, rows, columns) where they are a matrix."""
    rows = [space.ids(segment) for segment in layer.segments]
    return np.concatenate(rows, axis=-2 if rows[0].ndim > 1 else 0)


def stack_of_blocks(dense: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The blocks (stack, p, p) of a dense matrix that belong to the matrices of a layer."""
    flat = ids.reshape(ids.shape[0], -1)
    return np.stack([dense[np.ix_(i, i)] for i in flat])


def kronecker_layers(curvature: Any) -> list[Any]:
    return [layer for layer in curvature.layers if layer.block == "kronecker"]


# -- exact curvature of other structure --------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_block_is_the_exact_matrix_of_every_layer(name, fisher_type):
    if fisher_type == "empirical" and name not in ("mlp", "nnx_cnn", "tied_autoencoder"):
        pytest.skip("the same code as for type2")
    curvature = fitted(name, curvature="block", fisher_type=fisher_type)
    dense = exact(name, fisher_type)
    expected = np.zeros_like(dense)
    for layer in curvature.layers:
        assert layer.block in ("dense", "none")
        ids = ids_of(layer, curvature.space).ravel()
        expected[np.ix_(ids, ids)] = dense[np.ix_(ids, ids)]
    np.testing.assert_allclose(curvature.to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_diagonal_is_the_exact_one(name, fisher_type):
    if fisher_type == "empirical" and name not in ("mlp", "nnx_cnn", "tied_autoencoder"):
        pytest.skip("the same code as for type2")
    curvature = fitted(name, curvature="diagonal", fisher_type=fisher_type)
    assert {layer.block for layer in curvature.layers} <= {"diagonal", "none"}
    expected = np.diag(np.diag(exact(name, fisher_type)))
    np.testing.assert_allclose(curvature.to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "nnx_cnn", "tied", "embedding"])
def test_full_is_the_exact_matrix_of_all_parameters(name, fisher_type):
    curvature = fitted(name, curvature="full", fisher_type=fisher_type)
    assert [layer.name for layer in curvature.layers if layer.block == "dense"] == ["full"]
    np.testing.assert_allclose(curvature.to_dense(), exact(name, fisher_type), **CLOSE)


@pytest.mark.parametrize("curvature", ["full", "diagonal"])
@pytest.mark.parametrize("by", ["mask", "indices"])
def test_subnetworks_are_principal_submatrices_of_the_exact_matrix(curvature, by, tmp_path):
    model_fn, params, data = models.classified("mlp")
    mask = laplax_kfac.masks.largest_magnitude(params, 7)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    ids = np.sort(np.argsort(-np.abs(flat))[:7])
    chosen = mask if by == "mask" else jnp.asarray(ids[::-1])
    found = laplax_kfac.kfac(
        model_fn, params, data, loss_fn=LOSS, curvature=curvature, params_filter=chosen
    )
    inside = exact("mlp")[np.ix_(ids, ids)]
    inside = inside if curvature == "full" else np.diag(np.diag(inside))
    expected = np.zeros((flat.size, flat.size))
    expected[np.ix_(ids, ids)] = inside
    np.testing.assert_allclose(found.to_dense(), expected, **CLOSE)
    assert found.num_free() == 7
    # The others are constants: nothing of them is in the posterior.
    covariance = np.zeros_like(expected)
    covariance[np.ix_(ids, ids)] = np.linalg.inv(inside + 2 * np.eye(7))
    posterior = laplax_kfac.make_posterior(found, 2.0)
    np.testing.assert_allclose(posterior.to_dense(), covariance, **CLOSE)
    x = data[0]
    jacobian = jax.vmap(jax.jacrev(lambda v, x: model_fn(x, unravel(v))), (None, 0))(flat, x)
    predictive = laplax_kfac.predictive_covariance(found, model_fn, params, x, prior_prec=2.0)
    expected = jacobian @ covariance @ jacobian.swapaxes(1, 2)
    np.testing.assert_allclose(predictive.covariance, expected, **CLOSE)
    samples = jax.vmap(lambda s: jax.flatten_util.ravel_pytree(s)[0])(
        posterior.sample(jax.random.key(0), 3, params)
    )
    assert set(np.flatnonzero(np.any(samples != flat, axis=0))) == set(ids)
    twice = laplax_kfac.merge(found, found)
    np.testing.assert_allclose(twice.to_dense(), 2 * found.to_dense(), **CLOSE)
    laplax_kfac.save(tmp_path / "x.npz", found)
    loaded = laplax_kfac.load(tmp_path / "x.npz", params)
    np.testing.assert_array_equal(loaded.to_dense(), found.to_dense())


def test_a_dense_matrix_takes_a_prior_for_every_layer():
    model_fn, params, data = models.classified("mlp")
    found = fitted("mlp", curvature="full")
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn=LOSS)
    values = {"lin1": 0.5, "lin2": 3.0}
    prior = {
        m: jax.tree.map(lambda x, v=values[m]: jnp.full(x.shape, v), params[m]) for m in params
    }
    each = jax.flatten_util.ravel_pytree(prior)[0]
    logdet = np.linalg.slogdet(exact("mlp") + np.diag(each))[1]
    np.testing.assert_allclose(found.logdet(prior_prec=prior), logdet, **CLOSE)
    flat = jax.flatten_util.ravel_pytree(params)[0]
    expected = -fit.loss - 0.5 * (flat @ (each * flat) + logdet - np.sum(np.log(each)))
    evidence = laplax_kfac.log_marginal_likelihood(
        found, params, log_likelihood=fit, prior_prec=prior
    )
    np.testing.assert_allclose(evidence.value, expected, **CLOSE)
    with pytest.raises(ValueError, match="one value for every parameter"):
        found.logdet(prior_prec=values)
    tuned = laplax_kfac.tune(found, params, log_likelihood=fit)
    assert tuned.converged
    for factor in (0.9, 1.1):
        beside = laplax_kfac.log_marginal_likelihood(
            found, params, log_likelihood=fit, prior_prec=factor * tuned.prior_prec
        )
        assert tuned.evidence.value > beside.value


def test_the_report_says_what_a_dense_matrix_costs():
    model_fn, params, (x, _) = models.classified("mlp")
    report = laplax_kfac.find_layers(model_fn, params, x[0], curvature="full")
    size = jax.flatten_util.ravel_pytree(params)[0].size
    assert f"the one block of {size:,} parameters takes" in str(report)


@pytest.mark.parametrize("curvature", ["diagonal", "block", "full"])
def test_other_structures_serve_posterior_predictive_and_files(curvature, tmp_path):
    model_fn, params, (x, _) = models.classified("mlp")
    found = fitted("mlp", curvature=curvature)
    precision = np.asarray(found.to_dense()) + 2 * np.eye(found.space.size)
    expected = np.linalg.slogdet(precision)[1]
    np.testing.assert_allclose(found.logdet(prior_prec=2.0), expected, **CLOSE)
    predictive = laplax_kfac.predictive_covariance(found, model_fn, params, x, prior_prec=2.0)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.vmap(jax.jacrev(lambda v, x: model_fn(x, unravel(v))), (None, 0))(flat, x)
    covariance = jacobian @ np.linalg.inv(precision) @ jacobian.swapaxes(1, 2)
    np.testing.assert_allclose(predictive.covariance, covariance, **CLOSE)
    laplax_kfac.save(tmp_path / "x.npz", found)
    loaded = laplax_kfac.load(tmp_path / "x.npz", params)
    np.testing.assert_array_equal(loaded.to_dense(), found.to_dense())


def test_last_layer_laplace_has_one_dense_block():
    found = fitted("mlp", curvature="block", params_filter="last_layer")
    (layer,) = [layer for layer in found.layers if not layer.frozen]
    assert layer.block == "dense"
    ids = ids_of(layer, found.space).ravel()
    expected = exact("mlp")[np.ix_(ids, ids)]
    np.testing.assert_allclose(found.to_dense()[np.ix_(ids, ids)], expected, **CLOSE)


def test_blocks_that_no_machine_can_hold_are_refused():
    params = {"w": jnp.zeros((200, 100))}
    with pytest.raises(ValueError, match=r"dense block of \['w'\] would have 20,000 parameters"):
        laplax_kfac.find_layers(
            lambda input, params: input @ params["w"], params, jnp.zeros(200), curvature="block"
        )


# -- the factors of KFAC -----------------------------------------------------------------------


@functools.cache
def records_of(name: str) -> Any:
    """Every layer's inputs, and the cotangents of the columns of a square root of the Hessian.

    The public records are the gradients of any loss: a loss that is linear in the output pulls
    any vector back. Every example is repeated for each of its columns.
    """
    model_fn, params, (x, y) = models.classified(name)
    f = jax.vmap(lambda x: model_fn(input=x, params=params))(x)
    hessian = jax.vmap(
        lambda f, y: jax.hessian(lambda v: LOSSES[LOSS](v.reshape(f.shape), y))(f.ravel())
    )(f, y)
    values, vectors = np.linalg.eigh(hessian)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors  # (N, C, R)
    columns = root.swapaxes(1, 2).reshape(-1, *f.shape[1:])
    repeated = jax.tree.map(lambda a: jnp.repeat(a, root.shape[-1], axis=0), x)
    records = functools.partial(
        laplax_kfac.intermediates_and_gradients, model_fn, loss_fn=lambda f, y: jnp.sum(f * y)
    )
    return jax.jit(records)(params, (repeated, columns))


def stacked(record: Any, joint_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (N, S, stack, rows) and gradients (N, S, stack, columns) of a record."""
    a, g = np.asarray(record.inputs), np.asarray(record.gradients)
    if a.ndim == 3:
        a, g = a[:, :, None], g[:, :, None]
    if joint_bias:
        a = np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)
    return a, g


FACTORS = [m for m in MODELS if m not in ("cond_branches", "tied", "tied_autoencoder",
                                          "embedding_tied_to_the_output")]  # fmt: skip


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", FACTORS)  # one use a layer, at every position
def test_factors_are_second_moments_of_inputs_and_cotangents(name, kfac_approx):
    curvature = fitted(name, kfac_approx=kfac_approx)
    found = np.asarray(curvature.to_dense())
    for layer in kronecker_layers(curvature):
        a, g = stacked(records_of(name)[layer.name], layer.bias)
        if kfac_approx == "reduce":
            a, g = a.mean(axis=1, keepdims=True), g.sum(axis=1, keepdims=True)
        repeats = len(a) // models.NUM_EXAMPLES
        inputs = np.einsum("nski,nskj->kij", a, a) / repeats
        outputs = np.einsum("nsko,nskp->kop", g, g)
        if layer.sides[0] == "diagonal":
            inputs = np.stack([np.diag(np.diag(m)) for m in inputs])
        count = models.NUM_EXAMPLES * a.shape[1]
        for i, o, block in zip(
            inputs, outputs, stack_of_blocks(found, ids_of(layer, curvature.space)), strict=True
        ):
            np.testing.assert_allclose(block, np.kron(i, o) / count, **CLOSE)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "nnx_cnn", "fused_product", "embedding", "grouped_einsum"])
def test_forward_only_has_input_factors_alone(name, kfac_approx):
    curvature = fitted(name, fisher_type="forward_only", kfac_approx=kfac_approx)
    found = np.asarray(curvature.to_dense())
    for layer in curvature.layers:
        ids = ids_of(layer, curvature.space)
        if layer.block != "kronecker":  # a probed parameter has one input, the constant 1
            expected = models.NUM_EXAMPLES * np.eye(ids.size)
            np.testing.assert_allclose(found[np.ix_(ids, ids)], expected, **CLOSE)
            continue
        a, g = stacked(records_of(name)[layer.name], layer.bias)
        a = a[:: len(a) // models.NUM_EXAMPLES]
        if kfac_approx == "reduce":
            a = a.mean(axis=1, keepdims=True)
        inputs = np.einsum("nski,nskj->kij", a, a)
        if layer.sides[0] == "diagonal":
            inputs = np.stack([np.diag(np.diag(m)) for m in inputs])
        for i, block in zip(inputs, stack_of_blocks(found, ids), strict=True):
            np.testing.assert_allclose(block, np.kron(i, np.eye(g.shape[-1])), **CLOSE)


def test_forward_only_of_a_tied_weight_has_the_identity_on_either_side():
    curvature = fitted("tied_autoencoder", fisher_type="forward_only")
    (layer,) = [layer for layer in curvature.layers if layer.uses == 2]
    assert np.linalg.eigvalsh(curvature.to_dense()).min() > -1e-9
    assert layer.uses == 2


def test_the_treatment_of_weight_sharing_can_differ_between_layers():
    model_fn, params, data = models.classified("nnx_cnn")
    first, *others = [layer.name for layer in kronecker_layers(fitted("nnx_cnn"))]
    mixed = laplax_kfac.kfac(
        model_fn, params, data, loss_fn=LOSS, kfac_approx={first: "reduce", "*": "expand"}
    )
    for layer, block in zip(mixed.layers, mixed.blocks, strict=True):
        same = fitted("nnx_cnn", kfac_approx="reduce" if layer.name == first else "expand")
        other = fitted("nnx_cnn", kfac_approx="expand" if layer.name == first else "reduce")
        number = mixed.layers.index(layer)
        np.testing.assert_allclose(block.eigenvalues, same.blocks[number].eigenvalues, **CLOSE)
        if layer.positions > 1:
            gap = np.abs(np.asarray(block.eigenvalues - other.blocks[number].eigenvalues)).max()
            assert gap > 1e-6
    assert others


# -- the nearest Kronecker product -------------------------------------------------------------


def singular_values(block: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Of the rearranged block: its best Kronecker product has the first one."""
    tensor = block.reshape(rows, columns, rows, columns).transpose(0, 2, 1, 3)
    return np.linalg.svd(tensor.reshape(rows**2, columns**2), compute_uv=False)


@pytest.mark.parametrize("name", [m for m in MODELS if m != "weight_norm"])
def test_kfoc_is_the_nearest_kronecker_product(name):
    curvature, plain = fitted(name, optimal_factors=True), fitted(name)
    found, theirs = np.asarray(curvature.to_dense()), np.asarray(plain.to_dense())
    assert kronecker_layers(curvature)
    assert np.linalg.eigvalsh(found).min() > -1e-9 * np.abs(found).max()
    for layer in kronecker_layers(curvature):
        ids = ids_of(layer, curvature.space)
        blocks = (stack_of_blocks(m, ids) for m in (found, theirs, exact(name)))
        for ours, kfac, right in zip(*blocks, strict=True):
            error = np.linalg.norm(ours - right)
            assert error <= np.linalg.norm(kfac - right) + 1e-9 * np.linalg.norm(right)
            if layer.sides[0] == "diagonal":
                # Only products with a diagonal input factor compete.
                tensor = right.reshape(layer.rows, layer.out_features, layer.rows, -1)
                slices = np.einsum("iojp->iop", tensor * np.eye(layer.rows)[:, None, :, None])
                first = np.linalg.svd(slices.reshape(layer.rows, -1), compute_uv=False)[0]
            else:
                first = singular_values(right, layer.rows, layer.out_features)[0]
            least = np.sqrt(max(np.linalg.norm(right) ** 2 - first**2, 0.0))
            np.testing.assert_allclose(error, least, rtol=1e-6, atol=1e-7 * first)


def test_kfoc_is_kfac_with_optimal_factors_and_may_be_corrected():
    model_fn, params, data = models.classified("nnx_cnn")
    split = [jax.tree.map(lambda x, k=k: x[k : k + 1], data) for k in range(models.NUM_EXAMPLES)]
    found = laplax_kfac.kfoc(model_fn, params, split, loss_fn=LOSS)
    expected = fitted("nnx_cnn", optimal_factors=True).to_dense()
    np.testing.assert_allclose(found.to_dense(), expected, rtol=1e-6, atol=1e-9)
    corrected = laplax_kfac.kfoc(model_fn, params, data, loss_fn=LOSS, eigenvalue_correction=True)
    np.testing.assert_allclose(corrected.trace(), np.trace(exact("nnx_cnn")), **CLOSE)
    with pytest.warns(UserWarning, match="Raise `iterations`"):
        laplax_kfac.kfoc(model_fn, params, data, loss_fn=LOSS, iterations=1)


# -- drawn targets -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_many_drawn_targets_come_near_to_the_exact_hessian(name):
    samples = 3000
    found = fitted(name, fisher_type="mc", mc_samples=samples).to_dense()
    expected = fitted(name).to_dense()
    assert np.linalg.norm(found - expected) <= 0.15 * np.linalg.norm(expected)
    assert np.abs(found - expected).max() > 0


# -- distance from the exact curvature ---------------------------------------------------------


def true_error(curvature: Any, dense: np.ndarray, layer: Any) -> float:
    ids = ids_of(layer, curvature.space)
    flat = ids.reshape(1, -1) if layer.block == "dense" or ids.ndim == 1 else ids
    pairs = (stack_of_blocks(m, flat) for m in (np.asarray(curvature.to_dense()), dense))
    ours, right = pairs
    return float(np.linalg.norm(ours - right) / np.linalg.norm(right))


@pytest.mark.parametrize("name", MODELS)
def test_relative_errors_are_those_of_the_dense_matrices(name):
    model_fn, params, data = models.classified(name)
    curvature = fitted(name)
    found = laplax_kfac.relative_error(
        curvature, model_fn, params, data, loss_fn=LOSS, num_probes=1000
    )
    for layer in curvature.layers:
        if layer.block != "none":
            expected = true_error(curvature, exact(name), layer)
            np.testing.assert_allclose(found[layer.name], expected, rtol=1e-7, atol=1e-7)
    assert str(found).count("\n") == len(found.layers)


def test_few_probes_estimate_the_error():
    model_fn, params, data = models.classified("nnx_cnn")
    curvature = fitted("nnx_cnn", curvature="diagonal")
    options: Any = {"loss_fn": LOSS, "batch_size": 2}
    right = laplax_kfac.relative_error(
        curvature, model_fn, params, data, num_probes=1000, **options
    )
    errors = [
        laplax_kfac.relative_error(
            curvature, model_fn, params, data, num_probes=20, key=jax.random.key(k), **options
        ).total
        for k in range(4)
    ]
    assert len(set(map(float, errors))) == 4
    np.testing.assert_allclose(np.mean(errors), right.total, rtol=0.2)


def test_ekfac_and_kfoc_are_nowhere_farther_than_kfac():
    model_fn, params, data = models.classified("nnx_cnn")
    options: Any = {"loss_fn": LOSS, "num_probes": 1000}
    plain, corrected, optimal = (
        laplax_kfac.relative_error(curvature, model_fn, params, data, **options).by_layer
        for curvature in (
            fitted("nnx_cnn"),
            fitted("nnx_cnn", eigenvalue_correction=True),
            fitted("nnx_cnn", optimal_factors=True),
        )
    )
    assert (corrected <= plain + 1e-9).all()
    assert (optimal <= plain + 1e-9).all()


# -- the data ----------------------------------------------------------------------------------

FLAVOURS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "reduce": {"kfac_approx": "reduce"},
    "empirical": {"fisher_type": "empirical"},
    "forward_only": {"fisher_type": "forward_only"},
    "ekfac": {"eigenvalue_correction": True},
    "kfoc": {"optimal_factors": True},
    "diagonal": {"curvature": "diagonal"},
    "block": {"curvature": "block"},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_data_twice_double_the_curvature_however_it_is_split(flavour):
    model_fn, params, data = models.classified("nnx_cnn")
    options = FLAVOURS[flavour]
    first, rest = (jax.tree.map(lambda x, s=s: x[s], data) for s in (slice(1), slice(1, None)))
    found = laplax_kfac.kfac(
        model_fn, params, [rest, first, data], loss_fn=LOSS, batch_size=2, **options
    )
    expected = 2 * fitted("nnx_cnn", **options).to_dense()
    close = {"rtol": 1e-6, "atol": 1e-9} if flavour == "kfoc" else CLOSE
    np.testing.assert_allclose(found.to_dense(), expected, **close)


# -- through laplax ----------------------------------------------------------------------------

OF_KRONECKER: dict[str, dict[str, Any]] = {
    "type2": {},
    "mc": {"fisher_type": "mc", "mc_samples": 2},
    "empirical": {"fisher_type": "empirical"},
    "reduce": {"kfac_approx": "reduce"},
    "separate": {"separate_weight_and_bias": True},
}
OF_KFAC = {
    "forward_only": {"fisher_type": "forward_only"},
    "diagonal": {"curvature": "diagonal"},
    "block": {"curvature": "block"},
}


@pytest.mark.parametrize(
    ("curv_type", "flavour"),
    [(c, f) for c in ("kfac", "ekfac", "kfoc") for f in OF_KRONECKER]
    + [("kfac", f) for f in OF_KFAC],
)
def test_every_flavour_goes_through_laplax(curv_type, flavour):
    model_fn, params, data = models.classified("mlp")
    options = {**OF_KRONECKER, **OF_KFAC}[flavour]
    posterior_fn, found = laplax.laplace(
        model_fn, params, data, loss_fn=LOSS, curv_type=curv_type, **options
    )
    refined = {"ekfac": "eigenvalue_correction", "kfoc": "optimal_factors"}
    refinement = {refined[curv_type]: True} if curv_type in refined else {}
    direct = fitted("mlp", **options, **refinement)
    np.testing.assert_allclose(found.to_dense(), direct.to_dense(), **CLOSE)
    precision = np.asarray(direct.to_dense()) + 3 * np.eye(direct.space.size)
    posterior = posterior_fn({"prior_prec": 3.0})
    column = posterior.cov_mv(posterior.state)(jax.tree.map(jnp.ones_like, params))
    expected = np.linalg.solve(precision, np.ones(direct.space.size))
    flat = jax.flatten_util.ravel_pytree(column)[0]
    np.testing.assert_allclose(flat, expected, **CLOSE)


# -- options that contradict each other --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "dense"}, "`curvature` must be one of"),
        ({"curvature": "diagonal", "eigenvalue_correction": True}, "`eigenvalue_correction` refin"),
        ({"fisher_type": "forward_only", "optimal_factors": True}, "`optimal_factors` refines"),
        ({"fisher_type": "forward_only", "curvature": "block"}, "defines Kronecker factors alone"),
        ({"kfac_approx": {"nowhere": "reduce"}}, "'nowhere', which matches none of the layers"),
        ({"kfac_approx": {"*": "shrink"}}, "`kfac_approx` must be one of"),
        ({"iterations": 0}, "`iterations` must be a positive integer"),
    ],
)
def test_contradictions_are_refused(options, message):
    model_fn, params, data = models.classified("mlp")
    with pytest.raises(ValueError, match=message):
        laplax_kfac.kfac(model_fn, params, data, loss_fn=LOSS, **options)


def test_relative_error_refuses_other_models_and_no_probes():
    model_fn, params, data = models.classified("mlp")
    with pytest.raises(ValueError, match="`num_probes` must be a positive integer"):
        laplax_kfac.relative_error(
            fitted("mlp"), model_fn, params, data, loss_fn=LOSS, num_probes=0
        )
    other, others_params, others_data = models.classified("nnx_cnn")
    with pytest.raises(ValueError, match="`params` must be a pytree with the structure and shapes"):
        laplax_kfac.relative_error(fitted("mlp"), other, others_params, others_data, loss_fn=LOSS)
