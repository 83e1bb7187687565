"""Arguments of the functions that make likelihoods, of `patterns.register`, and weights of zero."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

import laplax_kfac as lk
from bad_inputs.fitted import LABELS, PARAMS, X, Y, fitted
from bad_inputs.rows import Row, rows
from laplax_kfac import likelihood as lik

ZERO = {"input": X, "target": LABELS, "weight": np.zeros(8)}
ZERO_OF_REGRESSION = ZERO | {"target": Y}


def squared(f, y):
    return -((f - y) ** 2)


def refused(name, call: Any, argument, value, error, text, *before) -> Row:
    """A row of one function; what comes before the argument is passed by position."""
    return Row(
        f"{name} {argument}={value!r}",
        functools.partial(call, *before, **{argument: value}),
        error,
        text,
        argument,
    )


ROWS: list[Row] = [
    *[
        refused("gaussian", lik.gaussian, "noise_variance", value, error, text)
        for value, error, text in (
            (0.0, ValueError, "must be positive and finite"),
            (-1.0, ValueError, "must be positive and finite"),
            (float("nan"), ValueError, "must be positive and finite"),
            (float("inf"), ValueError, "must be positive and finite"),
            ("1", TypeError, "must be real numbers"),
            (True, TypeError, "must be real numbers"),
            (None, TypeError, "must be real numbers"),
            (1j, ValueError, "must be real numbers"),
        )
    ],
    *[
        refused(name, call, "label_smoothing", value, error, text)
        for name, call in (("categorical", lik.categorical), ("bernoulli", lik.bernoulli))
        for value, error, text in (
            (1.0, ValueError, "must be in [0, 1)"),
            (-0.1, ValueError, "must be in [0, 1)"),
            (float("nan"), ValueError, "must be in [0, 1)"),
            ("0.1", TypeError, "must be a real number"),
            (True, TypeError, "must be a real number"),
        )
    ],
    *[
        refused("categorical", lik.categorical, "ignore_index", value, TypeError, "an integer")
        for value in (1.5, "0", True, [-1])
    ],
    *[
        refused("weighted", lik.weighted, "loss_fn", value, TypeError, "must be a laplax LossFn")
        for value in (3, None)
    ],
    refused("weighted", lik.weighted, "loss_fn", "huber", ValueError, "expected one of"),
    *[
        refused("from_log_prob", lik.Likelihood.from_log_prob, name, 3, TypeError, "a function", *b)
        for name, b in (
            ("log_prob", ["mine"]),
            ("sample", ["mine", squared]),
            ("hessian_root", ["m", squared]),
        )
    ],
    refused("register", lk.patterns.register, "pattern", None, TypeError, "Pattern", "dot_general"),
    Row(
        "register 3",
        lambda: lk.patterns.register(3, None),  # type: ignore[arg-type]
        TypeError,
        "must be the primitive's name",
        "primitive",
    ),
    *rows(["kfac", "ekfac", "kfoc", "laplace"], "data", {"weights 0": ZERO}, ValueError, "zero"),
    *rows(
        ["data_fit", "marglik_training"],
        "data",
        {"weights 0": ZERO_OF_REGRESSION},
        ValueError,
        "All weights",
    ),
    *rows(
        ["tune", "marglik_training"],
        "hyperparameters",
        [0.0, -1.0, float("nan")],
        ValueError,
        "must be positive and finite",
        prior_prec=jnp.square,
    ),
    *rows(["tune"], "hyperparameters", ["1", True], TypeError, "real", prior_prec=jnp.square),
    *rows(["minimise"], "start", [0.0, -1.0, float("nan")], ValueError, "must be positive"),
    *rows(["minimise"], "start", ["1", True], TypeError, "must be real numbers"),
    Row(
        "accumulator.at of other parameters",
        lambda: fitted().accumulator.at({"first": PARAMS["first"]}),
        ValueError,
        "missing are 'last/b', 'last/w'",
        "params",
    ),
    Row(
        "accumulator.collect of plain batches",
        lambda: fitted().accumulator.collect([(X, Y)]),
        TypeError,
        "as `Accumulator.parts` makes them",
        "data",
    ),
    Row(
        "accumulator.correct of a posterior",
        lambda: fitted().accumulator.correct(fitted().posterior, []),
        TypeError,
        "must be a curvature",
        "curvature",
    ),
]
