"""The Kronecker product nearest to a sum of several, as of the uses of one weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from laplax_kfac.bases import Kind, Sum


def nearest_kronecker(
    kinds: tuple[Kind, ...], inputs: Sum, outputs: Sum, iterations: int = 100
) -> tuple[Sum, Sum]:
    """The Kronecker product nearest to ``sum_u inputs[u] kron outputs[u]`` in Frobenius norm.

    The nearest product lies in the span of the summands (Van Loan & Pitsianis 1993), so the power
    iteration runs on U coefficients, with the Gram matrices of the summands. These have no
    negative entries, for the summands are positive semi-definite; so have the coefficients, and
    the product is positive semi-definite too.

    Args:
        kinds: Those of the inputs and of the outputs.
        inputs: Finished sums with an axis over U uses in front.
        outputs: The same of the other side.
        iterations: Steps.
    """
    if len(jax.tree.leaves(inputs)[0]) == 1:
        first: tuple[Sum, Sum] = jax.tree.map(lambda x: x[0], (inputs, outputs))
        return first
    gram_in, gram_out = (
        gram_of_uses(kind, total) for kind, total in zip(kinds, (inputs, outputs), strict=True)
    )

    # With A = sum_u w_u A_u and B = sum_u v_u B_u, the half steps A <- sum_u <B_u, B> A_u and
    # B <- sum_u <A_u, A> B_u are w <- K_B v and v <- K_A w, K the Gram matrices of the summands.
    # `unit` keeps ||A|| or ||B|| at one, in the norms that these matrices give.
    def unit(
        w: Float[Array, "stack U"], gram: Float[Array, "stack U U"]
    ) -> Float[Array, "stack U"]:
        norm = jnp.sqrt(jnp.einsum("ku,kuv,kv->k", w, gram, w))[:, None]
        return w / jnp.where(norm > 0, norm, 1.0)

    def step(_: Int[Array, ""], w: Float[Array, "stack U"]) -> Float[Array, "stack U"]:
        v = unit(jnp.einsum("kuv,kv->ku", gram_in, w), gram_out)
        return unit(jnp.einsum("kuv,kv->ku", gram_out, v), gram_in)

    start = unit(jnp.ones(gram_in.shape[:2], gram_in.dtype), gram_in)
    w = jax.lax.fori_loop(0, iterations, step, start)
    # With ||A|| = 1 the last half step has the singular value in it: B = sum_u <A_u, A> B_u.
    v = jnp.einsum("kuv,kv->ku", gram_in, w)

    def combined(weights: Float[Array, "stack U"], total: Sum) -> Sum:
        return jax.tree.map(lambda x: jnp.einsum("ku,uk...->k...", weights, x), total)

    return combined(w, inputs), combined(v, outputs)


def gram_of_uses(kind: Kind, total: Sum) -> Float[Array, "stack U U"]:
    """Inner products of the sums of all uses."""
    with_each = jax.vmap(jax.vmap(kind.inner, (None, 0)), (0, None))
    return jnp.moveaxis(with_each(total, total), -1, 0)
