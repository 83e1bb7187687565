"""The closed form in laplax's pushforward equals laplax's generic one, number by number."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import laplax.eval.pushforward
import numpy as np
import pytest
from laplax.curv.cov import set_posterior_fn
from laplax.eval.pushforward import (
    lin_pred_cov,
    lin_pred_mean,
    lin_pred_std,
    lin_pred_var,
    lin_samples,
    lin_setup,
    lin_special_pred_act,
    nonlin_mc_pred_act,
    nonlin_pred_cov,
    nonlin_pred_mean,
    nonlin_pred_std,
    nonlin_pred_var,
    nonlin_samples,
    nonlin_setup,
    set_lin_pushforward,
    set_nonlin_pushforward,
)
from laplax.util.tree import normal_like
from support.matrices import normal
from support.pushforwards import PRIOR, assert_same, fitted, generic_setup, predictions

from laplax_kfac.laplax_adapter import setup_linearised
from laplax_kfac.laplax_adapter.output_covariance import OutputCovariance
from laplax_kfac.laplax_adapter.rebinding import original_of

ENTRIES = [lin_pred_mean, lin_pred_cov, lin_pred_var, lin_pred_std]
VARIANCE_FIRST = [lin_pred_mean, lin_pred_var, lin_pred_std, lin_pred_cov]


@pytest.mark.parametrize(
    ("name", "dtype", "entries"),
    [
        ("mlp", "float32", [*ENTRIES, lin_samples]),
        ("mlp", "float64", [*ENTRIES, lin_samples]),
        ("nnx_cnn", "float64", ENTRIES),
        ("matrix output", "float64", [lin_pred_mean, lin_pred_cov]),
        ("one number", "float64", ENTRIES),
        ("two inputs", "float64", VARIANCE_FIRST),
    ],
)
def test_every_entry_equals_that_of_the_generic_pushforward(name, dtype, entries):
    with jax.enable_x64(dtype == "float64"):
        assert_same(
            predictions(name, dtype, [lin_setup, *entries]),
            predictions(name, dtype, [generic_setup, *entries]),
        )


@pytest.mark.usefixtures("x64")
def test_defect_variances_of_an_output_with_two_axes():
    # laplax takes whole rows for entries, so that variances are negative; from a covariance, which
    # has three axes then, it takes none at all.
    generic, found = (
        predictions("matrix output", "float64", [setup, *VARIANCE_FIRST])
        for setup in (generic_setup, lin_setup)
    )
    dense = np.asarray(generic["pred_cov"]).transpose(0, 3, 2, 1).reshape(5, 6, 6)
    right = np.diagonal(dense, axis1=1, axis2=2)
    np.testing.assert_allclose(found["pred_var"], right, rtol=1e-10)
    np.testing.assert_allclose(found["pred_std"], np.sqrt(right), rtol=1e-10)
    assert generic["pred_var"].shape == (5, 6, 3)
    assert np.isnan(generic["pred_std"]).any()
    for setup in (generic_setup, lin_setup):
        with pytest.raises(ValueError, match="diag input must be 1d or 2d"):
            predictions("matrix output", "float64", [setup, *ENTRIES])


@pytest.mark.usefixtures("x64")
def test_classes_and_variances_without_covariances_too():
    bridges = [
        functools.partial(lin_special_pred_act, special_pred_type=kind)
        for kind in ("mean_field_0", "mean_field_2")
    ]
    fns = [lin_pred_mean, lin_pred_std, bridges[0], _renamed, bridges[1]]
    found, expected = (
        predictions("mlp", "float64", [setup, *fns]) for setup in (lin_setup, generic_setup)
    )
    assert_same(found, expected)
    assert set(found) > {"pred_std", "mean_field_0", "special_pred_act"}


def _renamed(results, aux, **_):
    results["mean_field_0"] = results.pop("special_pred_act")
    return results, aux


@pytest.mark.usefixtures("x64")
def test_the_setup_is_what_laplax_uses_and_can_be_given_by_hand():
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    x = jax.tree.map(lambda a: a[0], inputs)
    for setup, kind in (
        (lin_setup, OutputCovariance),
        (setup_linearised, OutputCovariance),
        (generic_setup, type(lambda: None)),
    ):
        seen: list[Any] = []

        def keep(results, aux, seen=seen, **_):
            seen.append(aux["cov_mv"])
            return results, aux

        set_lin_pushforward(model_fn, params, posterior_fn, PRIOR, pushforward_fns=[setup, keep])(x)
        assert isinstance(seen[0], kind)


@pytest.mark.usefixtures("x64")
def test_the_covariance_is_also_a_product_with_vectors():
    model_fn, params, inputs, posterior_fn, _ = fitted("matrix output", "float64")
    vector = normal(2, 3)

    def product(results, aux, **_):
        results["product"] = aux["cov_mv"](vector)
        return results, aux

    found, expected = (
        set_lin_pushforward(
            model_fn, params, posterior_fn, PRIOR, pushforward_fns=[setup, product]
        )(inputs[0])
        for setup in (lin_setup, generic_setup)
    )
    assert_same(found, expected)


@pytest.mark.usefixtures("x64")
def test_sampled_predictions_are_the_model_at_samples_of_the_posterior():
    fns = [nonlin_setup, nonlin_pred_mean, nonlin_pred_cov, nonlin_pred_var, nonlin_pred_std,
           nonlin_samples, nonlin_mc_pred_act]  # fmt: skip
    found = predictions("mlp", "float64", fns, set_nonlin_pushforward)
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    posterior = posterior_fn(PRIOR, 2.0)
    mv = posterior.scale_mv(posterior.state)
    samples = [normal_like(k, params, mv) for k in jax.random.split(jax.random.key(1), 4)]
    outputs = jnp.stack(
        [jax.vmap(lambda x, p=p: model_fn(input=x, params=p))(inputs) for p in samples], axis=1
    )
    expected = {
        "map": jax.vmap(lambda x: model_fn(input=x, params=params))(inputs),
        "pred_mean": outputs.mean(axis=1),
        "pred_var": outputs.var(axis=1),
        "pred_std": outputs.std(axis=1),
        "pred_cov": jax.vmap(lambda o: jnp.cov(o, rowvar=False))(outputs),
        "samples": outputs,
        "mc_pred_act": jax.nn.softmax(outputs, axis=2).mean(axis=1),
    }
    # laplax takes the variances from the covariance, where there is one.
    expected["pred_var"] = jnp.diagonal(expected["pred_cov"], axis1=1, axis2=2)
    expected["pred_std"] = jnp.sqrt(expected["pred_var"])
    assert_same(found, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("change", ["another function", "two outputs", "another curvature type"])
def test_where_there_is_no_closed_form_the_generic_one_is_used(change):
    model_fn, params, inputs, posterior_fn, _ = fitted("one number", "float64")
    functions: dict[str, Any] = {
        # The same parameters, but the weight is no layer here.
        "another function": lambda input, params: jnp.sin(params["w"]).T @ input * params["v"],
        "two outputs": lambda input, params: (model_fn(input, params), input @ params["w"]),
        "another curvature type": model_fn,
    }
    function = functions[change]
    if change == "another curvature type":
        full = jnp.eye(16)
        posterior_fn = set_posterior_fn("full", full, layout=params)
    seen = []

    def keep(results, aux, **_):
        seen.append(aux["cov_mv"])
        return results, aux

    setups = [lin_setup, keep] if change == "two outputs" else [lin_setup, keep, *ENTRIES]
    generic = [generic_setup, *setups[1:]]
    results = [
        set_lin_pushforward(function, params, posterior_fn, PRIOR, pushforward_fns=fns)(inputs[0])
        for fns in (setups, generic)
    ]
    assert not any(isinstance(mv, OutputCovariance) for mv in seen)
    jax.tree.map(np.testing.assert_array_equal, *results)


def variance_of_main(results, aux, **_):
    """``lin_pred_var`` of laplax's main branch: variances have the shape of the output."""
    mean = results["pred_mean"]
    variance = laplax.util.mv.diagonal(aux["cov_mv"], layout=mean.size, mv_jittable=True)
    results["pred_var"] = variance.reshape(mean.shape)
    return results, aux


@pytest.mark.usefixtures("x64")
def test_shapes_of_variances_follow_the_laplax_that_is_installed():
    fns = [lin_setup, lin_pred_mean, variance_of_main, lin_pred_std]
    found = predictions("matrix output", "float64", fns)
    flat = predictions("matrix output", "float64", [lin_setup, *VARIANCE_FIRST])
    for entry in ("pred_var", "pred_std"):
        assert found[entry].shape == (5, 2, 3)
        np.testing.assert_array_equal(found[entry].reshape(5, 6), flat[entry])


@pytest.mark.usefixtures("x64")
def test_a_setup_given_by_hand_needs_nothing_of_laplax_state():
    # As with a reference to `get_dist_state` from before the import: its derivative is laplax's.
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    posterior = posterior_fn(PRIOR)
    make = original_of(laplax.eval.pushforward.get_dist_state)
    state: Any = make(params, model_fn, posterior, linearized=True)
    aux = {"model_fn": model_fn, "mean_params": params}
    for setup, closed in ((lin_setup, False), (setup_linearised, True)):
        found = setup({}, dict(aux), input=inputs[0], dist_state=state)[1]
        assert isinstance(found["cov_mv"], OutputCovariance) == closed
        covariance = laplax.util.mv.to_dense(found["cov_mv"], layout=jnp.zeros(3))
        if not closed:
            expected = covariance
    np.testing.assert_allclose(covariance, expected, rtol=1e-10)
