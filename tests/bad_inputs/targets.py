"""Targets that no loss can mean, numbers that are not finite, models that mix examples."""

import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

import laplax_kfac as lk
from bad_inputs.fitted import LABELS, PARAMS, REGRESSION, X, Y, model
from bad_inputs.rows import Row, rows
from laplax_kfac import likelihood as lik

DATA = ("kfac", "data_fit", "marglik_training", "laplace")
PASSES = ("kfac", "ekfac", "kfoc", "data_fit", "marglik_training", "laplace")
HALF = np.full((8, 2), 0.5)


def faulty(
    functions: Iterable[str], loss_fn: Any, targets: dict[str, Any], text: str, **others: Any
) -> list[Row]:
    """Rows for targets of one loss."""
    name = loss_fn if isinstance(loss_fn, str) else f"{loss_fn.name} "
    data = {f"{name} {key}": (X, value) for key, value in targets.items()}
    return rows(functions, "data", data, ValueError, text, loss_fn=loss_fn, **others)


def misshapen(
    functions: Iterable[str], loss_fn: Any, targets: dict[str, Any], text: str
) -> list[Row]:
    """Rows for shapes and dtypes that do not go with a loss: the loss is what is named."""
    classes = loss_fn == "cross_entropy"
    argument = f"loss_fn='{loss_fn}'" if classes else "loss_fn"
    found = faulty(functions, loss_fn, targets, text)
    return [Row(f"shape: {row.id}", row.call, row.error, row.text, argument) for row in found]


def changed(array: np.ndarray, value: float) -> np.ndarray:
    """With one value in it."""
    array = np.array(array, np.float32)
    array[5, 1] = value
    return array


def spoiled(value: float) -> list[Any]:
    """Batches of which the third has one bad input."""
    return [(X, Y), (X, Y), (changed(X, value), Y), (X, Y)]


def centred(input, params):
    hidden = jnp.tanh(input @ params["first"]["w"] + params["first"]["b"])
    return (hidden - hidden.mean(0)) @ params["last"]["w"] + params["last"]["b"]


def attentive(input, params):
    hidden = jnp.tanh(input @ params["first"]["w"])
    return (hidden @ hidden.T) @ hidden @ params["last"]["w"]


def in_order(input, params):
    return jnp.sort(model(input, params), axis=0)


OUTSIDE = {
    "labels 1..C": LABELS + 1,
    "labels -1 for padding": np.where(LABELS == 1, -1, 0),
    "labels -100 for padding": np.where(LABELS == 1, -100, 0),
    "labels 255": np.where(LABELS == 1, 255, 0).astype(np.uint8),
}
NO_PROBABILITIES = {
    "rows of zeros": np.eye(2)[LABELS] * (np.arange(8) < 5)[:, None],
    "rows with weights": np.eye(2)[LABELS] * 3.0,
    "negative entries": np.asarray([[1.5, -0.5]] * 8),
    "NaN": np.full((8, 2), np.nan),
}
NO_CLASSES = {
    "floats": LABELS.astype(np.float32),
    "booleans": LABELS == 1,
    "two labels": np.zeros((8, 3), int),
    "three probabilities": np.full((8, 3), 1 / 3),
}
OUTSIDE_01 = {"-1 and 1": np.sign(Y), "2": np.full((8, 2), 2), "NaN": np.full((8, 2), np.nan)}
NARROW = {"one column": Y[:, :1], "three columns": np.zeros((8, 3)), "none": np.zeros(8)}
BROKEN = {**PARAMS, "last": {"w": np.full((4, 2), np.nan), "b": np.zeros(2)}}
ROWS: list[Row] = [
    *faulty(PASSES, "cross_entropy", {"labels 1..C": OUTSIDE["labels 1..C"]}, "ignore_index"),
    *faulty(["kfac", "data_fit"], "cross_entropy", dict([*OUTSIDE.items()][1:]), "outside 0..1"),
    *faulty(["kfac", "data_fit"], "cross_entropy", NO_PROBABILITIES, "do not sum to one"),
    *faulty(
        ["kfac"], lik.categorical(ignore_index=-1), {"labels 1..C": LABELS + 1}, "outside 0..1"
    ),
    *misshapen(DATA, "cross_entropy", {"floats": NO_CLASSES["floats"]}, "y.astype(int)"),
    *misshapen(
        ["kfac", "data_fit"], "cross_entropy", dict([*NO_CLASSES.items()][1:]), "integer classes"
    ),
    *faulty(["kfac", "data_fit"], "binary_cross_entropy", OUTSIDE_01, "outside [0, 1]"),
    *faulty(["kfac", "data_fit"], lik.poisson(), {"-1": -np.ones((8, 2))}, "counts that are neg"),
    *misshapen(DATA, "mse", {"one column": Y[:, :1]}, "shape of the output, (2,)"),
    *misshapen(["kfac", "data_fit"], "mse", dict([*NARROW.items()][1:]), "shape of the output"),
    *misshapen(["kfac"], "binary_cross_entropy", {"one column": HALF[:, :1]}, "(2,) an example"),
    *misshapen(["kfac"], "mse", {"a dictionary": {"a": Y}}, "structure of the output"),
    *misshapen(["kfac"], lik.gaussian(1.0), {"one column": Y[:, :1]}, "shape of the output"),
    *[
        Row(f"{fisher} {row.id}", row.call, row.error, row.text, row.argument)
        for fisher in ("mc", "empirical", "forward_only")
        for row in [
            *faulty(["kfac"], "cross_entropy", OUTSIDE, "outside 0..1", fisher_type=fisher)[:1],
            *rows(
                ["ekfac"] * (fisher != "forward_only"),
                "data",
                {"NaN targets": (X, np.full((8, 2), np.nan))},
                ValueError,
                "NaN or infinity",
                loss_fn="mse",
                fisher_type=fisher,
            ),
        ]
    ],
    *rows(
        PASSES,
        "data",
        {"NaN in the third batch": spoiled(np.nan)},
        ValueError,
        "in batch 2 (counted from 0)",
        loss_fn="mse",
    ),
    *rows(
        DATA[:3],
        "data",
        {"NaN targets": (X, changed(Y, np.nan)), "infinite targets": (X, changed(Y, np.inf))},
        ValueError,
        "The targets of `data` hold NaN or infinity",
        loss_fn="mse",
    ),
    *rows(
        ["kfac", "ekfac", "laplace"],
        "data",
        {"infinity in the third batch": spoiled(np.inf)},
        ValueError,
        "in batch 2 (counted from 0)",
        loss_fn="mse",
    ),
    *[
        Row(
            f"kfac inputs of {scale:g}",
            functools.partial(lk.kfac, **REGRESSION | {"data": (X * np.float32(scale), Y)}),
            ValueError,
            "beyond the range of the floating-point type",
            unnamed="it is squares of what the model makes of `data` that are too large",
        )
        for scale in (1e25, 1e30)
    ],
    *[
        Row(
            f"{name} parameters with NaN",
            functools.partial(getattr(lk, name), **REGRESSION | {"params": BROKEN}),
            ValueError,
            "The parameters ['last/w'] hold NaN or infinity",
            unnamed="they are named by their paths",
        )
        for name in ("kfac", "ekfac", "kfoc", "data_fit")
    ],
    *rows(["kfac"], "nonfinite", ["ignore", True, None], ValueError, "'error', 'keep'"),
    *rows(["data_fit"], "nonfinite", ["ignore"], ValueError, "'error', 'keep'"),
    *[
        Row(
            f"{name} {mixing.__name__}",
            functools.partial(
                getattr(lk, name), mixing, PARAMS, (X, Y), loss_fn="mse", vmap_over_data=False
            ),
            ValueError,
            "depend on one another",
            "vmap_over_data=False",
        )
        for name in ("kfac", "ekfac", "data_fit")
        for mixing in (centred, attentive, in_order)
    ],
]  # fmt: skip
