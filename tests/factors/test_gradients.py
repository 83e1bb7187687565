"""Per-example gradients in what is computed from them: corrected eigenvalues, optimal factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import basis_of, normal, positive
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import machine
from laplax_kfac.blocks.blocks import Block
from laplax_kfac.factors import eigenvalue_correction, optimal_factors

pytestmark = pytest.mark.usefixtures("x64")

N, IN, OUT = 5, 4, 2
PARAMS = {"b": normal(OUT, seed=1), "w": normal(IN, OUT, seed=2)}
Y = normal(N, OUT, seed=3)


# What is computed is the same by either order of summation, whatever is rotated first, and in any
# parts: with 12 positions the matrices are smaller than the positions, with 3 they are not. At 10
# numbers a matrix, 10 is a column at once, 45 two examples, with all of their columns.
@pytest.mark.parametrize("positions", [3, 12])
@pytest.mark.parametrize(
    ("by_pairs", "formed"),
    [(True, None), (True, 80), (False, None), (False, 45), (False, 10)],
    ids=["pairs", "pairs in parts", "matrices", "of two examples", "of a column"],
)
def test_gradients_enter_alike_in_every_order(positions, by_pairs, formed, monkeypatch):
    if formed is not None:
        small = machine.Machine(formed=formed, cached=formed)
        monkeypatch.setattr(machine, "MACHINE", small)
    monkeypatch.setattr(eigenvalue_correction, "_in_pairs", lambda *_: by_pairs)
    monkeypatch.setattr(optimal_factors, "_contracts_in_pairs", lambda *_: by_pairs)
    x = normal(N, positions, IN)

    def of_outputs(z):
        return jnp.sum(jnp.tanh(z) * jnp.arange(1.0, positions + 1)[:, None], axis=0) + z[0] * z[1]

    def model_fn(input, params):
        return of_outputs(input @ params["w"] + params["b"])

    cotangents = np.sqrt(2.0) * jax.vmap(jax.jacrev(of_outputs))(x @ PARAMS["w"] + PARAMS["b"])
    inputs = np.concatenate([x, np.ones((N, positions, 1))], axis=-1)
    weights = np.arange(1.0, N + 1)
    matrices = np.einsum("nti,nrto->nrio", inputs, cotangents)  # examples, columns, rows, outputs
    acc = laplax_kfac.accumulator(model_fn, PARAMS, loss_fn="mse")
    data = [({"input": x, "target": Y}, jnp.asarray(weights))]
    u, v = (np.linalg.qr(normal(k, k))[0] for k in (IN + 1, OUT))
    block = Block((basis_of(u), basis_of(v)), jnp.zeros(()))
    a, b = positive(IN + 1), positive(OUT)

    rotated = np.einsum("ij,nrio,op->nrjp", u, matrices, v)
    (found,) = acc.total(eigenvalue_correction.corrected_eigenvalues, data, (block,))
    expected = np.einsum("n,nrio->io", weights, rotated**2)
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))
    (found,) = acc.total(optimal_factors.over_outputs, data, (b[None],))
    expected = np.einsum("n,nrio,op,nrjp->ij", weights, matrices, b, matrices)
    np.testing.assert_allclose(found[0], expected, **tolerance(jnp.float64))
    (found,) = acc.total(optimal_factors.over_inputs, data, (a[None],))
    expected = np.einsum("n,nrio,ij,nrjp->op", weights, matrices, a, matrices)
    np.testing.assert_allclose(found[0], expected, **tolerance(jnp.float64))
