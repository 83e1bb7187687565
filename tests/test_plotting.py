"""Pictures are drawn into the axes that they return, of the numbers that they show."""

import builtins
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from support import models, oracles
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import plotting
from laplax_kfac.evidence.tuning import Tuned
from laplax_kfac.predictive.gaussians import Marginals, Predictive

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@functools.cache
def curvature():
    """Three layers of two kinds: 25 parameters in a Kronecker block, 5 and 5 in dense ones."""
    model_fn, params, inputs, outputs = models.by_name("nnx_layer_norm").make()
    data = inputs, np.zeros((models.NUM_EXAMPLES, outputs))
    return laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")


@functools.cache
def stacked():
    model_fn, params, inputs, outputs = models.by_name("scan_over_layers").make()
    data = inputs, np.zeros((models.NUM_EXAMPLES, outputs))
    return laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")


def tuned(trace):
    scalar = jnp.zeros(())
    evidence = laplax_kfac.Evidence(scalar, scalar, scalar, scalar)
    return Tuned(scalar, None, evidence, jnp.asarray(trace), jnp.asarray(True))


@functools.cache
def mlp():
    """Two layers with joint biases, and the fit to their data."""
    model_fn, params, inputs, outputs = models.by_name("mlp").make()
    data = inputs, np.zeros((models.NUM_EXAMPLES, outputs))
    fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn="mse")
    curv = laplax_kfac.ekfac(model_fn, params, data, loss_fn="mse")
    return curv, params, fit, oracles.dense_ggn(model_fn, params, data, "mse")


def line():
    """A predictive at four unordered inputs."""
    x = np.asarray([2.0, 0.0, 1.0, 3.0])
    mean, variance = jnp.stack([x, -x], axis=1), jnp.stack([x**2, 1 + x], axis=1)
    return x, Predictive(mean, jax.vmap(jnp.diag)(variance))


CONFIDENCES = np.asarray([0.55, 0.55, 0.95, 0.95, 0.95, 0.95])
PROBABILITIES = np.stack([1 - CONFIDENCES, CONFIDENCES], axis=1)
LABELS = np.asarray([1, 0, 1, 1, 1, 0])  # half are right in the first bin, 3 of 4 in the second
GRID = [0.01, 1.0, 100.0]


def over_prior(**axes):
    curv, params, fit, _ = mlp()
    return plotting.plot_evidence_over_prior(
        curv, params, log_likelihood=fit, prior_precs=GRID, **axes
    )


PLOTS = {
    "evidence over the prior": over_prior,
    "reliability": lambda **axes: plotting.plot_reliability(PROBABILITIES, LABELS, **axes),
    "band": lambda **axes: plotting.plot_band(*line(), **axes),
    "block": lambda **axes: plotting.plot_block(curvature(), "lin", **axes),
    "spectrum": lambda **axes: plotting.plot_spectrum(curvature(), **axes),
    "evidence": lambda **axes: plotting.plot_evidence(tuned([1.0, 3.0, 2.0]), **axes),
}


ROWS = {
    "factors": (2, lambda **axes: plotting.plot_factors(curvature(), "lin", **axes)),
    "against the exact matrix": (
        3,
        lambda **axes: plotting.plot_against_exact(mlp()[0], mlp()[3], "lin1", **axes),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_axes_are_new_or_given(name):
    count, plot = ROWS[name]
    new = plot()
    assert len(new) == count
    figure, given = plt.subplots(1, count)
    assert plot(axes=given) is given
    assert all(axes.has_data() for axes in [*new, *given])
    figure.canvas.draw()
    with pytest.raises(ValueError, match=f"`axes` must hold {count} axes, found 1"):
        plot(axes=given[0])


@pytest.mark.parametrize("name", PLOTS)
def test_new_axes_are_returned(name):
    axes = PLOTS[name]()
    assert isinstance(axes, Axes)
    assert axes.has_data()
    axes.figure.canvas.draw()
    assert [plt.figure(n) for n in plt.get_fignums()] == [axes.figure]


@pytest.mark.parametrize("name", PLOTS)
def test_given_axes_are_drawn_into_and_others_left_alone(name):
    figure, (ours, other) = plt.subplots(1, 2, layout="constrained")
    assert PLOTS[name](axes=ours) is ours
    assert ours.has_data()
    assert not other.has_data()
    figure.canvas.draw()
    assert plt.get_fignums() == [figure.number]


# -- what they show ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "layer"), [(curvature, "lin"), (curvature, "norm/scale"), (stacked, "layers")]
)
def test_a_block_is_its_part_of_the_dense_matrix(fit, layer):
    record = {entry.name: entry for entry in fit().layers}[layer]
    rows = [fit().space.ids(segment) for segment in record.segments]
    ids = np.concatenate(rows, axis=-2 if rows[0].ndim > 1 else 0).ravel()
    expected = np.asarray(jax.jit(lambda c: c.to_dense())(fit()))[np.ix_(ids, ids)]
    found = plotting.block_matrix(fit(), layer)
    assert found.shape == (record.size, record.size)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_the_image_is_the_block():
    axes = PLOTS["block"]()
    (image,) = axes.get_images()
    matrix = np.asarray(plotting.block_matrix(curvature(), "lin"))
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.norm.vmax == np.abs(matrix).max() == -image.norm.vmin
    assert axes.get_title() == "lin: kronecker"


def test_a_block_of_zeros_can_be_drawn():
    zeros = curvature().map(lambda e: 0.0 * e)
    axes = plotting.plot_block(zeros, "norm/bias")
    axes.figure.canvas.draw()
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), np.zeros((5, 5)))


def test_a_spectrum_has_a_descending_line_for_every_layer():
    axes = PLOTS["spectrum"]()
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == [layer.name for layer in curvature().layers]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        layer.name for layer in curvature().layers
    ]
    for line, block in zip(lines, curvature().blocks, strict=True):
        shown, values = np.asarray(line.get_ydata()), np.ravel(block.eigenvalues)
        assert (np.diff(shown) <= 0).all()
        np.testing.assert_array_equal(np.sort(shown), np.sort(values[values > 0]))
        x = np.asarray(line.get_xdata())
        assert (x[0], x[-1]) == (0.0, (values > 0).mean())
    assert axes.get_yscale() == "log"


def test_a_spectrum_may_be_all_zeros():
    axes = plotting.plot_spectrum(curvature().map(lambda e: 0.0 * e))
    axes.figure.canvas.draw()
    assert list(axes.get_lines()) == []


@functools.cache
def partly_used():
    """A curvature with layers that have none."""
    model_fn, params, inputs, outputs = models.by_name("leaves_that_do_not_count").make()
    data = inputs, np.zeros((models.NUM_EXAMPLES, outputs))
    return laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")


def test_layers_without_curvature_have_no_line():
    axes = plotting.plot_spectrum(partly_used())
    assert [line.get_label() for line in axes.get_lines()] == ["lin"]


@pytest.mark.parametrize("layer", ["count", "dead"])
def test_blocks_of_layers_without_curvature_can_be_drawn(layer):
    axes = plotting.plot_block(partly_used(), layer)
    axes.figure.canvas.draw()
    assert axes.get_title() == f"{layer}: none"


def test_evidence_is_shown_by_step():
    (line,) = PLOTS["evidence"]().get_lines()
    np.testing.assert_array_equal(line.get_ydata(), [1.0, 3.0, 2.0])
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])


def test_factors_are_those_of_the_block_up_to_scale():
    block = curvature().blocks[0]
    inputs, outputs = plotting.factor_matrices(curvature(), "lin")
    scale = block.eigenvalues.mean()  # the block of plain KFAC is exactly their product
    expected = plotting.block_matrix(curvature(), "lin")
    np.testing.assert_allclose(scale * np.kron(inputs, outputs), expected, **tolerance(jnp.float64))
    np.testing.assert_allclose([np.trace(inputs), np.trace(outputs)], [4 + 1, 5])
    shown = [axes.get_images()[0].get_array() for axes in ROWS["factors"][1]()]
    np.testing.assert_array_equal(shown[0], inputs)
    np.testing.assert_array_equal(shown[1], outputs)


def test_the_exact_block_stands_beside_ours_and_their_difference():
    curv, *_, exact = mlp()
    axes = ROWS["against the exact matrix"][1]()
    ours, theirs, difference = (np.asarray(a.get_images()[0].get_array()) for a in axes)
    # The flat order has lin1/b, then lin1/w; the block has the bias as its last row.
    order = [*range(5, 25), *range(5)]
    np.testing.assert_array_equal(theirs, exact[np.ix_(order, order)])
    np.testing.assert_array_equal(ours, plotting.block_matrix(curv, "lin1"))
    np.testing.assert_allclose(difference, ours - theirs, **tolerance(jnp.float64))
    error = np.linalg.norm(difference) / np.linalg.norm(theirs)
    assert [a.get_title() for a in axes] == [
        "lin1: kronecker",
        "exact",
        f"difference ({error:.0%})",
    ]
    assert len({a.get_images()[0].norm.vmax for a in axes}) == 1


def test_evidence_over_the_prior_has_its_maximum_marked():
    curv, params, fit, _ = mlp()
    value, best, likelihood, complexity = over_prior().get_lines()
    found = laplax_kfac.log_marginal_likelihood(curv, params, log_likelihood=fit, prior_prec=1.0)
    np.testing.assert_allclose(value.get_ydata()[1], found.value, **tolerance(jnp.float64))
    np.testing.assert_allclose(likelihood.get_ydata()[1], found.log_likelihood)
    np.testing.assert_allclose(complexity.get_ydata()[1], -found.complexity)
    assert list(value.get_xdata()) == GRID
    assert best.get_ydata() == [max(value.get_ydata())]


def test_reliability_is_the_share_of_right_answers_by_confidence():
    axes = plotting.plot_reliability(PROBABILITIES, LABELS, name="model")
    diagonal, points = axes.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    np.testing.assert_allclose(points.get_xdata(), [0.55, 0.95])
    np.testing.assert_allclose(points.get_ydata(), [0.5, 0.75])
    error = (2 * 0.05 + 4 * 0.2) / 6
    assert points.get_label() == f"model, ECE {error:.3f}"
    assert [text.get_text() for text in axes.texts] == ["2", "4"]  # examples in the bins
    plotting.plot_reliability(PROBABILITIES, LABELS, num_bins=1, axes=axes)
    assert len(axes.get_lines()) == 3  # one diagonal is enough
    np.testing.assert_allclose(axes.get_lines()[-1].get_ydata(), [4 / 6])


def test_bands_are_ordered_and_as_wide_as_the_deviations():
    x, predictive = line()
    axes = plotting.plot_band(x, predictive, output=1, noise_variance=3.0, deviations=(3.0, 1.0))
    mean, lower, upper = axes.get_lines()
    np.testing.assert_array_equal(mean.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_array_equal(mean.get_ydata(), [0, -1, -2, -3])
    half = 3 * np.sqrt(1 + np.arange(4) + 3.0)
    np.testing.assert_allclose(upper.get_ydata(), -np.arange(4) + half)
    np.testing.assert_allclose(lower.get_ydata(), -np.arange(4) - half)
    narrow, wide = (c.get_paths()[0].vertices[:, 1] for c in axes.collections)
    for band, width in ((narrow, 1), (wide, 3)):
        np.testing.assert_allclose(
            band.max(), max(-np.arange(4) + width * np.sqrt(1 + np.arange(4)))
        )
    marginals = plotting.plot_band(x[:, None], Marginals(predictive.mean, predictive.variance))
    np.testing.assert_array_equal(marginals.get_lines()[0].get_ydata(), [0, 1, 2, 3])


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [plotting.block_matrix, plotting.plot_block])
def test_unknown_layers_are_refused(function):
    message = r"`layer` is 'norm'; the curvature has the layers \['lin', 'norm/bias', 'norm/scale'"
    with pytest.raises(ValueError, match=message):
        function(curvature(), "norm")


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_the_error_says_what_to_install(name, monkeypatch):
    curvature(), mlp(), line()
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.partition(".")[0] == "matplotlib":
            msg = "No module named 'matplotlib'"
            raise ModuleNotFoundError(msg, name="matplotlib")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'laplax-kfac\[plot\]'"):
        PLOTS[name]()


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: plotting.plot_factors(curvature(), "norm/scale"), "its block is dense"),
        (lambda: plotting.plot_factors(stacked(), "layers"), "its block is a stack of blocks"),
        (
            lambda: plotting.plot_against_exact(curvature(), np.eye(3), "lin"),
            r"`exact` must be a matrix over all 35 parameters, found shape \(3, 3\)",
        ),
        (
            lambda: plotting.plot_reliability(PROBABILITIES[0], LABELS),
            r"`probabilities` must be of shape \(N, K\)",
        ),
        (lambda: plotting.plot_band(np.ones((4, 2)), line()[1]), "`x` must hold one number for"),
        (
            lambda: plotting.plot_evidence_over_prior(
                mlp()[0], mlp()[1], log_likelihood=mlp()[2], prior_precs=[0.0, 1.0]
            ),
            "`prior_precs` must be positive",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(plot, message):
    with pytest.raises(ValueError, match=message):
        plot()
