"""Pictures of curvature and of predictions: needs matplotlib, the extra ``plot``.

Each function draws into the axes it is given, or into those of a new figure, and returns them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import require_positive
from laplax_kfac.bases import Dense
from laplax_kfac.blocks.blocks import BlockDiagonal, apply
from laplax_kfac.evidence.evidence import Evidence, log_marginal_likelihood
from laplax_kfac.evidence.fit import DataFit
from laplax_kfac.evidence.tuning import Tuned
from laplax_kfac.laplax_adapter import metrics
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.posterior.prior import Scalar
from laplax_kfac.predictive.gaussians import Marginals, Predictive

Axes = Any
"""What matplotlib draws on, and what it has drawn; matplotlib is not needed to import this."""


def _axes(axes: Axes, count: int = 1) -> Axes:
    """The axes to draw into: given ones, or a row of new ones."""
    if axes is not None:
        if count > 1 and np.size(axes) != count:
            msg = f"`axes` must hold {count} axes, found {np.size(axes)}."
            raise ValueError(msg)
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        msg = "laplax_kfac.plotting needs matplotlib: pip install 'laplax-kfac[plot]'."
        raise ImportError(msg) from error
    if count == 1:
        return plt.subplots(layout="constrained")[1]
    return plt.subplots(1, count, figsize=(3.4 * count, 3.2), layout="constrained")[1]


def _layer_number(curvature: BlockDiagonal, layer: str) -> int:
    names = [entry.name for entry in curvature.layers]
    if layer not in names:
        msg = f"`layer` is {layer!r}; the curvature has the layers {names}."
        raise ValueError(msg)
    return names.index(layer)


def block_matrix(curvature: BlockDiagonal, layer: str) -> Float[Array, "p p"]:
    """One layer's block as a dense matrix, over its (rows, out) matrix raveled.

    Raises:
        ValueError: If there is no such layer.
    """
    number = _layer_number(curvature, layer)
    block, record = curvature.blocks[number], curvature.layers[number]
    eye = jnp.eye(record.size).reshape(record.size, *record.shape)
    return jax.vmap(lambda v: apply(block, v))(eye).reshape(record.size, record.size)


def factor_matrices(
    curvature: BlockDiagonal, layer: str
) -> tuple[Float[Array, "rows rows"], Float[Array, "out out"]]:
    """The two factors of a Kronecker block, each scaled to the mean eigenvalue 1.

    They are the partial traces of the block, and so defined for corrected eigenvalues as well.

    Raises:
        ValueError: If there is no such layer, its block is no Kronecker product, or it is a stack.
    """
    number = _layer_number(curvature, layer)
    block, record = curvature.blocks[number], curvature.layers[number]
    if len(block.sides) != 2 or block.eigenvalues.ndim != 2:
        kind = "a stack of blocks" if block.eigenvalues.ndim > len(block.sides) else record.block
        msg = f"`layer` {layer!r} has no two factors: its block is {kind}."
        raise ValueError(msg)
    inputs, outputs = (
        Dense().promote(basis, len(values)).matrix(values)
        for basis, values in zip(
            block.sides, (block.eigenvalues.mean(axis=1), block.eigenvalues.mean(axis=0)),
            strict=True,
        )
    )  # fmt: skip
    mean = jnp.mean(block.eigenvalues)
    scale = jnp.where(mean > 0, mean, 1.0)
    return inputs / scale, outputs / scale


def _image(matrix: Float[Array | np.ndarray, "p p"], top: float, axes: Axes) -> Axes:
    """Draw a matrix; its colour scale is logarithmic in the size of the entries."""
    from matplotlib.colors import SymLogNorm

    norm = SymLogNorm(linthresh=1e-3 * top, vmin=-top, vmax=top)
    image = axes.imshow(np.asarray(matrix), norm=norm, cmap="RdBu_r", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def _colorbar(image: Axes, axes: Axes) -> None:
    """A colour bar with few ticks: around zero they would overlap."""
    first = axes[0] if isinstance(axes, list) else axes
    power = 10.0 ** np.floor(np.log10(image.norm.vmax))
    ticks = [-power, -power / 100, 0.0, power / 100, power]
    first.figure.colorbar(image, ax=axes, ticks=ticks)


def _top(*matrices: ArrayLike) -> float:
    return max(float(np.abs(m).max(initial=0.0)) for m in map(np.asarray, matrices)) or 1.0


def plot_block(curvature: BlockDiagonal, layer: str, *, axes: Axes = None) -> Axes:
    """Image of one layer's block; the colour scale is logarithmic in the entries' size.

    Args:
        curvature: The curvature, or a posterior's precision.
        layer: Name of the layer.
        axes: Where to draw; a new figure by default.

    Raises:
        ValueError: If there is no such layer.
    """
    axes = _axes(axes)
    matrix = block_matrix(curvature, layer)
    _colorbar(_image(matrix, _top(matrix), axes), axes)
    axes.set_title(f"{layer}: {curvature.layers[_layer_number(curvature, layer)].block}")
    return axes


def plot_factors(curvature: BlockDiagonal, layer: str, *, axes: Axes = None) -> Axes:
    """Images of the two factors of a Kronecker block, each scaled to the mean eigenvalue 1.

    Args:
        curvature: The curvature.
        layer: Name of the layer.
        axes: Two axes to draw into; a new figure by default.

    Raises:
        ValueError: If the layer has no two factors.
    """
    axes = _axes(axes, 2)
    matrices = factor_matrices(curvature, layer)
    for one, matrix, title in zip(axes, matrices, ("inputs", "output gradients"), strict=True):
        _colorbar(_image(matrix, _top(matrix), one), one)
        one.set_title(f"{layer}: {title}")
    return axes


def plot_against_exact(
    curvature: BlockDiagonal, exact: PyTree, layer: str, *, axes: Axes = None
) -> Axes:
    """One layer's block beside the same block of the exact matrix, and their difference.

    The title of the difference says its size, relative to the exact block in Frobenius norm. All
    three share one colour scale, logarithmic in the size of the entries.

    Args:
        curvature: The curvature.
        exact: The exact matrix, (P, P) in laplax's flat order, such as laplax's own
            ``curv_type="full"`` returns it.
        layer: Name of the layer.
        axes: Three axes to draw into; a new figure by default.

    Raises:
        ValueError: If there is no such layer, or ``exact`` is of another shape.
    """
    number, size = _layer_number(curvature, layer), curvature.space.size
    if np.shape(exact) != (size, size):
        msg = f"`exact` must be a matrix over all {size} parameters, found shape {np.shape(exact)}."
        raise ValueError(msg)
    axes = _axes(axes, 3)
    ids = _ids(curvature, curvature.layers[number])
    ours, theirs = np.asarray(block_matrix(curvature, layer)), np.asarray(exact)[np.ix_(ids, ids)]
    norm = np.linalg.norm(theirs)
    error = np.linalg.norm(ours - theirs) / norm if norm else 0.0
    titles = (f"{layer}: {curvature.layers[number].block}", "exact", f"difference ({error:.0%})")
    for one, matrix, title in zip(axes, (ours, theirs, ours - theirs), titles, strict=True):
        image = _image(matrix, _top(ours, theirs), one)
        one.set_title(title)
    _colorbar(image, list(axes))
    return axes


def _ids(curvature: BlockDiagonal, layer: Layer) -> np.ndarray:
    """Numbers of a block's parameters in the flat order, in the order of the block."""
    rows = [curvature.space.ids(segment) for segment in layer.segments]
    return np.concatenate(rows, axis=-2 if rows[0].ndim > 1 else 0).ravel()


def plot_spectrum(curvature: BlockDiagonal, *, axes: Axes = None) -> Axes:
    """Eigenvalues of every block in descending order, one line a layer.

    Args:
        curvature: The curvature, or a posterior's precision.
        axes: Where to draw; a new figure by default.
    """
    axes = _axes(axes)
    for block, layer in zip(curvature.blocks, curvature.layers, strict=True):
        values = np.sort(np.asarray(block.eigenvalues).ravel())[::-1]
        positive = values[values > 0]
        if positive.size:
            axes.plot(np.linspace(0, positive.size / values.size, positive.size), positive,
                      label=layer.name)  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("fraction of the block's eigenvalues")
    axes.set_ylabel("eigenvalue")
    if axes.get_lines():
        axes.legend()
    return axes


def plot_evidence(tuned: Tuned, *, axes: Axes = None) -> Axes:
    """Evidence over the steps of `tune`.

    Args:
        tuned: What `tune` returned.
        axes: Where to draw; a new figure by default.
    """
    axes = _axes(axes)
    axes.plot(np.asarray(tuned.trace))
    axes.set_xlabel("step")
    axes.set_ylabel("log marginal likelihood")
    return axes


def plot_evidence_over_prior(
    curvature: BlockDiagonal,
    params: PyTree,
    *,
    log_likelihood: DataFit,
    prior_precs: Sequence[float] | ArrayLike,
    noise_variance: Scalar | None = None,
    axes: Axes = None,
) -> Axes:
    """Evidence, and its two terms, over a grid of prior precisions; its maximum is marked.

    Args:
        curvature: Curvature of the loss over the data.
        params: The trained parameters.
        log_likelihood: The fit to the same data, from `data_fit`.
        prior_precs: Prior precisions, positive.
        noise_variance: As for `log_marginal_likelihood`.
        axes: Where to draw; a new figure by default.

    Raises:
        ValueError: If a prior precision is not positive.
    """
    axes = _axes(axes)
    grid = np.asarray(prior_precs, float)
    require_positive("prior_precs", jnp.asarray(grid))

    def evidence(prior_prec: Array) -> Evidence:
        return log_marginal_likelihood(
            curvature, params, log_likelihood=log_likelihood, prior_prec=prior_prec,
            noise_variance=noise_variance,
        )  # fmt: skip

    found = jax.jit(lambda grid: jax.lax.map(evidence, grid))(jnp.asarray(grid))
    values = np.asarray(found.value)
    (line,) = axes.plot(grid, values, label="log marginal likelihood")
    best = int(np.argmax(values))
    axes.plot(grid[best], values[best], "o", color=line.get_color())
    axes.plot(grid, np.asarray(found.log_likelihood), "--", label="fit")
    axes.plot(grid, -np.asarray(found.complexity), ":", label="minus complexity")
    axes.set_xscale("log")
    axes.set_xlabel("prior precision")
    axes.legend()
    return axes


# -- predictions -----------------------------------------------------------------------------------


def plot_reliability(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 10,
    name: str | None = None,
    axes: Axes = None,
) -> Axes:
    """Reliability diagram: how often the most probable class is right, by its probability.

    The area of a point shows the share of the examples in its bin, the number beside it how many
    these are; the legend has the expected calibration error (Naeini et al. 2015). Bins and error
    are laplax's.

    Args:
        probabilities: Class probabilities, shape (N, K), such as `class_probabilities` returns.
        labels: The true classes, integers of shape (N,).
        num_bins: Bins of equal width.
        name: What the legend calls the predictions.
        axes: Where to draw, also beside other predictions; a new figure by default.

    Raises:
        ValueError: If the shapes do not fit.
    """
    probabilities, labels = jnp.asarray(probabilities), jnp.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        msg = (
            "`probabilities` must be of shape (N, K) and `labels` of shape (N,), found "
            f"{probabilities.shape} and {labels.shape}."
        )
        raise ValueError(msg)
    axes = _axes(axes)
    confidence = jnp.max(probabilities, axis=-1)
    right = (jnp.argmax(probabilities, axis=-1) == labels).astype(confidence.dtype)
    error = float(metrics.expected_calibration_error(confidence, right, num_bins))
    shares, confidences, accuracies = map(
        np.asarray, metrics.calculate_bin_metrics(confidence, right, num_bins)
    )
    full = shares > 0
    if not axes.has_data():
        axes.plot([0, 1], [0, 1], ":", color="black", label="calibrated")
    label = f"ECE {error:.3f}" if name is None else f"{name}, ECE {error:.3f}"
    (line,) = axes.plot(confidences[full], accuracies[full], label=label)
    sizes = 20 + 200 * shares[full]
    axes.scatter(confidences[full], accuracies[full], s=sizes, color=line.get_color())
    for share, *place in zip(shares[full], confidences[full], accuracies[full], strict=True):
        count = f"{round(float(share) * len(labels)):,}"
        axes.annotate(
            count, place, (6, -10), textcoords="offset points", fontsize=7, color=line.get_color()
        )
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend()
    return axes


def plot_band(
    x: ArrayLike,
    predictive: Predictive | Marginals,
    *,
    output: int = 0,
    noise_variance: Scalar | None = None,
    deviations: Sequence[float] = (1.0, 2.0),
    axes: Axes = None,
) -> Axes:
    """Predictive mean of a regression over one input, with bands of standard deviations.

    Args:
        x: The inputs, shape (N,) or (N, 1).
        predictive: The predictive at these inputs, of functions.
        output: Which output to draw.
        noise_variance: Also draws the outermost band of noisy observations, dashed.
        deviations: Half-widths of the bands, in standard deviations.
        axes: Where to draw; a new figure by default.

    Raises:
        ValueError: If ``x`` and the predictive are of different lengths, or ``x`` is not 1-d.
    """

    def of_output(numbers: ArrayLike) -> Float[np.ndarray, " N"]:
        return np.asarray(numbers).reshape(len(predictive.mean), -1)[:, output]

    values, mean = np.asarray(x), of_output(predictive.mean)
    if values.size != len(values) or values.size != mean.size:
        msg = (
            f"`x` must hold one number for each of the {mean.size} inputs of `predictive`, found "
            f"shape {values.shape}."
        )
        raise ValueError(msg)
    axes = _axes(axes)
    order = np.argsort(values.ravel())
    values, mean = values.ravel()[order], mean[order]
    deviation = np.sqrt(of_output(predictive.variance)[order])
    (line,) = axes.plot(values, mean, label="mean")
    for width in sorted(deviations):
        axes.fill_between(
            values, mean - width * deviation, mean + width * deviation,
            alpha=0.25, linewidth=0, color=line.get_color(), label=f"{width:g} std of functions",
        )  # fmt: skip
    if noise_variance is not None:
        width = max(deviations)
        noisy = predictive.with_noise(noise_variance)
        half = width * np.sqrt(of_output(noisy.variance)[order])
        label = f"{width:g} std of observations"
        axes.plot(values, mean - half, "--", color=line.get_color(), label=label)
        axes.plot(values, mean + half, "--", color=line.get_color())
    axes.legend()
    return axes
