"""Likelihoods whose targets come with weights of terms."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.likelihood.named import resolve_likelihood
from laplax_kfac.likelihood.pieces import floating, times
from laplax_kfac.likelihood.record import Likelihood

WEIGHTS = "weights of terms that are negative, NaN or infinite; a term counts w >= 0"


@no_type_check
def weighted(loss_fn: Any) -> Likelihood:
    """A likelihood whose targets are pairs ``(target, weights)``: masks, and weights of terms.

    Weights are not negative, and have the axes of the loss terms, or the leading ones of them:
    for ``cross_entropy`` those of the output without the last, for the squared error any leading
    ones of the output. A term of weight zero (padding) is left out, whatever the output and the
    target there.

    Weights scale the loss, that is the vectors that are pulled back. Inputs of layers know nothing
    of terms: a Kronecker factor A over its count M stays an average over all positions, those of
    padding included, where `ekfac` corrects the eigenvalues. The weight of a whole example belongs
    to the data: the key ``"weight"`` of a batch says how often each counts.

    Args:
        loss_fn: What `kfac` takes as ``loss_fn``.

    Raises:
        ValueError: When called, if a target is no such pair, or the weights are of another shape.
    """
    base = resolve_likelihood(loss_fn)
    root, sketch, own = base.hessian_root, base.sketch, base.weights

    def target(y: PyTree) -> PyTree:
        return _target_and_weights(y)[0]

    def weights(f: PyTree, y: PyTree) -> PyTree:
        y, given = _target_and_weights(y)
        _check_weights(given, jax.eval_shape(base.losses, f, y))
        return given if own is None else times(given, jax.tree.map(floating, own(f, y)))

    def faults(f: PyTree, y: PyTree) -> dict[str, PyTree]:
        """Those of terms that count, and of the weights."""
        y, given = _target_and_weights(y)
        negative = jax.tree.map(lambda w: ~((w >= 0) & (w < jnp.inf)), given)
        found = {} if base.faults is None else base.faults(f, y)
        counted = {text: times(given, flags) for text, flags in found.items()}
        return {**counted, WEIGHTS: negative}

    return replace(
        base,
        name=f"weighted {base.name}",
        losses=lambda f, y: base.losses(f, target(y)),
        hessian_root=lambda f, y: root(f, target(y)),
        sketch=None if sketch is None else lambda key, f, y: sketch(key, f, target(y)),
        weights=weights,
        faults=faults,
    )


def _target_and_weights(y: PyTree) -> tuple[PyTree, PyTree]:
    if not isinstance(y, tuple | list) or len(y) != 2:
        msg = (
            f"A weighted likelihood needs targets that are pairs (target, weights), found "
            f"{jax.tree.structure(y)}."
        )
        raise ValueError(msg)
    return y[0], y[1]


def _check_weights(weights: PyTree, terms: PyTree) -> None:
    try:
        full = jax.tree.broadcast(weights, terms)
    except ValueError as error:
        msg = (
            f"The weights must be a pytree prefix of the loss terms, {jax.tree.structure(terms)}; "
            f"found {jax.tree.structure(weights)}."
        )
        raise ValueError(msg) from error
    for w, term in zip(jax.tree.leaves(full), jax.tree.leaves(terms), strict=True):
        if jnp.shape(w) != term.shape[: jnp.ndim(w)]:
            msg = (
                f"The weights must have the shape of the loss terms, {term.shape} an example, or "
                f"of their leading axes; found {jnp.shape(w)}."
            )
            raise ValueError(msg)
