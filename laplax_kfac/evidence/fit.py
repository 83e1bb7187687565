"""How well the trained parameters fit the data: all that the evidence needs of the data."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt

from laplax_kfac import pytrees
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_choice,
    require_flags,
    require_positive,
)
from laplax_kfac.capture.batches import (
    Batch,
    Transform,
    batches,
    even_batches,
    first_example,
    require_transform,
    to_arrays,
)
from laplax_kfac.capture.checks import all_finite, faults_of
from laplax_kfac.capture.examples import map_examples
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.faults import NONFINITE, NOT_FINITE, Context, Fault, Faults, Placed, added
from laplax_kfac.likelihood.named import Loss, resolve_likelihood
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.independence import require_independent
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.program import ModelFn, per_example, require_model
from laplax_kfac.posterior.prior import Scalar

LOSSES = Fault("losses", NOT_FINITE)


@pytrees.register
@dataclass(frozen=True)
class DataFit:
    """How well the trained parameters fit the data: all that the evidence needs of the data.

    Attributes:
        loss: Sum of the loss over the data.
        num_outputs: Number of scalar outputs over the data, N C; weighted as the loss is.
        gaussian: Whether the loss is ``mse``, so that it is a likelihood only with a noise
            variance. (`likelihood.gaussian` has one, and needs none here.)
        temperature: What loss and number were divided by; None for 1.
    """

    loss: Float[Array, ""]
    num_outputs: Float[Array, ""]
    gaussian: bool = field(metadata={"static": True})
    temperature: Scalar | None = None

    @no_type_check
    def at_temperature(self, temperature: Scalar | None) -> "DataFit":
        """The fit of the likelihood to the power 1 / temperature, its constants with it.

        With it the evidence is that of a tempered (cold or warm) posterior.

        Args:
            temperature: Positive; None leaves the fit as it is.

        Raises:
            ValueError: If it is not positive and finite.
            TypeError: If it is no number.
        """
        if temperature is None:
            return self
        require_positive("temperature", temperature, shape=())
        loss, number = self.loss / temperature, self.num_outputs / temperature
        total = temperature if self.temperature is None else self.temperature * temperature
        return DataFit(loss, number, self.gaussian, total)

    def log_likelihood(self, noise_variance: Scalar | None = None) -> Float[Array, ""]:
        """Fit, log p(D | theta); ``mse`` is a Gaussian, of variance 1/2 where none is given."""
        if not self.gaussian:
            return -self.loss
        variance = 0.5 if noise_variance is None else noise_variance
        normaliser = 0.5 * self.num_outputs * jnp.log(2 * math.pi * variance)
        return -self.loss / (2 * variance) - normaliser

    def loss_factor(self, noise_variance: Scalar | None = None) -> Scalar:
        """The negative log-likelihood over the loss, up to its constant."""
        factor = 1.0 / (2 * noise_variance) if noise_variance is not None else 1.0
        return factor if self.temperature is None else factor / self.temperature


FitOfBatch = Callable[[PyTree, Batch, Float[Array, " N"], UInt[Array, ""]], tuple[DataFit, Faults]]
"""(params, batch, weights of its examples, its number) -> its fit, and its faults."""


@no_type_check
@on_automatic_axes
def data_fit(
    model_fn: ModelFn,
    params: PyTree,
    data: object,
    *,
    loss_fn: Loss,
    vmap_over_data: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    transform: Transform | None = None,
    nonfinite: str = "error",
) -> DataFit:
    """Sum the loss over the data, in one streaming pass.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters.
        data: One batch or an iterable of batches, as for `kfac`.
        loss_fn: As for `kfac`. A callable must be a negative log-likelihood, with its constants;
            so are the losses of `likelihood`.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        batch_size: Most examples that are worked on at once.
        transform: Applied to every batch first.
        nonfinite: ``"error"`` refuses a loss that is NaN or infinite, and names the first batch;
            ``"keep"`` returns it as it is.

    Raises:
        ValueError: If ``batch_size`` is no positive integer, the data, the model or the loss is
            not of a supported form, the data hold what is no target, or the loss is not finite.
        TypeError: If an argument is of an unsupported type.
    """
    require_choice("nonfinite", nonfinite, NONFINITE)
    require_flags(vmap_over_data=vmap_over_data)
    batch_size = positive_integer("batch_size", batch_size)
    require_model(model_fn)
    ParameterSpace.of(params)
    require_transform(transform)
    of_batch = jax.jit(fit_of_batch(model_fn, loss_fn, vmap_over_data=vmap_over_data))

    def checked() -> Iterator[Batch]:
        for number, batch in enumerate(batches(data, transform)):
            if number == 0 and not vmap_over_data:
                require_independent(model_fn, params, first_example(to_arrays(batch)))
            yield batch

    parts = Placed(checked(), lambda stream: even_batches(stream, batch_size))
    found = summed_fit(of_batch, params, parts, nonfinite)
    count = found.num_outputs
    if not isinstance(count, jax.core.Tracer) and float(count) == 0:
        msg = "All weights in `data` are zero: there is nothing to fit."
        raise ValueError(msg)
    return found


def summed_fit(of_batch: FitOfBatch, params: PyTree, parts: Placed, nonfinite: str) -> DataFit:
    """The fit to the data of all parts; see `data_fit`."""
    found = (of_batch(params, *part, jnp.uint32(number)) for number, part in enumerate(parts))
    fit, faults = functools.reduce(added, found)
    faults.check(nonfinite, Context(params, parts.places))
    return fit


@no_type_check
def fit_of_batch(model_fn: ModelFn, loss_fn: Loss, *, vmap_over_data: bool) -> FitOfBatch:
    """The fit to one batch, and its faults.

    A function of the parameters, the batch, the weights of its examples, and its number.
    """
    likelihood = resolve_likelihood(loss_fn)
    single = per_example(model_fn, vmap_over_data=vmap_over_data)

    def fit(
        params: PyTree, batch: Batch, weights: Float[Array, " N"], number: UInt[Array, ""]
    ) -> tuple[DataFit, Faults]:
        x, y = (first_example(batch, part) for part in ("input", "target"))
        output = jax.eval_shape(single, params, x)
        likelihood.check(output, y)

        def one(example: tuple[PyTree, PyTree], *, sequential: bool = False) -> tuple[Array, Array]:
            del sequential  # one example has nothing to vmap
            x, y = example
            out = single(params, x)
            return likelihood.loss(out, y), likelihood.num_outputs(out, y)

        losses, sizes = map_examples(one, (batch["input"], batch["target"]))
        counted = jnp.where(weights == 0, 0.0, losses * weights)
        total = DataFit(jnp.sum(counted), jnp.sum(sizes * weights), likelihood.squared_error)
        found = faults_of(likelihood, output, batch, weights, {LOSSES: ~all_finite(counted)})
        return total, Faults.of_batch(found, number)

    return fit


@no_type_check
def require_fit(log_likelihood: object, noise_variance: Scalar | None) -> None:
    """Refuse what is no `DataFit`, and a noise variance that does not belong to it.

    Raises:
        TypeError: If ``log_likelihood`` is no `DataFit`.
        ValueError: If there is a noise variance and the loss is not ``mse``, or it is not positive.
    """
    if not isinstance(log_likelihood, DataFit):
        msg = f"`log_likelihood` must come from `data_fit`, got {type(log_likelihood).__name__}."
        raise TypeError(msg)
    if noise_variance is not None and not log_likelihood.gaussian:
        msg = "`noise_variance` belongs to the Gaussian likelihood of `mse`; leave it out here."
        raise ValueError(msg)
    if noise_variance is not None:
        require_positive("noise_variance", noise_variance, shape=())
