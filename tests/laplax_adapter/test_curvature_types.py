"""laplax with "kfac" and "ekfac" against laplax with "full", on models where the three agree."""

from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import laplax.register
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from laplax.curv.cov import create_posterior_fn, estimate_curvature
from laplax.eval.utils import transfer_entry
from laplax.util.tree import normal_like
from support.linear_models import (
    CASES,
    CLASSES,
    CONSTANT,
    REGRESSION,
    TRAINED,
    Loader,
    X,
    as_matrix,
    fit,
    linear,
)
from support.matrices import normal
from support.oracles import dense_ggn
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import laplax_adapter

pytestmark = pytest.mark.usefixtures("x64")
OURS = list(laplax_adapter.CURVATURE_TYPES)


# -- the same numbers as "full" ----------------------------------------------------------------


@pytest.mark.parametrize("curv_type", OURS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_curvature_is_that_of_full(case, curv_type):
    full = fit(case, "full")[1]
    found = fit(case, curv_type)[1]
    assert isinstance(found, laplax_kfac.Curvature)
    np.testing.assert_allclose(found.to_dense(), full, **tolerance(jnp.float64))
    # Neither is taken for granted:
    exact = dense_ggn(linear, case.params, case.data, case.loss_fn)
    np.testing.assert_allclose(full, exact, **tolerance(jnp.float64))


PRIORS = [
    ({"prior_prec": 1.0}, 1.0),
    ({"prior_prec": 0.01, "sigma_squared": 0.3}, 1.0),
    ({"prior_prec": 20.0, "sigma_squared": 2.0}, 5.0),
]


@pytest.mark.parametrize("curv_type", OURS)
@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("case", [REGRESSION, CLASSES], ids=str)
def test_products_with_covariance_and_scale_are_those_of_full(case, prior, curv_type):
    arguments, loss_scaling_factor = prior
    found, full = (
        fit(case, name)[0](arguments, loss_scaling_factor) for name in (curv_type, "full")
    )
    covariance, scale, expected = (
        as_matrix(mv, case.params)
        for mv in (found.cov_mv(found.state), found.scale_mv(found.state), full.cov_mv(full.state))
    )
    np.testing.assert_allclose(covariance, expected, **tolerance(jnp.float64))
    np.testing.assert_allclose(scale @ scale.T, expected, **tolerance(jnp.float64))


def test_posteriors_of_several_leaves_are_in_laplax_flat_order():
    def model_fn(input, params):
        return jnp.tanh(input @ params["z"]["w"] + params["z"]["b"]) @ params["a"]

    params = {"a": normal(4, 2), "z": {"b": normal(4), "w": normal(3, 4)}}
    posterior_fn, curv = laplax.laplace(
        model_fn, params, (X, normal(6, 2)), loss_fn="mse", curv_type="kfac"
    )
    posterior = posterior_fn({"prior_prec": 0.5})
    found = as_matrix(posterior.cov_mv(posterior.state), params)
    expected = np.linalg.inv(np.asarray(curv.to_dense()) + 0.5 * np.eye(24))
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_weights_that_laplax_samples_have_the_covariance_of_full():
    n, full = 50_000, np.asarray(fit(REGRESSION, "full")[1])
    posterior = fit(REGRESSION, "kfac")[0]({"prior_prec": 0.5})

    @jax.jit
    def second_moments(key):
        def draw(key):
            sample = normal_like(key, TRAINED, posterior.scale_mv(posterior.state))
            return ravel_pytree(jax.tree.map(jnp.subtract, sample, TRAINED))[0]

        offsets = jax.vmap(draw)(jax.random.split(key, n))
        return offsets.T @ offsets / n

    covariance = np.linalg.inv(full + 0.5 * np.eye(len(full)))
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert (np.abs(second_moments(jax.random.key(0)) - covariance) < 6 * error).all()


# -- calibration and evaluation ----------------------------------------------------------------


def test_grid_search_runs_with_our_type():
    posterior_fn, curv = fit(REGRESSION, "kfac")
    prior, set_predictive = laplax.calibration(
        posterior_fn, linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_estimate=curv,
        curv_type="kfac", grid_size=3,
    )  # fmt: skip
    assert set(prior) == {"prior_prec"}
    predictions = set_predictive(prior_arguments=prior)(X[0])
    assert np.isfinite(predictions["pred_std"]).all()


@pytest.mark.parametrize("case", [REGRESSION, CLASSES], ids=str)
def test_sampled_evaluation_agrees_with_full(case):
    # The two take different square roots of one covariance: their samples agree in distribution.
    data = {"input": normal(4, 3, seed=6), "target": case.data[1][:4]}
    found, full = (
        laplax.evaluation(
            fit(case, name)[0], linear, case.params, {"prior_prec": 0.3}, data,
            pushforward_type="nonlinear", num_samples=10_000,
            metrics=transfer_entry(["pred_mean", "pred_std"]),
        )[0]
        for name in ("kfac", "full")
    )  # fmt: skip
    np.testing.assert_allclose(found["pred_std"], full["pred_std"], rtol=0.05)
    error = np.abs(found["pred_mean"] - full["pred_mean"]) / full["pred_std"]
    assert error.max() < 6 * np.sqrt(2 / 10_000)


# -- forms of arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: {"input": x, "target": y},
        lambda x, y: (jnp.asarray(x), jnp.asarray(y)),
        Loader,
        lambda x, y: list(Loader(x, y)),
        lambda x, y: [{"input": x[:5], "target": y[:5]}, {"input": x[5:], "target": y[5:]}],
        lambda x, y: [(x, y)],
        lambda x, y: iter(Loader(x, y)),
    ],
    ids=["dict", "jax arrays", "loader", "list", "list of dicts", "list of one", "iterator"],
)
def test_data_may_come_in_any_form(make):
    data = make(*REGRESSION.data)
    curv = laplax.laplace(linear, TRAINED, data, loss_fn="mse", curv_type="kfac")[1]
    expected = fit(REGRESSION, "kfac")[1].to_dense()
    np.testing.assert_allclose(curv.to_dense(), expected, **tolerance(jnp.float64))


@pytest.mark.parametrize(("curv_type", "passes"), [("kfac", 1), ("ekfac", 2)])
def test_a_loader_is_read_no_more_often_than_needed(curv_type, passes):
    # Not even one batch is consumed to look at its form.
    loader = Loader(*REGRESSION.data)
    laplax.laplace(linear, TRAINED, loader, loss_fn="mse", curv_type=curv_type)
    assert (loader.passes, loader.batches) == (passes, 3 * passes)


@pytest.mark.parametrize("curv_type", OURS)
def test_numbers_of_samples_scale_as_for_full(curv_type):
    sizes: Any = {"num_curv_samples": 6, "num_total_samples": 60}
    found, full = (
        laplax.laplace(linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type=name, **sizes)[1]
        for name in (curv_type, "full")
    )
    np.testing.assert_allclose(found.to_dense(), full, **tolerance(jnp.float64))
    once = fit(REGRESSION, "full")[1]
    np.testing.assert_allclose(full, 0.1 * once, **tolerance(jnp.float64))


def test_options_reach_kfac():
    options: Any = {
        "fisher_type": "mc", "mc_samples": 2, "key": jax.random.key(3), "kfac_approx": "reduce",
        "separate_weight_and_bias": True,
    }  # fmt: skip
    found = laplax.laplace(
        linear,
        TRAINED,
        REGRESSION.data,
        loss_fn="mse",
        curv_type="kfac",
        curv_mv_jit=True,
        **options,
    )[1]
    expected = laplax_kfac.kfac(linear, TRAINED, REGRESSION.data, loss_fn="mse", **options)
    assert [layer.name for layer in found.layers] == ["b", "w"]
    np.testing.assert_array_equal(found.to_dense(), expected.to_dense())


def test_models_of_batches_are_accepted():
    found = laplax.laplace(
        linear, CONSTANT, CLASSES.data, loss_fn="cross_entropy", curv_type="kfac",
        vmap_over_data=False,
    )[1]  # fmt: skip
    expected = fit(CLASSES, "kfac")[1].to_dense()
    np.testing.assert_allclose(found.to_dense(), expected, **tolerance(jnp.float64))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'fisher'"):
        laplax.laplace(
            linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type="kfac", fisher="mc"
        )


# -- laplax's functions below `laplace` --------------------------------------------------------


def test_complex_leaves_are_refused_for_laplax_has_real_vectors():
    def model_fn(input, params):
        return jnp.abs(input @ params["layer"]["w"])

    params = {"layer": {"w": jnp.ones((2, 3)) * (1 + 1j)}}
    data = {"input": jnp.ones((4, 2)), "target": jnp.zeros((4, 3))}
    with pytest.raises(ValueError, match=r"complex leaves 'layer/w'.* leaves of their own"):
        laplax.laplace(model_fn, params, data, loss_fn="mse", curv_type="kfac")


@pytest.mark.parametrize("curv_type", OURS)
def test_estimate_curvature_needs_the_model_and_says_so(curv_type):
    message = (
        f"curv_type='{curv_type}' reads the layers off the model, which a matrix-vector product "
        r"does not show; missing: model_fn, data, loss_fn\. Call laplax\.laplace\(model_fn, params"
    )
    with pytest.raises(TypeError, match=message):
        estimate_curvature(curv_type, mv=lambda v: v, layout=TRAINED)
    with pytest.raises(TypeError, match="missing: layout"):
        estimate_curvature(
            curv_type, mv=lambda v: v, model_fn=linear, data=REGRESSION.data, loss_fn="mse"
        )


@pytest.mark.parametrize("curv_type", OURS)
def test_estimate_curvature_and_create_posterior_fn_take_the_model_as_options(curv_type):
    options: Any = {
        "mv": None, "layout": TRAINED, "model_fn": linear, "data": REGRESSION.data, "loss_fn": "mse"
    }  # fmt: skip
    posterior_fn, expected = fit(REGRESSION, curv_type)
    found = estimate_curvature(curv_type, **options)
    np.testing.assert_array_equal(found.to_dense(), expected.to_dense())
    posterior, other = (
        function({"prior_prec": 1.0})
        for function in (create_posterior_fn(curv_type, **options), posterior_fn)
    )
    for got, want in zip(*map(jax.tree.leaves, (posterior.state, other.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_states_of_posteriors_go_through_jit_and_vmap_over_the_prior():
    posterior_fn, curv = fit(REGRESSION, "kfac")
    priors = np.asarray([0.1, 3.0])

    def product(prior_prec):
        posterior = posterior_fn({"prior_prec": prior_prec})
        return ravel_pytree(posterior.cov_mv(posterior.state)(TRAINED))[0]

    found = jax.jit(jax.vmap(product))(priors)
    flat = np.asarray(ravel_pytree(TRAINED)[0])
    for got, prior_prec in zip(found, priors, strict=True):
        precision = np.asarray(curv.to_dense()) + prior_prec * np.eye(flat.size)
        np.testing.assert_allclose(got, np.linalg.solve(precision, flat), **tolerance(jnp.float64))
