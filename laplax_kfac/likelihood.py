"""Losses as likelihoods: which vectors are pulled back from the model's output.

The loss of a dataset is a *sum* over examples of ``loss(f, y)`` (laplax's convention), and a loss
is the negative log-likelihood up to a constant: ``mse`` is ``||f - y||^2``, hence a Gaussian of
variance 1/2 with Hessian 2 I; ``cross_entropy`` has Hessian ``diag(p) - p p^T``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, Num, PyTree

FisherType = Literal["type2", "mc", "empirical", "forward_only"]
LossFunction = Callable[[PyTree, PyTree], Float[Array, ""]]
FISHER_TYPES = ("type2", "mc", "empirical", "forward_only")


@dataclass(frozen=True)
class Likelihood:
    """What curvature needs to know of a loss; every function is for one example.

    Attributes:
        name: What errors and reports call it.
        loss: (f, y) -> the loss, a scalar.
        hessian_root: (f, y) -> columns S, stacked in front: sum_r S_r S_r^T is the loss Hessian.
        sample_gradient: (key, f) -> loss gradient at a target drawn from the model's own
            likelihood; None where the loss is no known likelihood.
    """

    name: str
    loss: LossFunction
    hessian_root: Callable[[PyTree, PyTree], PyTree]
    sample_gradient: Callable[[Key[Array, ""], PyTree], PyTree] | None = None

    def gradient(self, f: PyTree, y: PyTree) -> PyTree:
        """Gradient of the loss in the model's output at the observed target."""
        return jax.grad(self.loss)(f, y)


def columns(
    likelihood: Likelihood,
    fisher_type: FisherType,
    f: PyTree,
    y: PyTree,
    *,
    key: Key[Array, ""],
    mc_samples: int = 1,
) -> PyTree:
    """The R vectors that are pulled back for one example; their outer products sum to H.

    Args:
        likelihood: The loss.
        fisher_type: ``"type2"``: a square root of the exact loss Hessian, so that the curvature is
            the generalised Gauss-Newton matrix. ``"mc"``: loss gradients at targets drawn from the
            model's likelihood, over sqrt(mc_samples). ``"empirical"``: the gradient at ``y``.
        f: The model's output for one example.
        y: Its target.
        key: For ``"mc"``.
        mc_samples: For ``"mc"``: draws an example.

    Raises:
        ValueError: If the loss has no sampler and ``fisher_type`` is ``"mc"``.
    """
    if fisher_type == "type2":
        return likelihood.hessian_root(f, y)
    if fisher_type == "empirical":
        return jax.tree.map(lambda g: g[None], likelihood.gradient(f, y))
    sample = likelihood.sample_gradient
    if sample is None:
        msg = (
            f"`fisher_type='mc'` needs targets drawn from the likelihood, but `loss_fn` "
            f"({likelihood.name}) defines none; use 'type2' or 'empirical', or a named loss."
        )
        raise ValueError(msg)
    draws = jax.vmap(lambda k: sample(k, f))(jax.random.split(key, mc_samples))
    return jax.tree.map(lambda g: g / jnp.sqrt(jnp.asarray(mc_samples, g.dtype)), draws)


def num_columns(
    likelihood: Likelihood, fisher_type: FisherType, f: PyTree, y: PyTree, mc_samples: int
) -> int:
    """How many vectors `columns` returns, R, for outputs and targets of these shapes."""
    if fisher_type == "forward_only":
        return 0
    if fisher_type == "empirical":
        return 1
    if fisher_type == "mc":
        return mc_samples
    return int(jax.tree.leaves(jax.eval_shape(likelihood.hessian_root, f, y))[0].shape[0])


def resolve_likelihood(loss_fn: Any) -> Likelihood:
    """The likelihood of a laplax ``LossFn``, its string, a callable ``loss(f, y)``, or itself.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a callable nor a `Likelihood`.
    """
    if isinstance(loss_fn, Likelihood):
        return loss_fn
    if isinstance(loss_fn, str):
        name = str(loss_fn).lower()
        if name not in _NAMED:
            msg = f"`loss_fn` is {loss_fn!r}; expected one of {sorted(_NAMED)} or a callable."
            raise ValueError(msg)
        return _NAMED[name]
    if callable(loss_fn):
        return _from_callable(loss_fn)
    msg = (
        f"`loss_fn` must be a laplax LossFn, its string, or a callable `loss(output, target)` of "
        f"one example; got {type(loss_fn).__name__}."
    )
    raise TypeError(msg)


def _real(f: PyTree) -> PyTree:
    """Outputs in at least float32: square roots and softmaxes of bfloat16 lose too much."""
    return jax.tree.map(lambda o: o.astype(jnp.promote_types(o.dtype, jnp.float32)), f)


def _one_array(f: PyTree, name: str) -> Num[Array, "..."]:
    leaves = jax.tree.leaves(f)
    if len(leaves) != 1:
        msg = (
            f"`loss_fn='{name}'` needs a model with one output array, found {len(leaves)}; pass a "
            f"callable loss, or a `model_fn` that returns one array."
        )
        raise ValueError(msg)
    return leaves[0]


def _columns_like(f: PyTree, columns: Float[Array, "R n"]) -> PyTree:
    """Split columns over the raveled output into pytrees like the output."""
    _, unravel = ravel_pytree(f)
    return jax.vmap(unravel)(columns)


# -- mean squared error: ||f - y||^2 -----------------------------------------------------------


def _mse_loss(f: PyTree, y: PyTree) -> Float[Array, ""]:
    terms = jax.tree.map(lambda a, b: jnp.sum((a - _target_like(a, b)) ** 2), _real(f), y)
    return jax.tree.reduce(jnp.add, terms)


def _target_like(output: Float[Array, "..."], target: Any) -> Num[Array, "..."]:
    """A target in the shape of the output; axes of length one may be missing, or too many."""
    found, wanted = jnp.shape(target), output.shape
    if [n for n in found if n != 1] != [n for n in wanted if n != 1]:
        msg = f"targets must have the shape of the output, {wanted} an example; found {found}."
        raise ValueError(msg)
    return jnp.reshape(target, wanted)


def _mse_root(f: PyTree, _: PyTree) -> PyTree:
    f = _real(f)
    flat, _ = ravel_pytree(f)
    return _columns_like(f, jnp.sqrt(2.0) * jnp.eye(flat.size, dtype=flat.dtype))


def _mse_sample(key: Key[Array, ""], f: PyTree) -> PyTree:
    f = _real(f)
    flat, unravel = ravel_pytree(f)
    return unravel(jnp.sqrt(2.0) * jax.random.normal(key, flat.shape, flat.dtype))


# -- cross-entropy over the last axis; targets are class numbers or probabilities --------------


def _class_probabilities(y: PyTree, logits: Float[Array, "... C"]) -> Float[Array, "... C"]:
    (target,) = jax.tree.leaves(y)
    target = jnp.asarray(target)
    if target.shape == logits.shape and target.ndim > 0:
        return target.astype(logits.dtype)
    if jnp.issubdtype(target.dtype, jnp.integer) and target.size * logits.shape[-1] == logits.size:
        labels = target.reshape(logits.shape[:-1])
        return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    msg = (
        f"`loss_fn='cross_entropy'` needs targets that are integer classes of shape "
        f"{logits.shape[:-1]} or probabilities of shape {logits.shape} an example; found "
        f"{target.dtype} of shape {target.shape}."
    )
    raise ValueError(msg)


def _cross_entropy_loss(f: PyTree, y: PyTree) -> Float[Array, ""]:
    logits = _one_array(_real(f), "cross_entropy")
    return -jnp.sum(_class_probabilities(y, logits) * jax.nn.log_softmax(logits))


def _cross_entropy_root(f: PyTree, _: PyTree) -> PyTree:
    """C - 1 columns a term, for the Hessian diag(p) - p p^T has rank C - 1.

    S = diag(s) Q with s = sqrt(p) and Q an orthonormal basis of s's complement: the last columns
    of the Householder reflection that takes e_1 to -s.
    """
    logits = _one_array(_real(f), "cross_entropy")
    s = jnp.exp(0.5 * jax.nn.log_softmax(logits))  # (..., C); differentiable where p underflows
    classes = s.shape[-1]
    v = s.at[..., 0].add(1.0)
    reflected = v[..., None, :] * (s[..., 1:] / v[..., :1])[..., None]
    root = s[..., None, :] * (jnp.eye(classes, dtype=s.dtype)[1:] - reflected)  # (..., C-1, C)
    terms = math.prod(logits.shape[:-1])
    flat = root.reshape(terms, classes - 1, classes)
    # One loss term (token, pixel) has no curvature with another: columns touch one term each.
    spread = jnp.eye(terms, dtype=s.dtype)[:, None, :, None] * flat[:, :, None, :]
    return _columns_like(_real(f), spread.reshape(terms * (classes - 1), terms * classes))


def _cross_entropy_sample(key: Key[Array, ""], f: PyTree) -> PyTree:
    logits = _one_array(_real(f), "cross_entropy")
    drawn = jax.random.categorical(key, logits)
    one_hot = jax.nn.one_hot(drawn, logits.shape[-1], dtype=logits.dtype)
    return jax.tree.map(lambda _: jax.nn.softmax(logits) - one_hot, f)


# -- binary cross-entropy on logits ------------------------------------------------------------


def _binary_loss(f: PyTree, y: PyTree) -> Float[Array, ""]:
    logits = _one_array(_real(f), "binary_cross_entropy")
    (target,) = jax.tree.leaves(y)
    target = _target_like(logits, target).astype(logits.dtype)
    return jnp.sum(jax.nn.softplus(logits) - target * logits)


def _binary_root(f: PyTree, _: PyTree) -> PyTree:
    logits = _one_array(_real(f), "binary_cross_entropy").reshape(-1)
    deviation = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits))
    return _columns_like(_real(f), jnp.diag(deviation))


def _binary_sample(key: Key[Array, ""], f: PyTree) -> PyTree:
    logits = _one_array(_real(f), "binary_cross_entropy")
    p = jax.nn.sigmoid(logits)
    drawn = jax.random.bernoulli(key, p).astype(p.dtype)
    return jax.tree.map(lambda _: p - drawn, f)


# -- any other loss ----------------------------------------------------------------------------


def _from_callable(loss_fn: LossFunction) -> Likelihood:
    """A loss with no known likelihood: its Hessian by autodiff, the root by eigenvalues."""

    def loss(f: PyTree, y: PyTree) -> Float[Array, ""]:
        value = jnp.asarray(loss_fn(f, y))
        if value.size != 1:
            msg = f"`loss_fn` must return one number an example, found shape {value.shape}; sum it."
            raise ValueError(msg)
        return value.reshape(())

    def root(f: PyTree, y: PyTree) -> PyTree:
        f = _real(f)
        flat, unravel = ravel_pytree(f)
        hessian = jax.hessian(lambda v: loss(unravel(v), y))(flat)
        values, vectors = jnp.linalg.eigh(hessian)
        # Negative curvature of a non-convex loss is dropped: the result must stay a covariance.
        return _columns_like(f, jnp.sqrt(jnp.clip(values, 0.0))[:, None] * vectors.T)

    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return Likelihood(f"the callable {name}", loss, root)


_NAMED = {
    "mse": Likelihood("mse", _mse_loss, _mse_root, _mse_sample),
    "cross_entropy": Likelihood(
        "cross_entropy", _cross_entropy_loss, _cross_entropy_root, _cross_entropy_sample
    ),
    "binary_cross_entropy": Likelihood(
        "binary_cross_entropy", _binary_loss, _binary_root, _binary_sample
    ),
}
