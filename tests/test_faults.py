"""Faults of data: noticed within a pass, read once at its end, and named."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal

import laplax_kfac
from laplax_kfac.faults import LATEST, Context, Fault, Faults, Place, Placed, added

pytestmark = pytest.mark.usefixtures("x64")

PARAMS = {"first": normal(3, 4, seed=1), "second": normal(4, 2, seed=2)}
X, Y = normal(6, 3, seed=3), np.arange(6) % 2
LOSS: dict[str, Any] = {"loss_fn": "cross_entropy"}


def model_fn(input, params):
    return jax.nn.softplus(input @ params["first"]) @ params["second"]


def with_nan(x, example=4, value=np.nan):
    x = np.array(x)
    x[example, 1] = value
    return x


def batches_with(number, batch, count=20):
    data = [(X, Y)] * count
    data[number] = batch
    return data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "kfoc", "data_fit"])
def test_the_first_batch_and_the_layers_are_named(name, value):
    data = batches_with(17, (with_nan(X, value=value), Y))
    data[19] = data[17]
    with pytest.raises(ValueError, match=r"inputs.*batch 17 .*") as error:
        getattr(laplax_kfac, name)(model_fn, PARAMS, data, **LOSS)
    if name != "data_fit":
        assert "['first', 'second']" in str(error.value)


def test_examples_of_a_batch_that_is_split_are_named():
    with pytest.raises(ValueError, match=r"batch 1 .*, among its examples 4 to 5\."):
        laplax_kfac.kfac(
            model_fn, PARAMS, batches_with(1, (with_nan(X), Y), 3), **LOSS, batch_size=2
        )


def test_what_can_be_kept_is_kept():
    data = batches_with(1, (with_nan(X), Y), 3)
    found = laplax_kfac.kfac(model_fn, PARAMS, data, **LOSS, nonfinite="keep")
    assert found.nonfinite_layers() == ["first", "second"]
    fit = laplax_kfac.data_fit(model_fn, PARAMS, data, **LOSS, nonfinite="keep")
    assert np.isnan(fit.loss)
    with pytest.raises(ValueError, match="`nonfinite` must be one of 'error', 'keep'"):
        laplax_kfac.kfac(model_fn, PARAMS, data, **LOSS, nonfinite="ignore")
    with pytest.raises(ValueError, match="`nonfinite` must be one of 'error', 'keep'"):
        laplax_kfac.data_fit(model_fn, PARAMS, data, **LOSS, nonfinite="ignore")


def test_wrong_targets_are_never_kept():
    with pytest.raises(ValueError, match=r"targets.*outside 0\.\.1.*batch 0"):
        laplax_kfac.kfac(model_fn, PARAMS, (X, Y + 1), **LOSS, nonfinite="keep")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_named(value):
    broken = {**PARAMS, "first": jnp.asarray(PARAMS["first"]).at[0].set(value)}
    with pytest.raises(ValueError, match=r"parameters \['first'\] hold NaN or infinity"):
        laplax_kfac.kfac(model_fn, broken, (X, Y), **LOSS)
    with pytest.raises(ValueError, match=r"parameters \['first'\] hold NaN or infinity"):
        laplax_kfac.data_fit(model_fn, broken, (X, Y), **LOSS)


def test_what_arises_inside_is_told_from_the_data():
    def logarithm(input, params):
        return jnp.log(input @ params["first"]) @ params["second"]

    for function in (laplax_kfac.kfac, laplax_kfac.data_fit):
        with pytest.raises(ValueError, match=r"arise inside the model.*batch 0"):
            function(logarithm, PARAMS, (X, Y), **LOSS)


def test_targets_that_are_not_finite_are_told_from_inputs():
    data = batches_with(3, (X, with_nan(normal(6, 2))), 5)
    data = [(x, y if y.ndim > 1 else np.zeros((6, 2))) for x, y in data]
    for function in (laplax_kfac.kfac, laplax_kfac.data_fit):  # type2 does not look at them
        with pytest.raises(ValueError, match=r"targets of `data` hold NaN.*batch 3"):
            function(model_fn, PARAMS, data, loss_fn="mse")


def test_a_model_may_know_what_to_do_with_missing_values():
    def filled(input, params):
        return model_fn(jnp.where(jnp.isnan(input), 0.0, input), params)

    x = with_nan(X)
    found = laplax_kfac.kfac(filled, PARAMS, (x, Y), **LOSS)
    expected = laplax_kfac.kfac(filled, PARAMS, (np.nan_to_num(x), Y), **LOSS)
    np.testing.assert_allclose(found.to_dense(), expected.to_dense(), rtol=1e-12)


def test_finite_sums_whose_product_is_not():
    with pytest.raises(ValueError, match="range of its floating-point type"):
        laplax_kfac.kfac(
            lambda input, params: input @ params, normal(3, 2), (1e100 * X, Y),
            loss_fn=lambda f, _: 1e150 * jnp.sum(f**2),
        )  # fmt: skip


# -- examples of weight 0 ------------------------------------------------------------------------


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_example_of_weight_0_is_left_out_whatever_is_in_it(as_array, value):
    weights = as_array(np.array([1.0, 2.0, 0.0, 1.0, 0.0, 3.0]))
    broken = {"input": with_nan(X, value=value), "target": np.where(np.arange(6) == 4, -7, Y)}
    kept = np.asarray(weights) > 0
    for function in (laplax_kfac.kfac, laplax_kfac.ekfac):
        found = function(model_fn, PARAMS, {**broken, "weight": weights}, **LOSS, batch_size=4)
        part = {"input": X[kept], "target": Y[kept], "weight": np.asarray(weights)[kept]}
        expected = function(model_fn, PARAMS, part, **LOSS)
        np.testing.assert_allclose(found.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-12)
    fit = laplax_kfac.data_fit(model_fn, PARAMS, {**broken, "weight": weights}, **LOSS)
    fit_of_part = laplax_kfac.data_fit(model_fn, PARAMS, part, **LOSS)
    np.testing.assert_allclose(fit.loss, fit_of_part.loss)
    assert fit.num_outputs == fit_of_part.num_outputs


def test_updates_leave_examples_out_too():
    accumulate = laplax_kfac.accumulator(model_fn, PARAMS, **LOSS)
    weights = jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])

    def after(x, weights):
        state = accumulate.update(accumulate.init(), (x, Y), weights)
        return accumulate.finalize(state).to_dense()

    expected = after(X, weights)
    np.testing.assert_allclose(after(with_nan(X), weights), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(after)(with_nan(X), weights), expected, rtol=1e-9)


def test_an_example_with_nan_that_padding_repeats():
    data = [(X, Y), (with_nan(X, example=2)[:3], Y[:3])]  # the last one of a ragged batch
    with pytest.raises(ValueError, match=r"inputs.*batch 1"):
        laplax_kfac.kfac(model_fn, PARAMS, data, **LOSS)


@pytest.mark.parametrize("weights", [[1, 1, -1, 1, 1, 1], [1, np.nan, 1, 1, 1, 1]])
def test_weights_of_updates_that_are_no_weights(weights):
    accumulate = laplax_kfac.accumulator(model_fn, PARAMS, **LOSS)
    state = accumulate.update(accumulate.init(), (X, Y))
    state = accumulate.update(state, (X, Y), jnp.asarray(weights, float))
    with pytest.raises(
        ValueError, match=r"weights of `data` hold numbers that are negative.*batch 1"
    ):
        accumulate.finalize(state)


# -- what is read, and when ----------------------------------------------------------------------


def test_a_pass_reads_nothing_before_its_end(monkeypatch):
    """As many arrays come to the host for three batches as for thirty."""
    read = []
    array = type(jnp.zeros(1))
    for name in ("__array__", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(array, name)

        def counting(self, *args, original=original, **kwargs):
            read.append(self.shape)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(array, name, counting)

    def reads(count, function):
        weight = jnp.ones(6)
        data = [{"input": jnp.asarray(X), "target": jnp.asarray(Y), "weight": weight}] * count
        read.clear()
        function(model_fn, PARAMS, data, **LOSS)
        return len(read)

    for function in (laplax_kfac.kfac, laplax_kfac.data_fit, laplax_kfac.ekfac):
        reads(1, function)  # compiles
        assert reads(3, function) == reads(30, function)


def test_under_jit_nothing_is_read():
    accumulate = laplax_kfac.accumulator(model_fn, PARAMS, **LOSS)

    @jax.jit
    def trace(x, y):
        state = accumulate.update(accumulate.init(), (x, y))
        return accumulate.finalize(state).trace(), state

    found, state = trace(with_nan(X), Y)
    assert np.isnan(found)
    with pytest.raises(ValueError, match=r"inputs of `data`.*batch 0"):  # but still known
        accumulate.finalize(state)


def test_faults_are_merged():
    accumulate = laplax_kfac.accumulator(model_fn, PARAMS, **LOSS)
    good = accumulate.update(accumulate.init(), (X, Y))
    bad = accumulate.update(good, (X, Y + 1))
    for pair in itertools.permutations((good, bad)):
        with pytest.raises(ValueError, match=r"outside 0\.\.1.*batch 1"):
            accumulate.finalize(accumulate.merge(*pair))
    accumulate.finalize(accumulate.merge(accumulate.init(), good))
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        accumulate.finalize(accumulate.merge(accumulate.init(), bad))
    other = laplax_kfac.accumulator(model_fn, PARAMS, loss_fn="mse")
    others = other.update(other.init(), (X, np.zeros((6, 2))))
    with pytest.raises(ValueError, match="statistics of one loss"):
        accumulate.merge(good, others)


def test_the_earliest_batch_wins():
    first, second = Fault("targets", "a"), Fault("targets", "b")

    def of(a, b, number):
        flags = {first: jnp.asarray(a), second: jnp.asarray(b)}
        return Faults.of_batch(flags, jnp.uint32(number))

    total = added(added(of(False, False, 0), of(True, False, 5)), of(True, True, 7))
    assert total.numbers() == {first: 5, second: 7}
    assert (added(of(True, False, 5), of(True, False, 3))).numbers() == {first: 3}
    assert of(True, False, 0).first.tolist() == [LATEST, 0]


def test_places_of_parts():
    parts = Placed([4, 2], lambda stream: ((b, jnp.ones(2)) for n in stream for b in range(n // 2)))
    assert [part[0] for part in parts] == [0, 1, 0]
    assert parts.places == [Place(0, 0, 2), Place(0, 2, 2), Place(1, 0, 2)]
    context = Context(None, parts.places)
    assert "batch 0 (counted from 0), among its examples 0 to 1." in context.first(0)
    assert context.first(2).endswith("batch 1 (counted from 0).")


# -- what becomes of it --------------------------------------------------------------------------


def test_nothing_that_is_not_finite_is_saved_or_tuned(tmp_path):
    data = (with_nan(X), Y)
    found = laplax_kfac.kfac(model_fn, PARAMS, data, **LOSS, nonfinite="keep")
    with pytest.raises(ValueError, match="eigenvalues of the layer 'first' are not finite"):
        laplax_kfac.save(tmp_path / "c", found)
    assert not list(tmp_path.iterdir())
    fit = laplax_kfac.data_fit(model_fn, PARAMS, (X, Y), **LOSS)
    tuned = laplax_kfac.tune(found, PARAMS, log_likelihood=fit, steps=3)
    assert not tuned.converged


def test_relative_error_and_training_name_the_batch():
    curvature = laplax_kfac.kfac(model_fn, PARAMS, (X, Y), **LOSS)
    data = batches_with(2, (with_nan(X), Y), 3)
    with pytest.raises(ValueError, match=r"inputs.*batch 2"):
        laplax_kfac.relative_error(curvature, model_fn, PARAMS, data, **LOSS)
    with pytest.raises(ValueError, match=r"inputs.*batch 2"):
        laplax_kfac.marglik_training(model_fn, PARAMS, data, **LOSS, epochs=1)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        laplax_kfac.marglik_training(model_fn, PARAMS, (X, -Y), **LOSS, epochs=1)


# -- squares below the range ---------------------------------------------------------------------


@pytest.mark.parametrize("fit", [laplax_kfac.kfac, laplax_kfac.ekfac, laplax_kfac.kfoc])
def test_a_curvature_that_is_zero_is_noticed(fit):
    x, y, params = jnp.full((4, 3), 1e-185), jnp.ones((4, 2)), {"w": jnp.ones((3, 2))}

    def model_fn(input, params):
        return input @ params["w"]

    with pytest.warns(UserWarning, match="The curvature is zero"):
        curvature = fit(model_fn, params, (x, y), loss_fn="mse")
    assert float(curvature.trace()) == 0
    assert float(fit(model_fn, params, (x * 1e185, y), loss_fn="mse").trace()) > 0
