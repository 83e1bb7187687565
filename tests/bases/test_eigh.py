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
