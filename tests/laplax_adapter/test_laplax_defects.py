"""laplax's own defects that an adapter meets: its number, and the right one.

When one of these fails, laplax has mended it: then docs/laplax.md wants a look too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import pytest
from laplax.curv.cov import estimate_curvature
from laplax.curv.ggn import create_ggn_mv
from laplax.curv.utils import LowRankTerms
from laplax.eval.likelihood import low_rank_marginal_log_likelihood, marginal_log_likelihood
from laplax.eval.utils import transfer_entry
from laplax.util.loader import DataLoaderMV
from loguru import logger
from support.linear_models import CLASSES, REGRESSION, TRAINED, Loader, X, as_matrix, fit, linear
from support.matrices import normal
from support.oracles import dense_ggn, laplax_full
from support.tolerances import tolerance

import laplax_kfac

x64 = pytest.mark.usefixtures("x64")
PRIOR = {"prior_prec": 0.3}


@x64
def test_laplace_and_create_ggn_mv_scale_by_inverse_factors():
    exact = np.asarray(dense_ggn(linear, TRAINED, REGRESSION.data, "mse"))
    data = dict(zip(("input", "target"), REGRESSION.data, strict=True))
    # 6 of 60 examples were seen: an estimate of the whole is 10 times what was seen.
    mv = create_ggn_mv(linear, TRAINED, data, "mse", num_curv_samples=6, num_total_samples=60)
    np.testing.assert_allclose(as_matrix(mv, TRAINED), 10 * exact, **tolerance(jnp.float64))
    full = laplax.laplace(
        linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type="full",
        num_curv_samples=6, num_total_samples=60,
    )[1]  # fmt: skip
    np.testing.assert_allclose(full, 0.1 * exact, **tolerance(jnp.float64))


@x64
def test_low_rank_log_determinant():
    s, rank, size = 0.25, 2, 8
    values = np.asarray([3.0, 1.0])
    terms = LowRankTerms(jnp.eye(size)[:, :rank], jnp.asarray(values), jnp.asarray(s))
    params = {"w": np.zeros(size)}
    evidence = low_rank_marginal_log_likelihood(
        terms, {"prior_prec": 1.0}, lambda *_: 0.0, params, {"input": 0, "target": 0}
    )
    # Without data and at parameters zero, the evidence is minus half the log-determinant.
    right = np.linalg.slogdet(s * np.eye(size) + np.diag(np.append(values, np.zeros(6))))[1]
    np.testing.assert_allclose(right, size * np.log(s) + np.log1p(values / s).sum(), rtol=1e-12)
    laplax_has = rank * np.log(s) + np.log1p(s * values).sum()
    np.testing.assert_allclose(-2 * evidence, laplax_has, rtol=1e-12)
    assert abs(laplax_has - right) > 1


@x64
def test_evidence_of_the_squared_error():
    # Linear regression with known noise: the evidence is a Gaussian density of the targets.
    x, y, tau, noise = X[:, :2], normal(6, 1, seed=4), 0.5, 0.3
    features = np.concatenate([np.ones((6, 1)), x], axis=1)
    covariance = noise * np.eye(6) + features @ features.T / tau
    right = -0.5 * (
        y[:, 0] @ np.linalg.solve(covariance, y[:, 0])
        + np.linalg.slogdet(covariance)[1]
        + 6 * np.log(2 * np.pi)
    )
    mean = np.linalg.solve(features.T @ features + noise * tau * np.eye(3), features.T @ y[:, 0])
    params = {"b": mean[:1], "w": mean[1:, None]}

    def evidence(curv_type, **arguments):
        curv = laplax.laplace(linear, params, (x, y), loss_fn="mse", curv_type=curv_type)[1]
        return marginal_log_likelihood(
            curv, {"prior_prec": tau, **arguments}, {"input": x, "target": y}, linear, params,
            "mse", curv_type, vmap_over_data=True,
        )  # fmt: skip

    for curv_type in ("full", "kfac"):  # ours follows laplax here, so that the two can be compared
        # Right up to a constant, if the noise is passed twice and in two conventions ...
        constant = 6 / 2 * np.log(2 * np.pi * noise)
        found = evidence(curv_type, sigma_squared=1 / (2 * noise), sigma=noise)
        np.testing.assert_allclose(found - constant, right, rtol=1e-9)
        # ... and wrong by more than the constant if it is passed once, or not at all.
        for arguments in ({}, {"sigma": noise}, {"sigma_squared": 1 / (2 * noise)}):
            assert abs(evidence(curv_type, **arguments) - constant - right) > 0.5


@x64
def test_loaders():
    x, y = REGRESSION.data
    exact = np.asarray(laplax_full(linear, TRAINED, (x, y), "mse"))
    batches = list(Loader(x, y))
    arguments: Any = {"loss_fn": "mse", "curv_type": "full"}
    # A generator is empty after laplace's look at its first batch and its check of shapes.
    with pytest.raises(ValueError, match="data loader was empty"):
        laplax.laplace(linear, TRAINED, iter(batches), **arguments)
    # A list is taken for one batch, unless it has two entries.
    for wrong in (batches, [(x, y)]):
        with pytest.raises(ValueError, match="received len != 2"):
            laplax.laplace(linear, TRAINED, wrong, **arguments)
    two = laplax.laplace(linear, TRAINED, [(x[:3], y[:3]), (x[3:], y[3:])], **arguments)[1]
    np.testing.assert_allclose(two, exact, **tolerance(jnp.float64))
    # The default reduction averages over the first axis of the parameters.
    mv = create_ggn_mv(linear, TRAINED, {"input": x, "target": y}, "mse")
    reduced = DataLoaderMV(lambda vec, data: mv(vec), [(x, y)])(TRAINED)  # noqa: ARG005
    assert jax.tree.map(jnp.shape, reduced) == {"b": (), "w": (2,)}


# -- evidence and metrics of classification ------------------------------------------------------

ONE_HOT = np.eye(3)[CLASSES.data[1]]


@functools.cache
def classes(curv_type):
    return fit(CLASSES, curv_type)


def cross_entropy_evidence(curv_type, target, loss_fn="cross_entropy"):
    data = {"input": X, "target": target}
    return marginal_log_likelihood(
        classes(curv_type)[1], PRIOR, data, linear, CLASSES.params, loss_fn, curv_type,
        vmap_over_data=True,
    )  # fmt: skip


@x64
@pytest.mark.parametrize("curv_type", ["full", "kfac"])
def test_evidence_of_the_cross_entropy(curv_type):
    # One number for every entry of the targets, from a sigmoid cross-entropy, halved.
    found = cross_entropy_evidence(curv_type, ONE_HOT)
    assert found.shape == (6, 3)
    logits = np.tile(CLASSES.params["b"], (6, 1))
    sigmoid = np.logaddexp(0, logits) - ONE_HOT * logits
    np.testing.assert_allclose(np.ptp(found + sigmoid / 2), 0, atol=1e-12)
    with pytest.raises(ValueError, match="Incompatible shapes for broadcasting"):
        cross_entropy_evidence(curv_type, CLASSES.data[1])
    # The right one: the log-likelihood of the classes, the prior and the volume.
    dense = np.asarray(classes("full")[1]) + 0.3 * np.eye(12)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(CLASSES.params)])
    fit_term = np.sum(logits[ONE_HOT == 1] - np.log(np.exp(logits).sum(axis=1)))
    prior = -0.15 * flat @ flat + 6 * np.log(0.3)
    right = fit_term + prior - 0.5 * np.linalg.slogdet(dense)[1]
    fitted = laplax_kfac.data_fit(linear, CLASSES.params, CLASSES.data, loss_fn="cross_entropy")
    ours = laplax_kfac.log_marginal_likelihood(
        classes("kfac")[1], CLASSES.params, log_likelihood=fitted, prior_prec=0.3
    )
    np.testing.assert_allclose(ours.value, right, rtol=1e-9)


@x64
def test_evidence_of_the_binary_cross_entropy_raises():
    for curv_type in ("full", "kfac"):
        with pytest.raises(ValueError, match="unknown loss function: binary_cross_entropy"):
            cross_entropy_evidence(curv_type, ONE_HOT, "binary_cross_entropy")


@x64
@pytest.mark.parametrize("curv_type", ["full", "kfac"])
def test_calibration_by_evidence_with_integer_labels_returns_the_lowest_grid_point(curv_type):
    posterior_fn, curvature = classes(curv_type)
    prior, _ = laplax.calibration(
        posterior_fn, linear, CLASSES.params, CLASSES.data, loss_fn="cross_entropy",
        curv_estimate=curvature, curv_type=curv_type, predictive_type="mean_field_0",
        calibration_objective="marginal_log_likelihood", grid_size=3,
    )  # fmt: skip
    np.testing.assert_allclose(prior["prior_prec"], 1e-3)  # errors count as infinity
    tuned = laplax_kfac.tune(
        classes("kfac")[1], CLASSES.params,
        log_likelihood=laplax_kfac.data_fit(
            linear, CLASSES.params, CLASSES.data, loss_fn="cross_entropy"
        ),
    )  # fmt: skip
    assert 0.1 < tuned.prior_prec < 100


@x64
@pytest.mark.parametrize("curv_type", ["full", "kfac"])
def test_calibration_of_a_classifier_is_that_of_a_gaussian_over_logits(curv_type):
    posterior_fn, curvature = classes(curv_type)
    x, y = CLASSES.data

    def calibrated(objective, target):
        prior, _ = laplax.calibration(
            posterior_fn, linear, CLASSES.params, (x, target), loss_fn="cross_entropy",
            curv_estimate=curvature, curv_type=curv_type, predictive_type="mean_field_0",
            calibration_objective=objective, grid_size=3,
        )  # fmt: skip
        return prior["prior_prec"]

    def both(prior_prec):
        """The density of one-hot targets around the logits, and the probabilities of labels."""
        predictive = laplax_kfac.predictive_covariance(
            classes("kfac")[1], linear, CLASSES.params, x, prior_prec=prior_prec
        )
        variance = jnp.diagonal(predictive.covariance, axis1=1, axis2=2)
        density = jax.scipy.stats.norm.logpdf(ONE_HOT, predictive.mean, jnp.sqrt(variance))
        of_labels = laplax_kfac.class_probabilities(predictive)[np.arange(len(y)), y]
        return -density.mean(), -np.log(of_labels).mean()

    grid = np.asarray([1e-3, 1.0, 1e3])
    gaussian, right = grid[np.asarray([both(prior_prec) for prior_prec in grid]).argmin(axis=0)]
    assert gaussian != right
    np.testing.assert_allclose(calibrated("nll", y), gaussian)
    np.testing.assert_allclose(calibrated("nll", ONE_HOT.astype(int)), 1e-3)  # errors are infinity
    for target in (y, ONE_HOT):
        np.testing.assert_allclose(calibrated("class_nll", target), right)


@x64
@pytest.mark.parametrize("curv_type", ["full", "kfac"])
def test_evaluation_with_the_metrics_of_classification_raises(curv_type):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'map'"):
        laplax.evaluation(
            classes(curv_type)[0], linear, CLASSES.params, PRIOR, CLASSES.data,
            metrics="classification", predictive_type="mean_field_0",
        )  # fmt: skip


@x64
@pytest.mark.parametrize("curv_type", ["full", "kfac"])
def test_the_laplace_bridge_raises(curv_type):
    with pytest.raises(IndexError, match="tuple index out of range"):
        laplax.evaluation(
            classes(curv_type)[0], linear, CLASSES.params, PRIOR, CLASSES.data,
            metrics=transfer_entry(["pred_act"]), predictive_type="laplace_bridge",
        )  # fmt: skip


# -- surroundings --------------------------------------------------------------------------------


@x64
def test_models_of_batches_with_cross_entropy_raise():
    options: Any = {"loss_fn": "cross_entropy", "vmap_over_data": False}
    with pytest.raises(TypeError, match="contracting dimensions"):
        laplax.laplace(linear, CLASSES.params, CLASSES.data, curv_type="full", **options)
    ours = laplax.laplace(linear, CLASSES.params, CLASSES.data, curv_type="kfac", **options)[1]
    np.testing.assert_allclose(ours.to_dense(), classes("full")[1], **tolerance(jnp.float64))


@x64
def test_curvature_cannot_be_estimated_under_jit_and_a_posterior_is_no_pytree():
    data = dict(zip(("input", "target"), REGRESSION.data, strict=True))
    mv = create_ggn_mv(linear, TRAINED, data, "mse", num_curv_samples=1, num_total_samples=1)
    with pytest.raises(AttributeError, match="block_until_ready"):
        jax.jit(lambda params: estimate_curvature("full", mv, layout=params))(TRAINED)
    posterior = fit(REGRESSION, "kfac")[0](PRIOR)
    assert jax.tree.leaves(posterior) == [posterior]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(posterior.state))


@x64
def test_parameters_of_several_types_come_back_in_one():
    params = {"b": jnp.zeros(2, jnp.float32), "w": jnp.ones((3, 2))}
    data = jnp.asarray(X), jnp.ones((6, 2))
    posterior_fn, curvature = laplax.laplace(linear, params, data, loss_fn="mse", curv_type="kfac")
    posterior = posterior_fn(PRIOR)
    product = posterior.cov_mv(posterior.state)(params)
    assert product["b"].dtype == jnp.float64  # laplax puts all leaves into one vector
    assert curvature.inverse_mv(params, prior_prec=0.3)["b"].dtype == jnp.float32


@x64
def test_every_step_is_logged_by_default():
    lines: list[str] = []
    sink = logger.add(lines.append, level="DEBUG")
    laplax.laplace(linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type="full")
    theirs = len(lines)
    laplax.laplace(linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type="kfac")
    logger.remove(sink)
    assert theirs >= 4
    # With our types laplax's `laplace` logs what it does itself, and we log nothing.
    assert lines[theirs:]
    assert all("| laplax.api:laplace:" in line for line in lines[theirs:])
