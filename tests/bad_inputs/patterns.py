"""Patterns that match nothing, and selections that leave nothing uncertain."""

import numpy as np

from bad_inputs.rows import Row, rows

SELECTING = ("kfac", "ekfac", "laplace", "find_layers", "marglik_training")

NO_MATCH = "matches none of the parameters: 'first/b', 'first/w', 'last/b', 'last/w'."
DEAD = {
    "frist/*": "Did you mean 'first'?",
    "last-layer": "Did you mean 'last_layer'?",
    "params/first/*": "Did you mean 'first'?",
    "first/kernel": NO_MATCH,
    "First": "Did you mean 'first'?",
    "[first]": NO_MATCH,
    ".layers[2].weight": NO_MATCH,
    "['frist']['w']": "Did you mean 'first/w'?",
    "w": "Did you mean 'first/w'?",
    "frist/b": "Did you mean 'first/b'?",
    "norm/scale": NO_MATCH,
    "": NO_MATCH,
}
LAYERS = "matches none of the layers: 'first', 'last'."
MANY = {f"layer{k}": np.zeros((2, 2)) for k in range(30)}


def nothing(path):
    return path == "nothing"


ROWS: list[Row] = [
    *[
        row
        for pattern, text in DEAD.items()
        for row in rows(["find_layers"], "params_filter", [pattern], ValueError, text)
    ],
    *rows(SELECTING, "params_filter", {"one dead": ["first/*", "lst/*"]}, ValueError, "'lst/*'"),
    *rows(SELECTING, "params_filter", [nothing], ValueError, "covers no parameter"),
    *rows(["kfac", "laplace"], "params_filter", ["last-layer"], ValueError, "'last_layer'?"),
    *rows(["find_layers"], "params_filter", [[], ()], ValueError, "covers no parameter"),
    *rows(["find_layers"], "params_filter", [["last_layer", "first"]], ValueError, "stands alone"),
    *rows(
        ["find_layers", "kfac", "Options"],
        "params_filter",
        [3, True, {"first"}, [1]],
        TypeError,
        "must be a pattern such as 'encoder/*'",
    ),
    *rows(
        ["find_layers"],
        "params_filter",
        {"one of many": "layer99"},
        ValueError,
        "and 18 more. Did you mean 'layer9'?",
        params=MANY,
        model_fn=lambda input, params: sum(input[:2] @ w for w in params.values()),
    ),
    *rows(
        ["find_layers", "kfac", "laplace"],
        "fallback",
        {"dead": {"norm/*": "none"}, "one dead": {"first/*": "none", "lst/w": "dense"}},
        ValueError,
        "matches none of the parameters",
    ),
    *rows(["kfac", "Options"], "fallback", ["densee", "full", None, 1], ValueError, "must be one"),
    *rows(["Options"], "fallback", [{"first": "kfac"}, {"first": True}], ValueError, "must be one"),
    *rows(["Options"], "fallback", [{0: "dense"}], TypeError, "keys must be patterns"),
    *rows(
        ["find_layers", "kfac"],
        "factor_kinds",
        {"dead": {"frist": "diagonal"}, "one dead": {"first": "dense", "lst": "diagonal"}},
        ValueError,
        LAYERS,
    ),
    *rows(
        ["Options", "kfac"],
        "factor_kinds",
        ["sparse", 3, True, "blocked:0", "blocked:x", {"first": 3}, {"first": ("dense", "low")}],
        ValueError,
        "is no kind of factor",
    ),
    *rows(["Options"], "factor_kinds", [{"first": ("dense",) * 3}], ValueError, "or a pair"),
    *rows(["Options"], "factor_kinds", [{0: "dense"}], TypeError, "keys must be patterns"),
    *rows(["Options", "kfac"], "wide_factors", ["dense", None, 1], ValueError, "must be one of"),
    *rows(["Options"], "wide_factors", [{0: "blocks"}], TypeError, "keys must be patterns"),
    *rows(["find_layers"], "wide_factors", [{"frist": "blocks"}], ValueError, LAYERS),
    *rows(
        ["kfac", "ekfac", "marglik_training"],
        "kfac_approx",
        {"dead": {"frist": "reduce"}},
        ValueError,
        LAYERS,
    ),
    *rows(["Options"], "kfac_approx", ["sum", None, 1], ValueError, "must be one of 'expand'"),
    *rows(["Options"], "kfac_approx", [{0: "reduce"}], TypeError, "keys must be patterns"),
]
