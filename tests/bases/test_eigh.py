"""Eigendecompositions: never negative, symmetric, and of many matrices in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import AS, A, B, P, normal
from support.tolerances import tolerance

from laplax_kfac import machine
from laplax_kfac.bases import eigh, eigh_each

pytestmark = pytest.mark.usefixtures("x64")

LOW_RANK = normal(6, 2, seed=5) @ normal(6, 2, seed=5).T


def test_eigenvalues_of_a_semidefinite_matrix_are_never_negative():
    with jax.enable_x64(False):
        noisy = jnp.asarray(LOW_RANK, jnp.float32)
        assert jnp.linalg.eigvalsh(noisy).min() < 0  # rounding
        assert eigh(noisy)[0].min() == 0


def raw(case):
    """Features that are far from zero, or on scales far apart; the first of fewer examples."""
    rng = np.random.default_rng(0)
    if case == "fewer examples":
        return rng.normal(size=(30, 60)) + 50.0
    if case == "zero features":
        return np.where(np.arange(40) % 2, 100.0 + 20.0 * rng.normal(size=(90, 40)), 0.0)
    return rng.normal(size=(90, 12)) * np.geomspace(1e-3, 1e4, 12)


@pytest.mark.parametrize("most", [512, 4], ids=["together", "wide"])
@pytest.mark.parametrize("case", ["fewer examples", "zero features", "scales"])
def test_single_precision_is_enough_for_raw_features(case, most, monkeypatch):
    monkeypatch.setattr(machine, "MACHINE", machine.Machine(decomposed_together=most))
    features = raw(case).astype(np.float32)
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    with jax.enable_x64(False):
        x = jnp.asarray(features)
        product = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
        ((values, vectors),) = eigh_each([product])
        assert values.dtype == vectors.dtype == jnp.float32
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(vectors)), atol=1e-5)
    for prior_prec in (1e-2, 1.0, 100.0):
        expected = np.sum(np.log1p(singular**2 / prior_prec))
        found = np.sum(np.log1p(np.asarray(values, np.float64) / prior_prec))
        np.testing.assert_allclose(found, expected, rtol=5e-3)


def test_what_rounding_made_of_a_null_space_is_zero_in_single_precision():
    features = raw("fewer examples").astype(np.float32)
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    with jax.enable_x64(False):
        x = jnp.asarray(features)
        values, _ = jax.jit(lambda x: eigh(x.T @ x))(x)  # nothing but single precision here
    assert np.sum(np.asarray(values) > 0) <= len(x)
    np.testing.assert_allclose(values[-20:], singular[::-1][-20:] ** 2, rtol=0.05)


def test_small_matrices_of_one_width_are_decomposed_together_in_a_program(monkeypatch):
    monkeypatch.setattr(machine, "MACHINE", machine.Machine(decomposed_together=4))
    matrices = [jnp.asarray(x) for x in (A, AS, P, 2 * A, B)]
    jaxpr = jax.make_jaxpr(lambda *m: eigh_each(m))(*matrices)
    assert str(jaxpr).count("= eigh[") == 2 * 2 + 1  # A's, B: each for a CPU and others; P: alone
    for found in (jax.jit(eigh_each)(matrices), eigh_each(matrices)):  # together, one by one
        for one, (values, vectors) in zip(matrices, found, strict=True):
            assert values.shape == one.shape[:-1]
            again = np.einsum("...ij,...j,...kj->...ik", vectors, values, vectors)
            np.testing.assert_allclose(again, one, **tolerance(jnp.float64))


def test_the_asymmetric_part_of_a_matrix_is_ignored():
    skew = normal(6, 6)
    values, vectors = eigh(jnp.asarray(P + skew - skew.T))
    np.testing.assert_allclose((vectors * values) @ vectors.T, P, **tolerance(jnp.float64))
