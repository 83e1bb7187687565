"""Likelihoods of classes and labels: softmax and logistic cross-entropy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree, Shaped

from laplax_kfac.arguments import no_type_check, numbers, shown
from laplax_kfac.likelihood.analytic import analytic
from laplax_kfac.likelihood.pieces import (
    floating,
    like_output,
    one_array,
    one_target_like,
    only,
    real,
    target_like,
)
from laplax_kfac.likelihood.record import Likelihood


@no_type_check
def categorical(*, ignore_index: int | None = None, label_smoothing: float = 0.0) -> Likelihood:
    """Softmax cross-entropy over the last axis; terms have the other axes.

    Targets are class numbers of the shape of the terms, or probabilities of that of the output,
    which sum to one: passes over data refuse others, and labels that are no class. The Hessian is
    ``diag(p) - p p^T`` whatever the target, of rank C - 1: so many columns a term.

    Args:
        ignore_index: Class number that marks terms which do not count, such as padding.
        label_smoothing: What part of a target is spread evenly over all classes. It changes the
            loss and ``empirical``; ``type2`` does not depend on targets, and ``mc`` draws them from
            the model.

    Raises:
        ValueError: If ``label_smoothing`` is not in [0, 1).
        TypeError: If an argument is no number.
    """
    _check_smoothing(label_smoothing, ignore_index)

    def log_probabilities(f: PyTree) -> Float[Array, "... C"]:
        return jax.nn.log_softmax(one_array(real(f), "cross_entropy"))

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        q = _class_probabilities(y, one_array(real(f), "cross_entropy"))
        log_p = log_probabilities(f)
        if label_smoothing:
            q = (1 - label_smoothing) * q + label_smoothing / q.shape[-1]
        return -jnp.sum(q * log_p, axis=-1)

    def space(f: PyTree) -> Float[Array, "... columns"]:
        return one_array(real(f), "cross_entropy")[..., 1:]

    def product(f: PyTree, w: Float[Array, "... columns"]) -> PyTree:
        """S = diag(s) Q with s = sqrt(p) and Q an orthonormal basis of s's complement.

        Q is the last columns of the Householder reflection that takes e_1 to -s.
        """
        s = jnp.exp(0.5 * log_probabilities(f))  # differentiable where p underflows
        first, rest = s[..., :1], s[..., 1:]
        along = jnp.sum(rest * w, axis=-1, keepdims=True)
        return like_output(
            f, s * jnp.concatenate([-along, w - rest * (along / (1 + first))], axis=-1)
        )

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        log_p = log_probabilities(f)
        drawn = jax.random.categorical(key, log_p)
        return like_output(
            f, jnp.exp(log_p) - jax.nn.one_hot(drawn, log_p.shape[-1], dtype=log_p.dtype)
        )

    def counted(f: PyTree, y: PyTree) -> Bool[Array, "*terms"]:
        logits = one_array(f, "cross_entropy")
        labels = jnp.asarray(only(y))
        if labels.shape == logits.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
            msg = (
                f"`ignore_index` needs targets that are integer classes of shape "
                f"{logits.shape[:-1]} an example; found {labels.dtype} of shape {labels.shape}."
            )
            raise ValueError(msg)
        return jnp.asarray(labels.reshape(logits.shape[:-1]) != ignore_index)

    def faults(f: PyTree, y: PyTree) -> dict[str, PyTree]:
        return faults_of_classes(jax.tree.leaves(f)[0].shape, jnp.asarray(only(y)), ignore_index)

    found = analytic("cross_entropy", losses, product, sample_gradient, space=space)
    found = replace(found, faults=faults)
    return found if ignore_index is None else replace(found, weights=counted)


def _class_probabilities(y: PyTree, logits: Float[Array, "... C"]) -> Float[Array, "... C"]:
    target = jnp.asarray(only(y))
    if logits.shape[-1:] < (2,):
        msg = (
            "`loss_fn='cross_entropy'` needs outputs with logits of two classes or more along the "
            f"last axis; found shape {logits.shape} an example. One logit for true and false is "
            "`loss_fn='binary_cross_entropy'`."
        )
        raise ValueError(msg)
    if target.shape == logits.shape:
        return target.astype(logits.dtype)
    found, wanted = ([n for n in shape if n != 1] for shape in (target.shape, logits.shape[:-1]))
    if jnp.issubdtype(target.dtype, jnp.integer) and found == wanted:
        labels = target.reshape(logits.shape[:-1])
        return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    hint = "; convert classes by `y.astype(int)`" if found == wanted else ""
    msg = (
        f"`loss_fn='cross_entropy'` needs targets that are integer classes of shape "
        f"{logits.shape[:-1]} or probabilities of shape {logits.shape} an example; found "
        f"{target.dtype} of shape {target.shape}{hint}."
    )
    raise ValueError(msg)


def faults_of_classes(
    shape: tuple[int, ...], target: Shaped[Array, "..."], ignore_index: int | None
) -> dict[str, PyTree]:
    """Labels that are no class, and probabilities that are none, by term.

    Args:
        shape: Of the logits of an example.
        target: Its class numbers or probabilities.
        ignore_index: Class number of terms that do not count.
    """
    none = jnp.zeros(shape[:-1], bool)
    labels = (
        f"class labels outside 0..{shape[-1] - 1}, the classes that the outputs have logits for. "
        "Labels count from 0. Terms that do not count, such as padding, are marked by "
        "`likelihood.categorical(ignore_index=-100)`, or take weight 0 by `likelihood.weighted`; "
        "whole examples take weight 0 in the batch"
    )
    rows = (
        "class probabilities that are negative or do not sum to one. Rows of zeros for padding, "
        "and rows with weights multiplied in, are `likelihood.weighted('cross_entropy')` with "
        "targets (probabilities, weights)"
    )
    if target.shape == shape:
        q = floating(target)
        tolerance = max(1e-3, 4 * float(jnp.finfo(q.dtype).eps))  # bfloat16 has two digits
        total = jnp.sum(q, axis=-1, dtype=jnp.result_type(float))
        right = (jnp.abs(total - 1) <= tolerance) & jnp.all(q >= 0, axis=-1)
        return {labels: none, rows: ~right}
    numbers = target.reshape(shape[:-1]).astype(jnp.int32)
    outside = (numbers < 0) | (numbers >= shape[-1])
    if ignore_index is not None:
        outside &= numbers != ignore_index
    return {labels: outside, rows: none}


@no_type_check
def bernoulli(*, label_smoothing: float = 0.0) -> Likelihood:
    """Binary cross-entropy on logits: every output a label of its own (multi-label).

    Targets are 0, 1, or probabilities, in the shape of the output. Loss terms are single outputs.

    Args:
        label_smoothing: What part of a target is spread evenly over true and false; see
            `categorical`.

    Raises:
        ValueError: If ``label_smoothing`` is not in [0, 1).
        TypeError: If an argument is no number.
    """
    _check_smoothing(label_smoothing)

    def logits(f: PyTree) -> Float[Array, "..."]:
        return one_array(real(f), "binary_cross_entropy")

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        x = logits(f)
        target = one_target_like(x, y)
        if label_smoothing:
            target = (1 - label_smoothing) * target + 0.5 * label_smoothing
        return jax.nn.softplus(x) - target * x

    def product(f: PyTree, w: PyTree) -> PyTree:
        x = logits(f)
        deviation = jnp.sqrt(jax.nn.sigmoid(x) * jax.nn.sigmoid(-x))
        return jax.tree.map(lambda u: deviation * u, w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        p = jax.nn.sigmoid(logits(f))
        return like_output(f, p - jax.random.bernoulli(key, p).astype(p.dtype))

    def faults(f: PyTree, y: PyTree) -> dict[str, PyTree]:
        target = target_like(jax.tree.leaves(f)[0], only(y))
        text = (
            "numbers outside [0, 1]; targets of `binary_cross_entropy` are 0, 1 or probabilities. "
            "Labels -1 and 1 are (y + 1) / 2; terms that do not count take weight 0 by "
            "`likelihood.weighted`"
        )
        return {text: ~((target >= 0) & (target <= 1))}

    found = analytic("binary_cross_entropy", losses, product, sample_gradient)
    return replace(found, faults=faults)


def _check_smoothing(label_smoothing: object, ignore_index: object = None) -> None:
    part = numbers("label_smoothing", label_smoothing, shape=())
    if part is None or not 0 <= part < 1:
        msg = f"`label_smoothing` must be in [0, 1), found {shown(label_smoothing)}."
        raise ValueError(msg)
    whole = isinstance(ignore_index, int | np.integer) and not isinstance(ignore_index, bool)
    if ignore_index is not None and not whole:
        msg = f"`ignore_index` must be an integer, a class number; found {shown(ignore_index)}."
        raise TypeError(msg)
