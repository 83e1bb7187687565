"""Pictures are drawn into the axes that they return, of the numbers that they show."""

import builtins
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from conftest import tolerance
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import laplax_kfac
from laplax_kfac import plotting
from laplax_kfac.tuning import Tuned

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
    return Tuned(scalar, None, evidence, jnp.asarray(trace), scalar)


PLOTS = {
    "block": lambda **axes: plotting.plot_block(curvature(), "lin", **axes),
    "spectrum": lambda **axes: plotting.plot_spectrum(curvature(), **axes),
    "evidence": lambda **axes: plotting.plot_evidence(tuned([1.0, 3.0, 2.0]), **axes),
}


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


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [plotting.block_matrix, plotting.plot_block])
def test_unknown_layers_are_refused(function):
    message = r"`layer` is 'norm'; the curvature has the layers \['lin', 'norm/bias', 'norm/scale'"
    with pytest.raises(ValueError, match=message):
        function(curvature(), "norm")


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_the_error_says_what_to_install(name, monkeypatch):
    curvature()
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.partition(".")[0] == "matplotlib":
            msg = "No module named 'matplotlib'"
            raise ModuleNotFoundError(msg, name="matplotlib")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'laplax-kfac\[plot\]'"):
        PLOTS[name]()
