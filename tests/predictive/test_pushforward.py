"""The closed form in laplax's pushforward equals laplax's generic one, number by number."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import numpy as np
import pytest
from laplax.curv.cov import set_posterior_fn
from laplax.eval.pushforward import (
    lin_mc_pred_act,
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
from laplax.eval.utils import transfer_entry
from laplax.util.tree import normal_like
from support import models
from support.matrices import normal

import laplax_kfac
from laplax_kfac.laplax_adapter import plugin
from laplax_kfac.posterior.posterior import Posterior
from laplax_kfac.predictive import jacobians
from laplax_kfac.predictive import pushforward as closed

GENERIC_SETUP = plugin._original_of(lin_setup)
PRIOR = {"prior_prec": 0.3, "sigma_squared": 0.7}
RELATIVE = {jnp.dtype("float32"): 1e-5, jnp.dtype("float64"): 1e-10}


def image_to_image(input, params):
    return jnp.tanh(params["left"] @ input) @ params["right"] + params["bias"]


def one_number(input, params):
    return jnp.tanh(input @ params["w"]) @ params["v"]


def of_two_inputs(input, params):
    return jnp.tanh(input["a"] @ params["w"]) * (input["b"] @ params["v"])


BUILT = {
    "matrix output": lambda: (
        image_to_image,
        {"left": normal(2, 4), "right": normal(3, 3), "bias": normal(3)},
        normal(5, 4, 3, seed=1),
    ),
    "one number": lambda: (one_number, {"w": normal(3, 4), "v": normal(4)}, normal(5, 3, seed=1)),
    "two inputs": lambda: (
        of_two_inputs,
        {"w": normal(3, 4), "v": normal(2, 4)},
        {"a": normal(5, 3, seed=1), "b": normal(5, 2, seed=2)},
    ),
}


@functools.cache
def fitted(name: str, dtype: str) -> Any:
    """A model, its parameters, inputs and laplax's posterior function; x64 is as the caller's."""
    built = BUILT[name]() if name in BUILT else models.by_name(name).build()
    model_fn, *arrays = built
    params, inputs = jax.tree.map(
        lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None), arrays
    )
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    data = inputs, jnp.zeros_like(outputs)
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    return model_fn, params, inputs, set_posterior_fn("kfac", curvature, layout=params), curvature


def predictions(name: str, dtype: str, fns: Any, setter: Any = set_lin_pushforward) -> Any:
    model_fn, params, inputs, posterior_fn, _ = fitted(name, dtype)
    predict = setter(
        model_fn, params, posterior_fn, PRIOR, pushforward_fns=fns,
        num_samples=4 if {lin_samples, nonlin_setup} & set(fns) else 0,
        key=jax.random.key(1), loss_scaling_factor=2.0,
    )  # fmt: skip
    return jax.jit(jax.vmap(predict))(inputs)


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for entry, values in expected.items():
        got = found[entry]
        assert (got.shape, got.dtype) == (values.shape, values.dtype), entry
        error, size = np.abs(got - values).max(), np.abs(values).max()
        assert 0 < size < np.inf, entry
        assert error <= RELATIVE[values.dtype] * size, (entry, error, size)


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
            predictions(name, dtype, [GENERIC_SETUP, *entries]),
        )


@pytest.mark.usefixtures("x64")
def test_defect_variances_of_an_output_with_two_axes():
    # laplax takes whole rows for entries, so that variances are negative; from a covariance, which
    # has three axes then, it takes none at all.
    generic, found = (
        predictions("matrix output", "float64", [setup, *VARIANCE_FIRST])
        for setup in (GENERIC_SETUP, lin_setup)
    )
    dense = np.asarray(generic["pred_cov"]).transpose(0, 3, 2, 1).reshape(5, 6, 6)
    right = np.diagonal(dense, axis1=1, axis2=2)
    np.testing.assert_allclose(found["pred_var"], right, rtol=1e-10)
    np.testing.assert_allclose(found["pred_std"], np.sqrt(right), rtol=1e-10)
    assert generic["pred_var"].shape == (5, 6, 3)
    assert np.isnan(generic["pred_std"]).any()
    for setup in (GENERIC_SETUP, lin_setup):
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
        predictions("mlp", "float64", [setup, *fns]) for setup in (lin_setup, GENERIC_SETUP)
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
        (lin_setup, closed.OutputCovariance),
        (plugin.setup_linearised, closed.OutputCovariance),
        (GENERIC_SETUP, type(lambda: None)),
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
        for setup in (lin_setup, GENERIC_SETUP)
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
    generic = [GENERIC_SETUP, *setups[1:]]
    results = [
        set_lin_pushforward(function, params, posterior_fn, PRIOR, pushforward_fns=fns)(inputs[0])
        for fns in (setups, generic)
    ]
    assert not any(isinstance(mv, closed.OutputCovariance) for mv in seen)
    jax.tree.map(np.testing.assert_array_equal, *results)


# -- calibration and evaluation ------------------------------------------------------------------


def calibrate(monkeypatch: Any, during: Any = lambda: None, **options: Any) -> tuple[Any, Any]:
    """What the objective was on laplax's own grid, and what came back."""
    model_fn, params, inputs, posterior_fn, curvature = fitted("mlp", "float64")
    seen: list[float] = []

    def search(objective, **_):
        during()
        precisions = np.asarray([0.1, 1.0, 20.0])
        seen.extend(float(objective({"prior_prec": p})) for p in precisions)
        during()
        return precisions[int(np.argmin(seen))]

    monkeypatch.setitem(laplax.api.calibration_options, "grid_search", search)
    targets = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs) + normal(3, 1)
    returned = laplax.calibration(
        posterior_fn, model_fn, params, (inputs, targets), loss_fn="mse", curv_type="kfac",
        curv_estimate=curvature, **options,
    )  # fmt: skip
    return seen, returned


GENERIC = {"pushforward_fns": [GENERIC_SETUP, lin_pred_mean, lin_pred_std]}


@pytest.fixture
def linearised(monkeypatch):
    """Counts how often the model is linearised: for one input while tracing, or for many."""
    count = []

    def counting(function):
        def counted(*args, **kwargs):
            count.append(1)
            return function(*args, **kwargs)

        return counted

    compiled = jacobians.compiled_linearise
    monkeypatch.setattr(closed, "compiled_linearise", lambda *args: counting(compiled(*args)))
    monkeypatch.setattr(closed, "linearise", counting(jacobians.linearise))
    return count


@pytest.mark.usefixtures("x64")
def test_a_grid_of_priors_linearises_once(monkeypatch, linearised):
    counts = []
    seen, (prior, set_predictive) = calibrate(monkeypatch, lambda: counts.append(len(linearised)))
    assert counts[0] == counts[1] > 0  # before the grid, and not again on it
    expected, (expected_prior, _) = calibrate(monkeypatch, **GENERIC)
    assert prior == expected_prior
    np.testing.assert_allclose(seen, expected, rtol=1e-10)
    assert np.ptp(seen) > 0.1
    # What comes back is the user's own model and posterior, with the samples that were asked for.
    model_fn, _, _, posterior_fn, _ = fitted("mlp", "float64")
    assert set_predictive.keywords["model_fn"] is model_fn
    assert set_predictive.keywords["posterior_fn"] is posterior_fn
    assert set_predictive.keywords["num_samples"] == 30


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("limit", "on_the_grid"), [(200, "the batch"), (1, "every example")], ids=["inputs", "none"]
)
def test_memory_is_bounded_and_the_numbers_stay(limit, on_the_grid, monkeypatch, linearised):
    monkeypatch.setattr(closed, "TABLE_BYTES", limit)
    counts = []
    seen, _ = calibrate(monkeypatch, lambda: counts.append(len(linearised)))
    assert counts[0] < counts[1], on_the_grid
    assert (counts[0] > 0) == (on_the_grid == "the batch")
    np.testing.assert_allclose(seen, calibrate(monkeypatch, **GENERIC)[0], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_bases_that_are_not_those_of_the_curvature_are_not_kept():
    *_, curvature = fitted("mlp", "float64")
    copied = jax.tree.map(jnp.array, curvature)
    assert plugin._same_bases(curvature, curvature)
    assert not plugin._same_bases(copied, curvature)
    assert not plugin._same_bases(curvature, None)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("predictive_type", ["none", "mean_field_2"])
def test_evaluation_looks_predictions_up(predictive_type, linearised):
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    entries = ["map", "pred_mean", "pred_std"] + ["pred_act"] * (predictive_type != "none")
    metrics = transfer_entry(entries)
    fns = [lin_pred_mean, lin_pred_std]
    if predictive_type != "none":
        special = functools.partial(lin_special_pred_act, special_pred_type=predictive_type)
        fns += [special, laplax.api.get_pred_act]
    arguments = posterior_fn, model_fn, params, PRIOR, {"input": inputs, "target": inputs}
    found, predict = laplax.evaluation(*arguments, metrics=metrics, predictive_type=predictive_type)
    expected, _ = laplax.evaluation(
        *arguments, metrics=metrics, pushforward_fns=[GENERIC_SETUP, *fns]
    )
    assert_same(found, expected)
    assert len(linearised) > 0
    # What comes back takes an input as it is, not by its number.
    again = predict(jax.tree.map(lambda x: x[0], inputs))
    assert_same({k: again[k] for k in entries}, {k: v[0] for k, v in expected.items()})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("pushforward_type", "predictive_type"),
    [("linear", "mc_bridge"), ("nonlinear", "none"), ("nonlinear", "mc_bridge")],
)
def test_predictions_that_need_samples_are_laplax_own(pushforward_type, predictive_type):
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    entry = {"none": "pred_std", "mc_bridge": "mc_pred_act"}[predictive_type]
    fns = {
        ("linear", "mc_bridge"): [GENERIC_SETUP, lin_pred_mean, lin_pred_std, lin_mc_pred_act],
        ("nonlinear", "none"): [nonlin_setup, nonlin_pred_mean, nonlin_pred_std],
        ("nonlinear", "mc_bridge"): [nonlin_setup, nonlin_pred_mean, nonlin_mc_pred_act],
    }[pushforward_type, predictive_type]
    arguments = posterior_fn, model_fn, params, PRIOR, {"input": inputs, "target": inputs}
    options: Any = {
        "metrics": transfer_entry([entry]), "pushforward_type": pushforward_type, "num_samples": 3,
    }  # fmt: skip
    found, _ = laplax.evaluation(*arguments, predictive_type=predictive_type, **options)
    expected, _ = laplax.evaluation(*arguments, pushforward_fns=fns, **options)
    assert_same(found, expected)


@pytest.mark.usefixtures("x64")
def test_wrong_calls_raise_what_laplax_raises():
    model_fn, params, inputs, posterior_fn, curvature = fitted("mlp", "float64")
    with pytest.raises(TypeError, match=r"^calibration\(\) missing 1 required positional"):
        laplax.calibration(
            posterior_fn, model_fn, params, loss_fn="mse", curv_estimate=curvature, curv_type="kfac"
        )
    with pytest.raises(TypeError, match=r"^evaluation\(\) missing 2 required positional"):
        laplax.evaluation(posterior_fn, model_fn, params)
    with pytest.raises(ValueError, match="received len != 2"):
        laplax.evaluation(posterior_fn, model_fn, params, PRIOR, (inputs,))
    with pytest.raises(ValueError, match="'none at all' is not a valid Predictive"):
        laplax.evaluation(
            posterior_fn, model_fn, params, PRIOR, (inputs, inputs), predictive_type="none at all"
        )


@pytest.mark.usefixtures("x64")
def test_a_posterior_function_is_ours_by_what_it_returns():
    *_, posterior_fn, _ = fitted("mlp", "float64")
    assert plugin._is_ours(posterior_fn, PRIOR)
    assert not plugin._is_ours(set_posterior_fn("full", jnp.eye(2), layout=2), PRIOR)
    assert not plugin._is_ours(posterior_fn, {})  # a KeyError, which laplax is to raise
    assert not plugin._is_ours(lambda arguments: arguments, PRIOR)
    assert isinstance(posterior_fn(PRIOR).state, Posterior)
