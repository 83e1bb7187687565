"""A second fit uses what the first compiled, unless the model has changed."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplax_kfac
from laplax_kfac import patterns
from laplax_kfac.parsing import cache_keys as fingerprint

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
DATA = {"input": jnp.arange(12.0).reshape(4, 3), "target": jnp.ones((4, 2))}


class Changing:
    """A model with state of its own, which may be changed between two fits."""

    def __init__(self):
        self.gain, self.shift, self.steep = jnp.ones(2), np.zeros(3), 1.0

    def __call__(self, input, params):
        h = (input + self.shift) @ params["w"] * self.gain + params["b"]
        return jnp.tanh(self.steep * h)


def passes(model_fn, params=PARAMS, **options):
    """The compiled passes that a new accumulator finds for a model."""
    accumulator = laplax_kfac.accumulator(model_fn, params, loss_fn="mse", **options)
    return accumulator._compiled(DATA).statistics


def diagonal(model_fn):
    curv = laplax_kfac.kfac(model_fn, PARAMS, DATA, loss_fn="mse")
    return np.concatenate([x.ravel() for x in jax.tree.leaves(curv.diagonal())])


def test_a_second_fit_compiles_nothing():
    model = Changing()
    first = diagonal(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laplax_kfac.factors.batch_sums", None)  # what a new trace would call
        np.testing.assert_array_equal(diagonal(model), first)


@pytest.mark.parametrize(
    "change",
    [
        {"gain": jnp.array([2.0, -1.0])},  # a factor of the weight, part of the layer
        {"shift": np.ones(3)},  # an argument of what is compiled
        {"steep": 2.0},  # a literal
    ],
)
def test_a_model_that_has_changed_is_evaluated_as_it_is(change):
    model, other = Changing(), Changing()
    before = diagonal(model)
    vars(model).update(change)
    vars(other).update(change)
    assert not np.allclose(diagonal(model), before)
    np.testing.assert_allclose(diagonal(model), diagonal(other), rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"fisher_type": "mc"}, {"params_filter": "w"}, {"separate_weight_and_bias": True}]
)
def test_other_options_are_other_passes(options):
    model = Changing()
    assert passes(model) is passes(model)
    assert passes(model, **options) is not passes(model)


def test_the_key_is_an_argument():
    model = Changing()
    first, second = (passes(model, fisher_type="mc", key=jax.random.key(k)) for k in (0, 1))
    assert first is second


def test_what_is_kept_is_bounded_and_dies_with_the_model():
    def model_fn(input, params):
        return input @ params["w"] + params["b"]

    for samples in range(1, fingerprint.MOST_KEPT + 3):
        passes(model_fn, fisher_type="mc", mc_samples=samples)
    assert len(fingerprint._KEPT[model_fn]) == fingerprint.MOST_KEPT
    reference = weakref.ref(model_fn)
    del model_fn
    gc.collect()
    assert reference() is None


def test_models_without_a_hash_are_fitted_every_time():
    @dataclasses.dataclass
    class Unhashable:
        def __call__(self, input, params):
            return input @ params["w"] + params["b"]

    model = Unhashable()
    np.testing.assert_array_equal(diagonal(model), diagonal(model))


def test_values_are_alike_if_they_are_made_alike():
    same = [patterns.bias(np.arange(4).reshape(2, 2), 1) for _ in range(2)]
    other = patterns.bias(np.arange(4).reshape(2, 2)[::-1], 1)
    alike = [fingerprint.of_value(p) for p in (*same, other)]
    assert alike[0] == alike[1] != alike[2]
    assert fingerprint.of_value(set()) != fingerprint.of_value(set())


def test_constants_inside_a_jaxpr_count():
    def inside(value):
        constant = jnp.full(2, value)
        closed = jax.make_jaxpr(lambda x: x + constant)(jnp.zeros(2))
        eqn: Any = SimpleNamespace(params={"branches": (closed,)})
        outer: Any = SimpleNamespace(eqns=[eqn])
        return fingerprint._inner_constants(outer)

    assert inside(1.0) == inside(1.0)
    assert inside(1.0) != inside(2.0)


# -- losses --------------------------------------------------------------------------------------

SCALE = 1.0


def squares(factor):
    """A loss made anew."""
    return lambda f, y: factor * SCALE * jnp.sum((f - y) ** 2)


def test_a_loss_that_is_made_anew_uses_the_same_passes(monkeypatch):
    model = Changing()

    def found(factor):
        accumulator = laplax_kfac.accumulator(model, PARAMS, loss_fn=squares(factor))
        return accumulator._compiled(DATA).statistics

    assert found(1.0) is found(1.0)
    assert found(2.0) is not found(1.0)
    assert found(jnp.asarray(3.0)) is not found(jnp.asarray(4.0))
    before = found(1.0)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    assert found(1.0) is not before


def test_targets_of_another_shape_are_traced_with_their_own_loss():
    model = Changing()

    def found(loss_fn, columns):
        data = {"input": DATA["input"], "target": jnp.ones((4, columns))}
        return laplax_kfac.kfac(model, PARAMS, data, loss_fn=loss_fn).trace()

    def narrow(f, y):  # the same as `wide` where a target has one entry
        return jnp.sum((f - y[0]) ** 2)

    def wide(f, y):
        return jnp.sum((f - y[0]) ** 2) * y.size

    assert found(narrow, 1) == found(wide, 1)
    np.testing.assert_allclose(found(wide, 2), 2 * found(narrow, 2), rtol=1e-6)


# -- predictions and samples ---------------------------------------------------------------------


def predictions(model, curvature):
    """What the predictive functions return, in two parts each where they are in parts."""
    arguments: tuple[Any, Any, Any, Any] = curvature, model, PARAMS, DATA["input"]
    options: Any = {"prior_prec": 0.5, "batch_size": 2}
    samples = laplax_kfac.predictive_samples(*arguments, jax.random.key(0), 3, **options)
    return [
        laplax_kfac.predictive_covariance(*arguments, **options).covariance,
        laplax_kfac.predictive_variance(*arguments, **options).variance,
        laplax_kfac.joint_covariance(*arguments, **options),
        samples,
        laplax_kfac.predictive_samples(
            *arguments, jax.random.key(0), 3, linearised=False, **options
        ),
    ]


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_predictions_are_compiled_once_and_follow_the_model(caplog):
    model = Changing()
    curvature = laplax_kfac.kfac(model, PARAMS, DATA, loss_fn="mse", separate_weight_and_bias=True)

    def predict():
        caplog.clear()
        with jax.log_compiles():
            found = predictions(model, curvature)
        return found, [m for m in caplog.messages if m.startswith("Finished XLA compilation")]

    first, compiled = predict()
    assert compiled
    again, compiled = predict()
    assert not compiled
    assert_all_close(again, first)
    for change in ({"shift": np.ones(3)}, {"steep": 2.0}):  # an argument, and a literal
        vars(model).update(change)
        other = Changing()
        vars(other).update(vars(model))
        changed, _ = predict()
        assert_all_close(changed, predictions(other, curvature))
        assert not np.allclose(changed[0], first[0])


def test_constants_of_a_transformation_are_not_kept():
    model = Changing()
    curvature = laplax_kfac.kfac(model, PARAMS, DATA, loss_fn="mse")

    @jax.jit
    def moved(shift):
        def shifted(input, params):
            return model(input + shift, params)

        return predictions(shifted, curvature)

    expected = Changing()
    for shift in (0.0, 1.0):
        expected.shift = np.full(3, shift, np.float32)
        assert_all_close(moved(jnp.full(3, shift)), predictions(expected, curvature))


def test_weight_samples_are_compiled_once():
    curvature = laplax_kfac.kfac(Changing(), PARAMS, DATA, loss_fn="mse")
    draws = [curvature.sample(jax.random.key(k), 2, PARAMS, prior_prec=0.5) for k in (0, 0, 1)]
    assert_all_close(jax.tree.leaves(draws[0]), jax.tree.leaves(draws[1]))
    assert not np.allclose(draws[0]["w"], draws[2]["w"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laplax_kfac.posterior.posterior._noise", None)  # what a new trace would call
        curvature.sample(jax.random.key(2), 2, PARAMS, prior_prec=1.5)
