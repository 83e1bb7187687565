"""Public objects print themselves in a few lines, whatever they hold, and never their arrays."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplax_kfac
from laplax_kfac.summaries import MOST_LINES, WIDTH, brief

NUM_LAYERS = 14


def model_fn(input, params):
    for k in range(NUM_LAYERS):
        input = jnp.tanh(input @ params[f"layer{k}"]["w"] + params[f"layer{k}"]["b"])
    return input


@pytest.fixture(scope="module")
def objects():
    """Every kind of public object, of a network with many layers."""
    widths = [4, 5, 6, 4, 4, 5, 5, 6, 6, 4, 6, 5, 4, 4, 6]
    params = {
        f"layer{k}": {"w": jnp.ones((n, m)) / n, "b": jnp.zeros(m)}
        for k, (n, m) in enumerate(itertools.pairwise(widths))
    }
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, widths[0])), jnp.float32)
    data = x, jnp.ones((6, widths[-1]))
    curv = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    accumulator = laplax_kfac.accumulator(model_fn, params, loss_fn="mse")
    tuned = laplax_kfac.tune(curv, params, log_likelihood=fit, steps=2)
    return {
        "curvature": curv,
        "posterior": laplax_kfac.make_posterior(curv, 1.0),
        "block": curv.blocks[0],
        "space": curv.space,
        "fit": fit,
        "accumulator": accumulator,
        "state": accumulator.init(),
        "statistics": accumulator.update(accumulator.init(), data),
        "tuned": tuned,
        "evidence": tuned.evidence,
        "validation": laplax_kfac.Validation(model_fn, data, "mse"),
        "covariances": laplax_kfac.predictive_covariance(curv, model_fn, params, x, prior_prec=1.0),
        "variances": laplax_kfac.predictive_variance(curv, model_fn, params, x, prior_prec=1.0),
        "options": laplax_kfac.Options(key=jax.random.key(1), kfac_approx={"a*": "reduce"}),
        "likelihood": laplax_kfac.likelihood.gaussian(0.1),
        "error": laplax_kfac.relative_error(
            curv, model_fn, params, data, loss_fn="mse", num_probes=1
        ),
        "record": laplax_kfac.intermediates_and_gradients(model_fn, params, data, loss_fn="mse")[
            "layer0"
        ],
    }


def test_all_are_short_and_show_no_array(objects):
    for name, found in objects.items():
        lines = repr(found).splitlines()
        assert len(lines) <= MOST_LINES, name
        assert max(map(len, lines)) <= WIDTH + 2, name
        assert type(found).__name__ in lines[0]
        assert "Array(" not in repr(found), name


def test_curvature_shows_layers_and_sizes(objects):
    lines = repr(objects["curvature"]).splitlines()
    total = objects["curvature"].space.size
    assert lines[0] == f"Curvature of {NUM_LAYERS} layers, {total:,} parameters"
    assert lines[1].split() == ["layer0", "kronecker", "4+1", "x", "5", "25", "parameters"]
    assert lines[-1] == f"  ... {NUM_LAYERS - 12} more"


def test_numbers_are_shown(objects):
    evidence = objects["evidence"]
    assert f"value={float(evidence.value):.5g}" in repr(evidence)
    assert f"prior_prec={float(objects['tuned'].prior_prec):.5g}" in repr(objects["tuned"])


def test_tracers_shapes_and_nothing_inside(objects):
    texts: list[str] = []

    @jax.jit
    def traced(values):
        texts.extend(map(repr, values))
        return jax.tree.map(jnp.zeros_like, values)

    held = [objects[k] for k in ("curvature", "posterior", "tuned", "covariances", "statistics")]
    shapes = jax.eval_shape(traced, held)
    texts += map(repr, shapes)
    texts += map(repr, jax.tree.map(lambda _: None, held))
    texts += map(repr, jax.tree.map(lambda _: object(), held))
    texts.append(repr(object.__new__(laplax_kfac.Evidence)))
    assert len(texts) == 21
    assert all(len(text.splitlines()) <= MOST_LINES for text in texts)
    assert "prior_prec=float32[]" in texts[2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5"),
        (np.float64(2.5), "2.5"),
        (np.zeros((2, 3)), "float64[2,3]"),
        (jnp.int32(7), "7"),
        ({"a": 1.0, "b": (2, None)}, "{'a': 1, 'b': (2, None)}"),
        (np.mean, "mean"),
        ([np.zeros(4), np.zeros(5)], "<list of 2 leaves, 9 numbers>"),
        (tuple("abcdefgh"), "<tuple of 8>"),
    ],
)
def test_brief(value, text):
    assert brief(value) == text


def test_deleted_arrays_are_shapes():
    array = jnp.zeros(())
    array.delete()
    assert brief(array) == "float32[]"
