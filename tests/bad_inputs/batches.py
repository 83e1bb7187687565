"""Batches of a form that is not known."""

import numpy as np

from bad_inputs.fitted import LABELS, X, Y
from bad_inputs.rows import Row, rows

INDEX, WEIGHTS = np.arange(8), np.full(8, 2.0)
OVER_DATA = ("kfac", "ekfac", "kfoc", "laplace", "data_fit", "relative_error", "marglik_training")
OF_ONE_BATCH = ("intermediates_and_gradients",)

THIRD = {"(x, y, index)": (X, LABELS, INDEX)}
THIRDS = THIRD | {
    "(x, y, weights)": (X, LABELS, WEIGHTS),
    "a list of (x, y, index)": [(X, LABELS, INDEX)],
    "a loader of (x, y, index)": iter([(X, LABELS, INDEX)]),
}
BATCHES_OF_THREE = {"(x, y, index)": (X, Y, INDEX), "[x, y, weights]": [X, Y, WEIGHTS]}
BATCH = {"input": X, "target": LABELS}
BAD_WEIGHTS = {
    "negative": (-WEIGHTS, ValueError, "must be finite and not negative"),
    "NaN": (np.full(8, np.nan), ValueError, "must be finite and not negative"),
    "infinite": (np.full(8, np.inf), ValueError, "must be finite and not negative"),
    "of another shape": (np.ones((8, 2)), ValueError, "one number an example"),
    "a number": (2.0, ValueError, "one number an example"),
    "text": (np.full(8, "1"), TypeError, "must be real numbers"),
    "complex": (np.full(8, 1j), ValueError, "must be real numbers"),
    "too few": (WEIGHTS[:7], ValueError, "same leading axis"),
}

ROWS: list[Row] = [
    *rows((*OVER_DATA[1:], *OF_ONE_BATCH), "data", THIRD, ValueError, "not taken for weights"),
    *rows(["kfac"], "data", THIRDS, ValueError, "not taken for weights"),
    *rows(["update"], "batch", BATCHES_OF_THREE, ValueError, "not taken for weights"),
    *rows(["kfac"], "data", {"(x,)": (X,), "()": ()}, ValueError, "found a tuple of"),
    *rows(["kfac", "data_fit"], "data", {"an array": X, "None": None}, TypeError, "must be"),
    *rows(["kfac", "data_fit"], "data", [[]], ValueError, "has no batches"),
    *rows(["kfac", "marglik_training"], "data", [{"input": X}], ValueError, "needs the keys"),
    *rows(["update"], "batch", [X, None], TypeError, "a mapping with 'input' and 'target'"),
    *rows(
        ["kfac", "data_fit", "laplace"],
        "data",
        {"a key 'weights'": BATCH | {"weights": WEIGHTS}},
        ValueError,
        "have the key 'weight'",
    ),
    *[
        row
        for name, (weight, error, text) in BAD_WEIGHTS.items()
        for row in rows(
            ["kfac", "data_fit", "laplace"],
            "data",
            {f"weight {name}": BATCH | {"weight": weight}},
            error,
            text,
        )
    ],
    *rows(["update"], "weights", {"-2": -WEIGHTS}, ValueError, "finite and not negative"),
    *rows(["update"], "weights", {"NaN": WEIGHTS * np.nan}, ValueError, "finite and not negative"),
    *rows(["update"], "weights", [WEIGHTS[:7], 2.0], ValueError, "must have shape (8,)"),
]
