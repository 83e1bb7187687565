"""Eigendecompositions of positive semi-definite matrices, alone and of many at once.

Rounding moves every eigenvalue by about eps times the largest one. Where that is large beside a
prior precision, as with raw pixels, eigenvalues of a null space would count as curvature. So those
that rounding may have made are zero. On a CPU matrices are decomposed in double precision, whatever
they are in: small eigenvalues, such as those of features on another scale, are then as good as the
sums over the data are. LAPACK takes up to twice the time for it, once for all of the data.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from laplax_kfac import jaxprs, machine, progress

Eigh = tuple[Float[Array, "... _"], Float[Array, "... _ _"]]
"""Eigenvalues, zero where rounding made them, and eigenvectors in the columns of a matrix."""


def eigh(matrix: Float[Array, "*stack n n"]) -> Eigh:
    """Eigenvalues and eigenvectors of a positive semi-definite matrix, up to rounding.

    In double precision where that is enabled. The least eigenvalue, if it is negative, tells by how
    much rounding has moved them: all up to twice as large are set to zero.
    """
    wide = matrix.astype(jax.dtypes.canonicalize_dtype(jnp.float64))
    values, vectors = _eigh(0.5 * (wide + wide.swapaxes(-1, -2)))
    rounding = jax.lax.stop_gradient(jnp.clip(-values[..., :1], 0.0))
    values = jnp.where(values <= 2 * rounding, 0.0, values)  # NaN stays
    return values.astype(matrix.dtype), vectors.astype(matrix.dtype)


def eigh_each(matrices: Sequence[Float[Array, "... _ _"]]) -> list[Eigh]:
    """`eigh` of several matrices: wide ones one after the other, small ones in one program.

    On a CPU each has one thread, whatever else runs on the machine: see `machine.one_blas_thread`.
    Of one program, a CPU decomposes several at the same time, whose threads would wait for each
    other where nothing limits them: up to twice the processor time for wide matrices.
    """
    if jaxprs.is_traced((matrices, jnp.zeros(()))) or not machine.on_cpu():
        return decompose_each(matrices)
    with jax.enable_x64(True), machine.one_blas_thread():
        return jax.block_until_ready(decompose_each(matrices))


def decompose_each(matrices: Sequence[Float[Array, "... _ _"]]) -> list[Eigh]:
    """`eigh_each`, with the precision and the threads that are set around it."""
    most = machine.MACHINE.decomposed_together
    small = iter(_eigh_of_small([x for x in matrices if x.shape[-1] <= most]))
    if jaxprs.is_traced(matrices):
        return [next(small) if x.shape[-1] <= most else _eigh_of_wide(x) for x in matrices]
    return [
        progress.awaited(next(small) if x.shape[-1] <= most else _eigh_of_wide(x))
        for x in progress.each(list(matrices), "eigenvectors", "matrix")
    ]


@jax.jit
def _eigh_of_small(matrices: Sequence[Float[Array, "... _ _"]]) -> list[Eigh]:
    """Those of one width are decomposed together, by one call that is compiled."""
    found: dict[int, Eigh] = {}
    for n in {x.shape[-1] for x in matrices}:
        numbers = [k for k, x in enumerate(matrices) if x.shape[-1] == n]
        stacks = [matrices[k].reshape(-1, n, n) for k in numbers]
        cuts = np.cumsum([len(x) for x in stacks])[:-1]
        parts = zip(*(jnp.split(y, cuts) for y in eigh(jnp.concatenate(stacks))), strict=True)
        for k, (values, vectors) in zip(numbers, parts, strict=True):
            shape = matrices[k].shape
            found[k] = values.reshape(shape[:-1]), vectors.reshape(shape)
    return [found[k] for k in range(len(matrices))]


_eigh_of_wide = jax.jit(eigh)


@jax.custom_jvp
def _eigh(matrix: Float[Array, "*stack n n"]) -> Eigh:
    if matrix.ndim == 2:
        return _eigh_of_one(matrix)
    # On a CPU, XLA spreads a batch over the threads that it also waits for it with: two batches
    # at once can stop for ever (jaxlib 0.10.2). A loop has one matrix at a time.
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    values, vectors = jax.lax.platform_dependent(
        flat, cpu=functools.partial(jax.lax.map, _eigh_of_one), default=_eigh_of_one
    )
    return values.reshape(matrix.shape[:-1]), vectors.reshape(matrix.shape)


def _eigh_of_one(matrix: Float[Array, "*stack n n"]) -> Eigh:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@_eigh.defjvp
def _eigh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Eigh, Eigh]:
    """Derivative that leaves the basis within an eigenspace alone.

    JAX's own divides by the gaps between eigenvalues, which are rounding errors in the null space
    of a factor. No function of the matrix depends on the basis within an eigenspace.
    """
    (matrix,), (tangent,) = primals, tangents
    values, vectors = _eigh(matrix)
    # With K_ij = 1 / (lambda_j - lambda_i), zero within an eigenspace, and D = U^T dM U:
    # d lambda = diag(D) and dU = U (K * D).
    inner = vectors.swapaxes(-1, -2) @ tangent @ vectors
    gaps = values[..., None, :] - values[..., :, None]
    largest = jnp.max(jnp.abs(values), axis=-1)[..., None, None]
    close = jnp.abs(gaps) <= 100 * jnp.finfo(values.dtype).eps * largest
    weights = jnp.where(close, 0.0, 1.0 / jnp.where(close, 1.0, gaps))
    change = jnp.diagonal(inner, axis1=-2, axis2=-1), vectors @ (weights * inner)
    return (values, vectors), change
