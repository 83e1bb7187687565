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
from laplax_kfac import fingerprint, patterns

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
