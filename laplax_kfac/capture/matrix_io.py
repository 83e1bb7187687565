"""Matrices of parameters of which a function makes a weight: they have gradients, but no uses."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from laplax_kfac import pytrees
from laplax_kfac.bases import Kind, Sum
from laplax_kfac.capture.layer_io import Cotangents, Counting, Features, LayerIO, accumulate


@pytrees.register
@dataclass(frozen=True)
class MatrixIO(LayerIO):
    """What a matrix of parameters without a use saw: its gradients G, as a position a row of G.

    The inputs are the unit vectors e_i, the gradients the rows of G: their products add up to G.
    Second moments over positions would say nothing of the rows. Those that do are

        A = sum_nr G G^T,    B = sum_nr G^T G,    M = sum_nr ||G||^2 = tr A = tr B.

    ``A kron B / M`` has the trace of the exact block ``F = sum_nr vec(G) vec(G)^T``, and is F where
    F is a Kronecker product. It is one step of the power iteration for the product nearest to F,
    from the identity (Van Loan & Pitsianis 1993; Morwani et al. 2024, arXiv 2406.17748).
    """

    @classmethod
    def of(cls, gradients: Float[Array, "R p"], rows: int) -> "MatrixIO":
        """Of one example's gradients in a matrix with so many rows."""
        g = gradients.reshape(len(gradients), rows, 1, gradients.shape[1] // rows)
        return cls(
            Features(jnp.eye(rows, dtype=g.dtype)[:, None]),
            Cotangents(g),
            jnp.ones((rows, 1)),
        )

    def second_moments(
        self, kinds: tuple[Kind, ...], counting: Counting
    ) -> tuple[Sum, Sum, Float[Array, " stack"]]:
        """Of columns and of rows of the gradients; identities if there are none."""
        g, (inputs, outputs) = accumulate(self.gradients.features()), kinds
        if g.shape[1] == 0:
            total = jnp.sum(counting.examples)[None]
            rows, columns = g.shape[2], g.shape[4]
            return inputs.identity(total, rows), outputs.identity(total, columns), total
        weights = counting.examples[:, None, None, None, None]
        count = jnp.sum(weights * g**2)[None]
        return inputs.sum(g.swapaxes(2, 4), weights), outputs.sum(g, weights), count
