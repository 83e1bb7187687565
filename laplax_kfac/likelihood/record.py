"""A likelihood: what curvature needs to know of a loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from laplax_kfac.arguments import no_type_check, require_callable
from laplax_kfac.likelihood.differentiation import differentiated
from laplax_kfac.likelihood.pieces import LossFunction, gradient_of, real, times, total_of
from laplax_kfac.summaries import summarised


@summarised
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
        faults: (f, y) -> what is wrong with the values of a target: a text that says what, and what
            to do -> an array of booleans in the shape of the terms, or of their leading axes. The
            texts are the same for all targets; of the output only the shape and dtype are known.
            None finds fault with none.
        squared_error: Whether the loss is the squared error, so that it is the likelihood of a
            Gaussian whose noise variance the evidence may choose.
    """

    name: str
    losses: LossFunction
    hessian_root: Callable[[PyTree, PyTree], PyTree]
    sample_gradient: Callable[[Key[Array, ""], PyTree], PyTree] | None = None
    sketch: Callable[[Key[Array, ""], PyTree, PyTree], PyTree] | None = None
    weights: Callable[[PyTree, PyTree], PyTree] | None = None
    faults: Callable[[PyTree, PyTree], dict[str, PyTree]] | None = None
    squared_error: bool = False

    @classmethod
    @no_type_check
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
            TypeError: If a function cannot be called.
        """
        for argument, function in (
            ("log_prob", log_prob),
            ("sample", sample or log_prob),
            ("hessian_root", hessian_root or log_prob),
        ):
            require_callable(argument, function, "a function of one example")

        def losses(f: PyTree, y: PyTree) -> Float[Array, "*terms"]:
            value = -jnp.asarray(log_prob(real(f), y))
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
            return gradient_of(losses, f, sample(key, real(f)))

        drawn = None if sample is None else sample_gradient
        if hessian_root is not None:
            return cls(name, losses, hessian_root, drawn)
        root, sketch = differentiated(losses)
        return cls(name, losses, root, drawn, sketch)

    def loss(self, f: PyTree, y: PyTree) -> Float[Array, ""]:
        """The loss of an example: the weighted sum of its terms."""
        terms = self.losses(f, y)
        return total_of(terms if self.weights is None else times(self.weights(f, y), terms))

    def check(self, f: PyTree, y: PyTree) -> None:
        """Refuse shapes and dtypes that do not fit each other; values are not looked at.

        Args:
            f: Output of an example, or its ``jax.ShapeDtypeStruct``.
            y: Its target, likewise.

        Raises:
            ValueError: If the loss cannot be computed for them.
        """
        leaves = jax.tree.leaves((f, y))
        shapes = [jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (f, y)]
        found = f"for outputs {shapes[0]} and targets {shapes[1]} an example"
        if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves):
            msg = f"A loss ({self.name}) needs real outputs and targets; found {found[4:]}."
            raise ValueError(msg)
        try:
            jax.eval_shape(self.loss, f, y)
        except ValueError as error:
            if "`" in str(error):
                raise
            msg = f"`loss_fn` ({self.name}) cannot be computed {found}: {error}"
            raise ValueError(msg) from error
        except TypeError as error:
            msg = f"`loss_fn` ({self.name}) cannot be computed {found}: {error}"
            raise ValueError(msg) from error

    def gradient(self, f: PyTree, y: PyTree) -> PyTree:
        """Gradient of the loss in the model's output at the observed target."""
        gradient = gradient_of(self.losses, f, y)
        return gradient if self.weights is None else times(self.weights(f, y), gradient)

    def num_outputs(self, f: PyTree, y: PyTree) -> Float[Array, ""]:
        """Number of scalar outputs, each counted with the weight of its term."""
        ones = jax.tree.map(lambda o: jnp.ones(o.shape), f)
        return total_of(ones if self.weights is None else times(self.weights(f, y), ones))

    def log_prob(self, f: PyTree, y: PyTree) -> Float[Array, ""]:
        """Minus the loss, and for ``mse`` the constant of its Gaussian, of variance 1/2."""
        constant = 0.5 * math.log(math.pi) * self.num_outputs(f, y) if self.squared_error else 0.0
        return -self.loss(f, y) - constant
