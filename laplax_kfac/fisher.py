"""Fisher types: which vectors are pulled back from the model's output, and how many.

With H the Hessian of the loss in the output, a Fisher type gives vectors v_1 ... v_R at the output
whose outer products sum to H, or to an estimate of it. A new type is one more record, registered
beside the others; nobody else asks which type it is.

==================  ============================================================================
``"type2"``         a square root of the exact loss Hessian: the generalised Gauss-Newton matrix
``"mc"``            loss gradients at targets drawn from the model's own likelihood
``"empirical"``     the loss gradient at the observed target
``"forward_only"``  none: the identity stands for the sum of ``g g^T`` at every position
==================  ============================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac.arguments import require_choice
from laplax_kfac.likelihood.pieces import floating, times
from laplax_kfac.likelihood.record import Likelihood
from laplax_kfac.summaries import summarised


@summarised
@dataclass(frozen=True)
class FisherType:
    """One way to choose the vectors; the functions are for one example.

    Attributes:
        name: What users call it.
        columns: (columns, key, f, y) -> the R vectors like the output f, stacked in front; see
            `Columns` for what the first argument holds. None pulls nothing back.
        num_columns: (columns, f, y) -> R, of shapes and dtypes alone.
        needs_targets: Whether the vectors depend on the observed targets, other than through the
            Hessian of a loss that does.
        random: Whether they depend on the key.
        is_root: Whether their outer products sum to H without randomness, so that the unit vectors
            may be pulled back in their place and combined.
        takes_sketches: Whether ``sketches`` may ask for random combinations instead.
        degree: Power of the loss that the curvature scales with: 2 where the vectors are gradients
            of the loss that the data alone give; those of the model's own likelihood grow with its
            root.
    """

    name: str
    columns: Callable[["Columns", Key[Array, ""], PyTree, PyTree], PyTree] | None
    num_columns: Callable[["Columns", PyTree, PyTree], int]
    needs_targets: bool = False
    random: bool = False
    is_root: bool = False
    takes_sketches: bool = False
    degree: int = 1


@summarised
@dataclass(frozen=True)
class Columns:
    """The vectors that are pulled back for an example: those of a Fisher type for a loss.

    Attributes:
        likelihood: The loss.
        fisher: The Fisher type.
        mc_samples: Draws an example, for types that draw targets.
        sketches: For ``"type2"``: k random combinations S w / sqrt(k) of the columns S of the root,
            with independent signs w. Their outer products sum to H in expectation, with a mean
            squared error in Frobenius norm of at most ``(tr(H)^2 + ||H||^2) / k``, at the cost of
            k columns. A root that has no more than k columns is taken itself.
    """

    likelihood: Likelihood
    fisher: FisherType
    mc_samples: int = 1
    sketches: int | None = None

    def vectors(self, key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
        """The R vectors; their outer products sum to H, or to an estimate of it.

        Args:
            key: For types that are random, and for sketches.
            f: The model's output for one example.
            y: Its target.

        Raises:
            ValueError: If the loss has no sampler and the type draws targets.
        """
        assert self.fisher.columns is not None
        return self.fisher.columns(self, key, f, y)

    def number(self, f: PyTree, y: PyTree) -> int:
        """How many there are, R, for outputs and targets of these shapes."""
        return self.fisher.num_columns(self, f, y)

    @property
    def pull_back(self) -> bool:
        """Whether anything is pulled back."""
        return self.fisher.columns is not None

    def are_root(self, f: PyTree, y: PyTree) -> bool:
        """Whether the vectors are a root of H itself, and not random combinations of its columns.

        Sketches are there to avoid as many pullbacks as there are unit vectors.
        """
        if not self.fisher.is_root:
            return False
        return self.sketches is None or self.sketches >= _size_of_root(self, f, y)


# -- type2 -------------------------------------------------------------------------------------


def _size_of_root(columns: Columns, f: PyTree, y: PyTree) -> int:
    root = jax.eval_shape(columns.likelihood.hessian_root, f, y)
    return max(1, int(jax.tree.leaves(root)[0].shape[0]))


def _root(columns: Columns, key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
    likelihood, sketches = columns.likelihood, columns.sketches
    if sketches is None or sketches >= _size_of_root(columns, f, y):
        vectors = likelihood.hessian_root(f, y)
        if not len(jax.tree.leaves(vectors)[0]):  # an example has one vector at least
            vectors = jax.tree.map(lambda v: jnp.zeros((1, *v.shape[1:]), v.dtype), vectors)
    else:
        vectors = _draws(lambda k: _sketch(likelihood, k, f, y), key, sketches)
    return _weighted(likelihood, vectors, f, y)


def _num_in_root(columns: Columns, f: PyTree, y: PyTree) -> int:
    exact = _size_of_root(columns, f, y)
    return exact if columns.sketches is None else min(exact, columns.sketches)


def _sketch(likelihood: Likelihood, key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
    """One random combination S w of the columns of the root, with random signs w."""
    if likelihood.sketch is not None:
        return likelihood.sketch(key, f, y)
    root = jax.tree.map(jnp.asarray, likelihood.hessian_root(f, y))
    signs = jax.random.rademacher(key, (len(jax.tree.leaves(root)[0]),))

    def combined(s: Float[Array, "R *output"]) -> Float[Array, "*output"]:
        return jnp.tensordot(signs.astype(s.dtype), s, 1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(combined, root)


# -- mc ----------------------------------------------------------------------------------------


def _sampled(columns: Columns, key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
    likelihood, sample = columns.likelihood, columns.likelihood.sample_gradient
    if sample is None:
        msg = (
            f"`fisher_type='mc'` needs targets drawn from the likelihood, but `loss_fn` "
            f"({likelihood.name}) defines none; use 'type2' or 'empirical', or a named loss."
        )
        raise ValueError(msg)
    return _weighted(likelihood, _draws(lambda k: sample(k, f), key, columns.mc_samples), f, y)


def _draws(draw: Callable[[Key[Array, ""]], PyTree], key: Key[Array, ""], number: int) -> PyTree:
    """Independent vectors, stacked in front, whose outer products sum to the mean of one."""
    drawn = jax.vmap(draw)(jax.random.split(key, number))
    return jax.tree.map(lambda v: v / jnp.sqrt(jnp.asarray(number, v.dtype)), drawn)


def _weighted(likelihood: Likelihood, vectors: PyTree, f: PyTree, y: PyTree) -> PyTree:
    """Vectors of terms that count w_t: those of terms that count once, times sqrt(w_t).

    The outer products of both sum to w_t H_t, and only to that, for H has no entries between terms.
    """
    if likelihood.weights is None:
        return vectors
    roots = jax.tree.map(lambda w: jnp.sqrt(floating(w)), likelihood.weights(f, y))
    return jax.vmap(lambda v: times(roots, v))(vectors)


# -- empirical ---------------------------------------------------------------------------------


def _observed(columns: Columns, key: Key[Array, ""], f: PyTree, y: PyTree) -> PyTree:
    del key
    return jax.tree.map(lambda g: g[None], columns.likelihood.gradient(f, y))


# -- the registry ------------------------------------------------------------------------------

FISHER_TYPES: dict[str, FisherType] = {}


def register(fisher: FisherType) -> None:
    """Let users choose a Fisher type by its name; a later one of the same name wins."""
    FISHER_TYPES[fisher.name] = fisher


def fisher_type_of(name: object) -> FisherType:
    """The Fisher type that users call by a name.

    Raises:
        ValueError: If there is none.
    """
    require_choice("fisher_type", name, FISHER_TYPES)
    return FISHER_TYPES[str(name)]


register(FisherType("type2", _root, _num_in_root, is_root=True, takes_sketches=True))
register(FisherType("mc", _sampled, lambda columns, *_: columns.mc_samples, random=True))
register(FisherType("empirical", _observed, lambda *_: 1, needs_targets=True, degree=2))
register(FisherType("forward_only", None, lambda *_: 0))
