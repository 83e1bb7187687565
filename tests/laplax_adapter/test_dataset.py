"""Predictions at all inputs of a dataset."""

import jax.numpy as jnp
import laplax
import laplax.api
import laplax.eval.pushforward
import numpy as np
import pytest
from laplax.eval.utils import transfer_entry
from support.pushforwards import PRIOR, fitted


@pytest.mark.usefixtures("x64")
def test_a_model_that_changes_is_evaluated_as_it_is():
    model_fn, params, inputs, posterior_fn, _ = fitted("mlp", "float64")
    offset = [jnp.zeros(3)]

    def shifted(input, params):
        return model_fn(input=input, params=params) + offset[0]

    def mean():
        results, _ = laplax.evaluation(
            posterior_fn, shifted, params, PRIOR, {"input": inputs, "target": inputs},
            metrics=transfer_entry(["pred_mean"]),
        )  # fmt: skip
        return results["pred_mean"]

    before = mean()
    offset[0] = jnp.ones(3)
    np.testing.assert_allclose(mean(), before + 1.0, rtol=1e-12)
