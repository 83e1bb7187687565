"""Losses as likelihoods: which vectors are pulled back from the model's output.

The loss of a dataset is a *sum* over examples (laplax's convention), and the loss of an example a
sum over its *terms*: tokens, pixels, labels, each a function of its own slice of the output. A loss
is the negative log-likelihood; only ``mse`` leaves out a constant: it is ``||f - y||^2``, hence a
Gaussian of variance 1/2 with Hessian 2 I.

Two terms of one example share the model's parameters, and the three estimates of curvature differ
in what they make of it. ``type2``: the Hessian H of the loss is block-diagonal over terms, so no
column touches two of them, and nothing is left out. ``mc``: the targets of all terms are drawn
together and independently; cross terms are zero in expectation, not in a single draw.
``empirical``: the gradient of the *summed* loss, so the outer product keeps all cross terms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, Num, PyTree, Shaped

FisherType = Literal["type2", "mc", "empirical", "forward_only"]
LossFunction = Callable[[PyTree, PyTree], PyTree]
FISHER_TYPES = ("type2", "mc", "empirical", "forward_only")
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Likelihood:
    """What curvature needs to know of a loss; every function is for one example.

    Ready-made ones are the functions of this module, and `from_log_prob` makes one of a
    log-probability alone. They go wherever a ``loss_fn`` does.

    Attributes:
        name: What errors and reports call it.
        losses: (f, y) -> the loss terms, -log p(y | f) with its constants: one number, or an array
            whose axes are the leading ones of the output, where every term depends on its own
            slice of the output; a pytree of such arrays for a pytree of outputs.
        hessian_root: (f, y) -> columns S, stacked in front: sum_r S_r S_r^T is the Hessian of the
            summed terms, or a positive semi-definite matrix that takes its place.
        sample_gradient: (key, f) -> gradient of the summed terms at a target drawn from the
            model's own likelihood; None where there is no sampler.
        sketch: (key, f, y) -> one random combination S w of the columns, with E[w w^T] = I, at a
            cost that does not grow with their number; None combines the columns of the root.
        weights: (f, y) -> what each term counts, in the shape of the terms or of their leading
            axes; None counts each once. The functions above are those of terms that count once.
        squared_error: Whether the loss is the squared error, so that it is the likelihood of a
            Gaussian whose noise variance the evidence may choose.
    """

    name: str
    losses: LossFunction
    hessian_root: Callable[[PyTree, PyTree], PyTree]
    sample_gradient: Callable[[Key[Array, ""], PyTree], PyTree] | None = None
    sketch: Callable[[Key[Array, ""], PyTree, PyTree], PyTree] | None = None
    weights: Callable[[PyTree, PyTree], PyTree] | None = None
    squared_error: bool = False

    @classmethod
    def from_log_prob(
        cls,
        name: str,
        log_prob: LossFunction,
        *,
        sample: Callable[[Key[Array, ""], PyTree], PyTree] | None = None,
        hessian_root: Callable[[PyTree, PyTree], PyTree] | None = None,
    ) -> "Likelihood":
        """A likelihood of which a user knows the log-probability.

        Args:
            name: What errors and reports call it.
            log_prob: (f, y) -> log p(y | f) with its constants: one number, or one a term (see
                `losses`), which makes the Hessian one small block a term.
            sample: (key, f) -> a target drawn from p(. | f); ``fisher_type="mc"`` needs it.
            hessian_root: (f, y) -> columns of a root of the Hessian of -log_prob, stacked in
                front. By default that Hessian is found by differentiation and its root by an
                eigendecomposition; negative eigenvalues, which a log-probability that is not
                concave in f has, are set to zero, so that ``type2`` stays a covariance.

        Raises:
            ValueError: When called, if ``log_prob`` returns an array of another shape than the
                leading axes of the output.
        """

        def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
            value = -jnp.asarray(log_prob(_real(f), y))
            leaves = jax.tree.leaves(f)
            leading = len(leaves) == 1 and jnp.shape(leaves[0])[: value.ndim] == value.shape
            if value.ndim and not leading:
                msg = (
                    f"The log-probability of {name!r} must be one number an example, or an array "
                    f"with the leading axes of the output, one number a term; found shape "
                    f"{value.shape} for outputs of shape {[jnp.shape(x) for x in leaves]}."
                )
                raise ValueError(msg)
            return value

        def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
            assert sample is not None
            return _gradient(losses, f, sample(key, _real(f)))

        drawn = None if sample is None else sample_gradient
        if hessian_root is not None:
            return cls(name, losses, hessian_root, drawn)
        return _by_differentiation(name, losses, drawn)

    def loss(self, f: PyTree, y: PyTree) -> Float[Array, ""]:
        """The loss of an example: the weighted sum of its terms."""
        terms = self.losses(f, y)
        return _total(terms if self.weights is None else _times(self.weights(f, y), terms))

    def gradient(self, f: PyTree, y: PyTree) -> PyTree:
        """Gradient of the loss in the model's output at the observed target."""
        gradient = _gradient(self.losses, f, y)
        return gradient if self.weights is None else _times(self.weights(f, y), gradient)

    def num_outputs(self, f: PyTree, y: PyTree) -> Float[Array, ""]:
        """Number of scalar outputs, each counted with the weight of its term."""
        ones = jax.tree.map(lambda o: jnp.ones(o.shape), f)
        return _total(ones if self.weights is None else _times(self.weights(f, y), ones))

    def log_prob(self, f: PyTree, y: PyTree) -> Float[Array, ""]:
        """Minus the loss, and for ``mse`` the constant of its Gaussian, of variance 1/2."""
        constant = 0.5 * math.log(math.pi) * self.num_outputs(f, y) if self.squared_error else 0.0
        return -self.loss(f, y) - constant


def columns(
    likelihood: Likelihood,
    fisher_type: FisherType,
    f: PyTree,
    y: PyTree,
    *,
    key: Key[Array, ""],
    mc_samples: int = 1,
    sketches: int | None = None,
) -> PyTree:
    """The R vectors that are pulled back for one example; their outer products sum to H.

    Args:
        likelihood: The loss.
        fisher_type: ``"type2"``: a square root of the exact loss Hessian, so that the curvature is
            the generalised Gauss-Newton matrix. ``"mc"``: loss gradients at targets drawn from the
            model's likelihood, over sqrt(mc_samples). ``"empirical"``: the gradient at ``y``.
        f: The model's output for one example.
        y: Its target.
        key: For ``"mc"`` and sketches.
        mc_samples: For ``"mc"``: draws an example.
        sketches: For ``"type2"``: k random combinations S w / sqrt(k) of the columns S of the root,
            with independent signs w. Their outer products sum to H in expectation, with a mean
            squared error in Frobenius norm of at most ``(tr(H)^2 + ||H||^2) / k``, at the cost of
            k columns. A root that has no more than k columns is taken itself.

    Raises:
        ValueError: If the loss has no sampler and ``fisher_type`` is ``"mc"``.
    """
    if fisher_type == "empirical":
        return jax.tree.map(lambda g: g[None], likelihood.gradient(f, y))
    if fisher_type == "type2":
        if sketches is None or sketches >= num_columns(likelihood, "type2", f, y, 1):
            vectors = likelihood.hessian_root(f, y)
            if not len(jax.tree.leaves(vectors)[0]):  # none at all is for `forward_only`
                vectors = jax.tree.map(lambda v: jnp.zeros((1, *v.shape[1:]), v.dtype), vectors)
        else:
            vectors = _draws(lambda k: _sketch(likelihood, k, f, y), key, sketches)
    else:
        sample = likelihood.sample_gradient
        if sample is None:
            msg = (
                f"`fisher_type='mc'` needs targets drawn from the likelihood, but `loss_fn` "
                f"({likelihood.name}) defines none; use 'type2' or 'empirical', or a named loss."
            )
            raise ValueError(msg)
        vectors = _draws(lambda k: sample(k, f), key, mc_samples)
    if likelihood.weights is None:
        return vectors
    # sqrt(w_t) for term t: the outer products of both sum to w_t H_t, and only to that, because
    # H has no entries between terms.
    roots = jax.tree.map(lambda w: jnp.sqrt(_floating(w)), likelihood.weights(f, y))
    return jax.vmap(lambda v: _times(roots, v))(vectors)


def num_columns(
    likelihood: Likelihood,
    fisher_type: FisherType,
    f: PyTree,
    y: PyTree,
    mc_samples: int,
    sketches: int | None = None,
) -> int:
    """How many vectors `columns` returns, R, for outputs and targets of these shapes."""
    if fisher_type == "forward_only":
        return 0
    if fisher_type == "empirical":
        return 1
    if fisher_type == "mc":
        return mc_samples
    exact = int(jax.tree.leaves(jax.eval_shape(likelihood.hessian_root, f, y))[0].shape[0])
    return max(1, exact if sketches is None else min(exact, sketches))


def _draws(draw: Callable[[Key[Array, ""]], PyTree], key: Key[Array, ""], number: int) -> PyTree:
    """Independent vectors, stacked in front, whose outer products sum to the mean of one."""
    drawn = jax.vmap(draw)(jax.random.split(key, number))
    return jax.tree.map(lambda v: v / jnp.sqrt(jnp.asarray(number, v.dtype)), drawn)


def _sketch(likelihood: Likelihood, key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
    if likelihood.sketch is not None:
        return likelihood.sketch(key, f, y)
    root = likelihood.hessian_root(f, y)
    signs = jax.random.rademacher(key, (len(jax.tree.leaves(root)[0]),))

    def combined(s: Float[Array | np.ndarray, "R *output"]) -> Float[Array, "*output"]:
        return jnp.tensordot(signs.astype(s.dtype), s, 1, precision=_HIGHEST)

    return jax.tree.map(combined, root)


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
        if name not in NAMED:
            msg = (
                f"`loss_fn` is {loss_fn!r}; expected one of {sorted(NAMED)}, a callable, or a "
                "`Likelihood`."
            )
            raise ValueError(msg)
        return NAMED[name]
    if callable(loss_fn):
        return _from_callable(loss_fn)
    msg = (
        f"`loss_fn` must be a laplax LossFn, its string, or a callable `loss(output, target)` of "
        f"one example (or a `Likelihood`); got {type(loss_fn).__name__}."
    )
    raise TypeError(msg)


# -- weights -----------------------------------------------------------------------------------


def weighted(loss_fn: Any) -> Likelihood:
    """A likelihood whose targets are pairs ``(target, weights)``: masks, and weights of terms.

    Weights are not negative, and have the axes of the loss terms, or the leading ones of them:
    for ``cross_entropy`` those of the output without the last, for the squared error any leading
    ones of the output. A term of weight zero (padding) is left out, whatever the output and the
    target there.

    Weights scale the loss, that is the vectors that are pulled back. Inputs of layers know nothing
    of terms: a Kronecker factor A over its count M stays an average over all positions, those of
    padding included, where `ekfac` corrects the eigenvalues. The weight of a whole example belongs
    to the data: one of a batch ``(input, target, weight)`` counts it that often.

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
        return given if own is None else _times(given, jax.tree.map(_floating, own(f, y)))

    return replace(
        base,
        name=f"weighted {base.name}",
        losses=lambda f, y: base.losses(f, target(y)),
        hessian_root=lambda f, y: root(f, target(y)),
        sketch=None if sketch is None else lambda key, f, y: sketch(key, f, target(y)),
        weights=weights,
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


def _times(weights: PyTree, tree: PyTree) -> PyTree:
    """Multiply along leading axes; a weight of zero gives zero, even of what is not finite."""

    def scaled(weight: ArrayLike, part: PyTree) -> PyTree:
        def one(x: Array) -> Array:
            axes = (*jnp.shape(weight), *[1] * (x.ndim - jnp.ndim(weight)))
            factor = jnp.reshape(weight, axes).astype(x.dtype)
            return jnp.where(factor == 0, jnp.zeros((), x.dtype), factor * x)

        return jax.tree.map(one, part)

    return jax.tree.map(scaled, weights, tree)


def _floating(x: Any) -> Float[Array, "..."]:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


# -- pieces ------------------------------------------------------------------------------------


def _total(tree: PyTree) -> Float[Array, ""]:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, tree))


def _gradient(losses: LossFunction, f: PyTree, y: PyTree) -> PyTree:
    return jax.grad(lambda f: _total(losses(f, y)))(f)


def _real(f: PyTree) -> PyTree:
    """Outputs in at least float32: square roots and softmaxes of bfloat16 lose too much."""
    return jax.tree.map(lambda o: jnp.asarray(o, jnp.promote_types(o.dtype, jnp.float32)), f)


def _one_array(f: PyTree, name: str) -> Num[Array, "..."]:
    leaves = jax.tree.leaves(f)
    if len(leaves) != 1:
        msg = (
            f"`loss_fn='{name}'` needs a model with one output array, found {len(leaves)}; pass a "
            f"callable loss, or a `model_fn` that returns one array."
        )
        raise ValueError(msg)
    return jnp.asarray(leaves[0])


def _like(f: PyTree, array: Array) -> PyTree:
    """One array as the only leaf of a pytree like the output."""
    return jax.tree.map(lambda _: array, f)


def _only(y: PyTree) -> Any:
    leaves = jax.tree.leaves(y)
    if len(leaves) != 1:
        msg = (
            f"An example's target must be one array, found {jax.tree.structure(y)}; pairs (target, "
            "weights) need the loss `laplax_kfac.likelihood.weighted(loss_fn)`."
        )
        raise ValueError(msg)
    return leaves[0]


def _target_like(output: Float[Array | np.ndarray, "..."], target: Any) -> Shaped[Array, "..."]:
    """A target in the shape of the output; axes of length one may be missing, or too many."""
    found, wanted = jnp.shape(target), output.shape
    if [n for n in found if n != 1] != [n for n in wanted if n != 1]:
        msg = f"targets must have the shape of the output, {wanted} an example; found {found}."
        raise ValueError(msg)
    return jnp.asarray(target).reshape(wanted)


def _one_target_like(output: Float[Array, "..."], y: PyTree) -> Float[Array, "..."]:
    return _target_like(output, _only(y)).astype(output.dtype)


def _analytic(
    name: str,
    losses: LossFunction,
    product: Callable[[PyTree, PyTree], PyTree],
    sample_gradient: Callable[[Key[Array, ""], PyTree], PyTree],
    *,
    space: Callable[[PyTree], PyTree] = _real,
    weights: Callable[[PyTree, PyTree], PyTree] | None = None,
    squared_error: bool = False,
) -> Likelihood:
    """A likelihood with a root that is known as a product (f, w) -> S w, for w as ``space(f)``.

    Its columns are the products with unit vectors, a sketch that with random signs.
    """

    def root(f: PyTree, _: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(space(f))
        units = jnp.eye(flat.size, dtype=flat.dtype)
        return jax.vmap(lambda w: product(f, unravel(w)))(units)

    def sketch(key: Key[Array, ""], f: PyTree, _: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(space(f))
        return product(f, unravel(jax.random.rademacher(key, flat.shape, flat.dtype)))

    return Likelihood(name, losses, root, sample_gradient, sketch, weights, squared_error)


# -- Gaussians ---------------------------------------------------------------------------------


def _squared_error() -> Likelihood:
    """The squared error ||f - y||^2 of laplax: no normaliser, and a free noise variance."""

    def losses(f: PyTree, y: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: (a - _target_like(a, b)) ** 2, _real(f), y)

    def product(f: PyTree, w: PyTree) -> PyTree:
        del f
        return jax.tree.map(lambda x: math.sqrt(2.0) * x, w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        return product(f, _normal_like(key, f))

    return _analytic("mse", losses, product, sample_gradient, squared_error=True)


def _normal_like(key: Key[Array, ""], f: PyTree) -> PyTree:
    flat, unravel = ravel_pytree(_real(f))
    return unravel(jax.random.normal(key, flat.shape, flat.dtype))


def gaussian(noise_variance: float | Num[Array | np.ndarray, "..."]) -> Likelihood:
    """A Gaussian around the output, of known variance; any pytree of outputs.

    With its normaliser, so that `data_fit` and `log_marginal_likelihood` need no
    ``noise_variance``; its Hessian is I / noise_variance. Loss terms are single outputs.

    Args:
        noise_variance: Positive; a scalar, or an array that broadcasts to the output.

    Raises:
        ValueError: If it is not positive.
    """
    if not isinstance(noise_variance, jax.core.Tracer) and not np.all(noise_variance > 0):
        msg = f"`noise_variance` must be positive, found {noise_variance}."
        raise ValueError(msg)

    def like(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.broadcast_to(jnp.asarray(noise_variance, x.dtype), x.shape)

    def losses(f: PyTree, y: PyTree) -> PyTree:
        def one(a: Array, b: Any) -> Array:
            variance = like(a)
            squares = (a - _target_like(a, b)) ** 2 / variance
            return 0.5 * (squares + jnp.log(2 * math.pi * variance))

        return jax.tree.map(one, _real(f), y)

    def product(f: PyTree, w: PyTree) -> PyTree:
        del f
        return jax.tree.map(lambda x: x / jnp.sqrt(like(x)), w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        return product(f, _normal_like(key, f))

    return _analytic("gaussian", losses, product, sample_gradient)


def heteroscedastic_gaussian() -> Likelihood:
    """A Gaussian of which the model gives both mean and variance.

    The last axis of the output has size 2 k: k means, then the logarithms of k variances. Targets
    have k entries there, or no such axis if k = 1. Loss terms have the other axes.

    The Hessian of this loss depends on the residual and is indefinite. ``type2`` takes in its place
    its mean under the model's own likelihood, the Fisher information, ``diag(exp(-s), 1/2)`` for
    log-variances s: positive definite, free of the targets, and what ``mc`` converges to.
    """
    name = "heteroscedastic_gaussian"

    def split(f: PyTree) -> tuple[Array, Array]:
        output = _one_array(_real(f), name)
        if output.ndim == 0 or output.shape[-1] % 2 or not output.shape[-1]:
            msg = (
                f"`{name}` needs outputs whose last axis has means and as many log-variances, of "
                f"even size; found shape {output.shape} an example."
            )
            raise ValueError(msg)
        mean, log_variance = jnp.split(output, 2, axis=-1)
        return mean, log_variance

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        mean, log_variance = split(f)
        squares = (mean - _one_target_like(mean, y)) ** 2 * jnp.exp(-log_variance)
        return 0.5 * jnp.sum(squares + log_variance + math.log(2 * math.pi), axis=-1)

    def product(f: PyTree, w: PyTree) -> PyTree:
        at_mean, at_log_variance = jnp.split(_one_array(w, name), 2, axis=-1)
        parts = [jnp.exp(-0.5 * split(f)[1]) * at_mean, math.sqrt(0.5) * at_log_variance]
        return _like(f, jnp.concatenate(parts, axis=-1))

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        mean, log_variance = split(f)
        z = jax.random.normal(key, mean.shape, mean.dtype)
        parts = [-jnp.exp(-0.5 * log_variance) * z, 0.5 * (1 - z**2)]
        return _like(f, jnp.concatenate(parts, axis=-1))

    return _analytic(name, losses, product, sample_gradient)


# -- counts ------------------------------------------------------------------------------------


def poisson() -> Likelihood:
    """Counts of mean exp(f): the output is the logarithm of the rate; one array.

    With its normaliser log(y!); its Hessian is diag(exp(f)). Loss terms are single outputs.
    """

    def log_rate(f: PyTree) -> Float[Array, "..."]:
        return _one_array(_real(f), "poisson")

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        s = log_rate(f)
        counts = _one_target_like(s, y)
        return jnp.exp(s) - counts * s + jax.scipy.special.gammaln(counts + 1)

    def product(f: PyTree, w: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.exp(0.5 * log_rate(f)) * x, w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        rate = jnp.exp(log_rate(f))
        return _like(f, rate - jax.random.poisson(key, rate).astype(rate.dtype))

    return _analytic("poisson", losses, product, sample_gradient)


# -- classes -----------------------------------------------------------------------------------


def categorical(*, ignore_index: int | None = None, label_smoothing: float = 0.0) -> Likelihood:
    """Softmax cross-entropy over the last axis; terms have the other axes.

    Targets are class numbers of the shape of the terms, or probabilities of that of the output. The
    Hessian is ``diag(p) - p p^T`` whatever the target, of rank C - 1: so many columns a term.

    Args:
        ignore_index: Class number that marks terms which do not count, such as padding.
        label_smoothing: What part of a target is spread evenly over all classes. It changes the
            loss and ``empirical``; ``type2`` does not depend on targets, and ``mc`` draws them from
            the model.

    Raises:
        ValueError: If ``label_smoothing`` is not in [0, 1).
    """
    _check_smoothing(label_smoothing)

    def log_probabilities(f: PyTree) -> Float[Array, "... C"]:
        return jax.nn.log_softmax(_one_array(_real(f), "cross_entropy"))

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        log_p = log_probabilities(f)
        q = _class_probabilities(y, log_p)
        if label_smoothing:
            q = (1 - label_smoothing) * q + label_smoothing / q.shape[-1]
        return -jnp.sum(q * log_p, axis=-1)

    def space(f: PyTree) -> Float[Array, "... columns"]:
        return _one_array(_real(f), "cross_entropy")[..., 1:]

    def product(f: PyTree, w: Float[Array, "... columns"]) -> PyTree:
        """S = diag(s) Q with s = sqrt(p) and Q an orthonormal basis of s's complement.

        Q is the last columns of the Householder reflection that takes e_1 to -s.
        """
        s = jnp.exp(0.5 * log_probabilities(f))  # differentiable where p underflows
        first, rest = s[..., :1], s[..., 1:]
        along = jnp.sum(rest * w, axis=-1, keepdims=True)
        return _like(f, s * jnp.concatenate([-along, w - rest * (along / (1 + first))], axis=-1))

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        log_p = log_probabilities(f)
        drawn = jax.random.categorical(key, log_p)
        return _like(f, jnp.exp(log_p) - jax.nn.one_hot(drawn, log_p.shape[-1], dtype=log_p.dtype))

    def counted(f: PyTree, y: PyTree) -> Bool[Array, "*terms"]:
        logits = _one_array(f, "cross_entropy")
        labels = jnp.asarray(_only(y))
        if labels.shape == logits.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
            msg = (
                f"`ignore_index` needs targets that are integer classes of shape "
                f"{logits.shape[:-1]} an example; found {labels.dtype} of shape {labels.shape}."
            )
            raise ValueError(msg)
        return jnp.asarray(labels.reshape(logits.shape[:-1]) != ignore_index)

    return _analytic(
        "cross_entropy", losses, product, sample_gradient, space=space,
        weights=None if ignore_index is None else counted,
    )  # fmt: skip


def _class_probabilities(y: PyTree, logits: Float[Array, "... C"]) -> Float[Array, "... C"]:
    target = jnp.asarray(_only(y))
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


def bernoulli(*, label_smoothing: float = 0.0) -> Likelihood:
    """Binary cross-entropy on logits: every output a label of its own (multi-label).

    Targets are 0, 1, or probabilities, in the shape of the output. Loss terms are single outputs.

    Args:
        label_smoothing: What part of a target is spread evenly over true and false; see
            `categorical`.

    Raises:
        ValueError: If ``label_smoothing`` is not in [0, 1).
    """
    _check_smoothing(label_smoothing)

    def logits(f: PyTree) -> Float[Array, "..."]:
        return _one_array(_real(f), "binary_cross_entropy")

    def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
        x = logits(f)
        target = _one_target_like(x, y)
        if label_smoothing:
            target = (1 - label_smoothing) * target + 0.5 * label_smoothing
        return jax.nn.softplus(x) - target * x

    def product(f: PyTree, w: PyTree) -> PyTree:
        x = logits(f)
        deviation = jnp.sqrt(jax.nn.sigmoid(x) * jax.nn.sigmoid(-x))
        return jax.tree.map(lambda u: deviation * u, w)

    def sample_gradient(key: Key[Array, ""], f: PyTree) -> PyTree:
        p = jax.nn.sigmoid(logits(f))
        return _like(f, p - jax.random.bernoulli(key, p).astype(p.dtype))

    return _analytic("binary_cross_entropy", losses, product, sample_gradient)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        msg = f"`label_smoothing` must be in [0, 1), found {label_smoothing}."
        raise ValueError(msg)


# -- any other loss ----------------------------------------------------------------------------


def _from_callable(loss_fn: Callable[[PyTree, PyTree], Any]) -> Likelihood:
    """A loss with no known sampler."""

    def loss(f: PyTree, y: PyTree) -> Float[Array, ""]:
        value = jnp.asarray(loss_fn(f, y))
        if value.size != 1:
            msg = f"`loss_fn` must return one number an example, found shape {value.shape}; sum it."
            raise ValueError(msg)
        return value.reshape(())

    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return _by_differentiation(f"the callable {name}", loss, None)


def _by_differentiation(
    name: str,
    losses: LossFunction,
    sample_gradient: Callable[[Key[Array, ""], PyTree], PyTree] | None,
) -> Likelihood:
    """Hessians by automatic differentiation, one block a term, and their roots by eigenvalues."""

    def blocks(f: PyTree, y: PyTree) -> Float[Array, "terms n n"]:
        """Columns, as rows, of a root of every term's Hessian in its n outputs."""
        flat, unravel = ravel_pytree(f)
        terms = math.prod(jax.eval_shape(losses, f, y).shape)
        size = flat.size // max(terms, 1)

        def product(v: Float[Array, " outputs"]) -> Float[Array, " outputs"]:
            return jax.jvp(jax.grad(lambda x: _total(losses(unravel(x), y))), (flat,), (v,))[1]

        # The Hessian is block-diagonal: one unit vector serves all terms at once.
        units = jnp.tile(jnp.eye(size, dtype=flat.dtype), (1, terms))
        hessians = jax.vmap(product)(units).reshape(size, terms, size).transpose(1, 0, 2)
        values, vectors = jnp.linalg.eigh(hessians)
        # Negative curvature is dropped: the result must stay a covariance.
        return jnp.sqrt(jnp.clip(values, 0.0))[..., None] * vectors.mT

    def root(f: PyTree, y: PyTree) -> PyTree:
        f = _real(f)
        found = blocks(f, y)
        terms, size, _ = found.shape
        spread = jnp.eye(terms, dtype=found.dtype)[:, None, :, None] * found[:, :, None, :]
        _, unravel = ravel_pytree(f)
        return jax.vmap(unravel)(spread.reshape(terms * size, terms * size))

    def sketch(key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
        f = _real(f)
        found = blocks(f, y)
        signs = jax.random.rademacher(key, found.shape[:2], found.dtype)
        combined = jnp.einsum("tr,trn->tn", signs, found, precision=_HIGHEST)
        return ravel_pytree(f)[1](combined.reshape(-1))

    return Likelihood(name, losses, root, sample_gradient, sketch)


NAMED = {
    "mse": _squared_error(),
    "cross_entropy": categorical(),
    "binary_cross_entropy": bernoulli(),
}
