"""The sums of a model's layers over data, before they become blocks."""

from typing import Any

import jax.numpy as jnp

import laplax_kfac


def sums_of(model_fn, params, data, **options) -> Any:
    """The accumulated sums of every layer, without the eigendecompositions of `finalize`."""
    acc = laplax_kfac.accumulator(model_fn, params, **options)
    return acc.update(acc.init(), data).sums


def twice(input, params):
    return jnp.tanh(input @ params) @ params
