"""Linear models for which KFAC is the exact GGN matrix, fitted by laplax."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import laplax
import numpy as np
from jax.flatten_util import ravel_pytree

from support.matrices import normal


def linear(input, params):
    return input @ params["w"] + params["b"]


@dataclass(frozen=True, eq=False)
class Case:
    """A linear model for which KFAC is the exact GGN matrix."""

    name: str
    loss_fn: str
    params: Any
    data: tuple[Any, Any]

    def __str__(self) -> str:
        return self.name


X = normal(6, 3, seed=1)
TRAINED = {"b": normal(2, seed=2), "w": normal(3, 2, seed=3)}
THREE = {"b": normal(3, seed=2), "w": normal(3, 3, seed=3)}
# Weights of zero: one output for all inputs, and so one output Hessian for all examples.
CONSTANT = {"b": normal(3, seed=2), "w": np.zeros((3, 3))}
SIGN = {"b": np.asarray([0.7]), "w": np.zeros((3, 1))}
REGRESSION = Case("regression", "mse", TRAINED, (X, normal(6, 2, seed=4)))
CLASSES = Case("classes", "cross_entropy", CONSTANT, (X, np.asarray([0, 1, 2, 2, 1, 0])))
CASES = [
    REGRESSION,
    Case("one output", "mse", {"b": normal(1), "w": normal(3, 1)}, (X, normal(6, 1, seed=4))),
    CLASSES,
    Case("one-hot", "cross_entropy", CONSTANT, (X, np.eye(3)[[0, 1, 2, 2, 1, 0]])),
    Case("one datapoint", "cross_entropy", THREE, (X[:1], np.asarray([2]))),
    Case("binary", "binary_cross_entropy", SIGN, (X, np.asarray([[0], [1], [1], [0], [1], [1]]))),
]


@functools.cache
def fit(case, curv_type):
    return laplax.laplace(linear, case.params, case.data, loss_fn=case.loss_fn, curv_type=curv_type)


def as_matrix(mv, params):
    """The matrix of a linear function of pytrees like the parameters."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(
        jax.jit(jax.vmap(lambda v: ravel_pytree(mv(unravel(v)))[0]))(np.eye(flat.size))
    ).T


class Loader:
    """Re-iterable, with batches of two; counts its passes and its batches."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.passes = self.batches = 0

    def __iter__(self):
        self.passes += 1
        for a in range(0, len(self.x), 2):
            self.batches += 1
            yield self.x[a : a + 2], self.y[a : a + 2]
