"""Threads of LAPACK: one while factors are decomposed, as many as before afterwards."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from support.matrices import positive

from laplax_kfac import machine
from laplax_kfac.bases.eigh import eigh_each


def threads():
    """How many threads each library for linear algebra may use."""
    return {
        p["filepath"]: p["num_threads"]
        for p in threadpoolctl.threadpool_info()
        if p["user_api"] == "blas"
    }


@pytest.fixture
def two_threads():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if not threads() or min(threads().values()) < 2:
            pytest.skip("the libraries have one thread")
        yield


@pytest.mark.usefixtures("two_threads")
def test_factors_are_decomposed_with_one_thread(monkeypatch):
    seen = []

    def decompose_each(matrices):
        seen.append({*threads().values()})
        return list(map(jnp.linalg.eigh, matrices))

    monkeypatch.setattr(sys.modules[eigh_each.__module__], "decompose_each", decompose_each)
    eigh_each([jnp.eye(2)])
    assert seen == [{1}]
    assert {*threads().values()} == {2}


@pytest.mark.usefixtures("two_threads")
def test_threads_come_back_after_an_error():
    def fail():
        with machine.one_blas_thread():
            assert {*threads().values()} == {1}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {*threads().values()} == {2}


def test_nothing_is_limited_without_threadpoolctl(monkeypatch):
    monkeypatch.setattr(machine, "thread_pools", lambda: None)
    before, matrix = threads(), positive(5, seed=0)
    with machine.one_blas_thread():
        assert threads() == before
    ((values, vectors),) = eigh_each([jnp.asarray(matrix)])
    np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, rtol=1e-4, atol=1e-4)
