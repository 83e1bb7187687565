"""Operators of lineax against the dense matrices, and solves with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support import models
from support.tolerances import tolerance

import laplax_kfac

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)


@pytest.fixture
def lineax():
    return pytest.importorskip("lineax")


def fitted():
    model_fn, params, data = models.classified("mlp")
    return params, laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy")


def test_operators_have_the_products_of_the_dense_matrices(lineax):
    params, curvature = fitted()
    posterior = laplax_kfac.make_posterior(curvature, 0.5)
    v = jax.tree.map(lambda x: x + 1.0, params)
    for matrix in (curvature, posterior, posterior.precision):
        operator = matrix.as_linear_operator()
        assert lineax.is_positive_semidefinite(operator)
        assert lineax.is_symmetric(operator)
        product = matrix.to_dense() @ ravel_pytree(v)[0]
        np.testing.assert_allclose(ravel_pytree(operator.mv(v))[0], product, **CLOSE)
        np.testing.assert_allclose(operator.as_matrix(), matrix.to_dense(), **CLOSE)


def test_the_precision_is_solved_by_the_covariance_and_preconditioned_by_it(lineax):
    params, curvature = fitted()
    posterior = laplax_kfac.make_posterior(curvature, 0.5)
    v = jax.tree.map(lambda x: x + 1.0, params)
    solver = lineax.CG(rtol=1e-10, atol=1e-12)
    found = lineax.linear_solve(posterior.precision.as_linear_operator(), v, solver)
    expected = ravel_pytree(posterior.covariance_mv(v))[0]
    np.testing.assert_allclose(ravel_pytree(found.value)[0], expected, rtol=1e-6)
    # With the inverse as its preconditioner there is nothing left to do but one step.
    options = {"preconditioner": posterior.as_linear_operator()}
    precision = posterior.precision.as_linear_operator()
    at_once = lineax.linear_solve(precision, v, solver, options=options)
    np.testing.assert_allclose(ravel_pytree(at_once.value)[0], expected, rtol=1e-6)
    assert at_once.stats["num_steps"] <= 2 < found.stats["num_steps"]


def test_parameters_that_are_no_real_numbers_have_no_operator(lineax):
    del lineax
    params = {"w": jnp.ones((3, 2)), "n": jnp.asarray(2)}
    data = jnp.ones((4, 3)), jnp.zeros((4, 2))

    def model_fn(input, params):
        return input @ params["w"]

    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse")
    with pytest.raises(ValueError, match="'n' is int"):
        curvature.as_linear_operator()


def test_without_lineax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lineax", None)
    _, curvature = fitted()
    with pytest.raises(ImportError, match="pip install lineax"):
        curvature.as_linear_operator()
