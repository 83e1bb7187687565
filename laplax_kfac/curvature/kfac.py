"""Data in, curvature out: `kfac`, `ekfac` and `kfoc`, loops over the `accumulator`."""

import functools
import os
from dataclasses import dataclass, fields
from typing import Any, Unpack

from jaxtyping import PyTree

from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_flags,
)
from laplax_kfac.capture.batches import (
    Transform,
    batches,
    even_batches,
    require_several_passes,
    require_transform,
    same_number,
)
from laplax_kfac.curvature.accumulator import KFOC_ITERATIONS, accumulator
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.curvature.keeping import Keeper, applied, is_known
from laplax_kfac.curvature.memory import DEFAULT_BATCH_SIZE
from laplax_kfac.curvature.options import OptionKeywords, Options
from laplax_kfac.faults import Placed
from laplax_kfac.fisher import fisher_type_of
from laplax_kfac.likelihood.named import Loss
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.program import ModelFn
from laplax_kfac.progress import BatchBar, showing


class PassKeywords(OptionKeywords, total=False):
    """Keywords of `kfac`: those of `Options`, and how the data are gone through.

    Attributes:
        eigenvalue_correction: Whether to replace the eigenvalues of Kronecker blocks by the exact
            second moments of the gradients in their eigenbases (George et al. 2018, EKFAC).
        optimal_factors: Whether to use the Kronecker product nearest to each exact block (KFOC; see
            `kfoc`).
        iterations: Most steps of the power iteration for optimal factors.
        batch_size: Most examples that are worked on at once; larger batches are split. A CPU works
            on fewer where their memory can then be reused.
        transform: Applied to every batch first, to bring it to one of the forms above.
        progress: Whether to show progress bars: of every pass over the batches, with the time
            left where the data know how many they are, and of the eigendecompositions.
        checkpoint: A file that keeps what is summed up. A later call with the same arguments goes
            on from there, in another process too, and ends with the same bits. Batches that were
            seen are read once more and dropped, so they must come in the same order. A file of
            another fit is refused; nobody removes it at the end.
        checkpoint_every: Batches, of at most ``batch_size`` examples, between two times that the
            file is written; 100 by default.
    """

    eigenvalue_correction: bool
    optimal_factors: bool
    iterations: int
    batch_size: int
    transform: Transform | None
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int | None


@no_type_check
@dataclass(frozen=True)
class _Passes:
    """How the data are gone through; see `PassKeywords`."""

    eigenvalue_correction: bool = False
    optimal_factors: bool = False
    iterations: int = KFOC_ITERATIONS
    batch_size: int = DEFAULT_BATCH_SIZE
    transform: Transform | None = None
    progress: bool = False
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None

    def check(self, options: Options) -> None:
        """Refuse what refines Kronecker factors by gradients where there is no such thing.

        Raises:
            ValueError: If it does, or a number is no positive integer.
            TypeError: If an argument is of another type.
        """
        positive_integer("batch_size", self.batch_size)
        positive_integer("iterations", self.iterations)
        require_flags(
            eigenvalue_correction=self.eigenvalue_correction,
            optimal_factors=self.optimal_factors,
            progress=self.progress,
        )
        require_transform(self.transform)
        refined = options.curvature == "kronecker" and fisher_type_of(options.fisher_type).columns
        for name in ("eigenvalue_correction", "optimal_factors"):
            if getattr(self, name) and not refined:
                msg = (
                    f"`{name}` refines Kronecker blocks by per-example gradients; it needs "
                    "`curvature='kronecker'` and another `fisher_type` than 'forward_only', found "
                    f"{options.curvature!r} and {options.fisher_type!r}."
                )
                raise ValueError(msg)

    def keeper(self) -> Keeper:
        """Keeps what is summed up, and knows what decides about it.

        Raises:
            ValueError: If the file is none of ours, or damaged.
            TypeError: If its path is no path.
        """
        names = ("eigenvalue_correction", "optimal_factors", "iterations", "batch_size")
        choices = {name: int(getattr(self, name)) for name in names}
        return Keeper.of(self.checkpoint, self.checkpoint_every, choices)


@no_type_check
@on_automatic_axes
def kfac(
    model_fn: ModelFn,
    params: PyTree,
    data: object,
    *,
    loss_fn: Loss,
    options: Options | None = None,
    **keywords: Unpack[PassKeywords],
) -> Curvature:
    """Kronecker-factored curvature (Martens & Grosse 2015) of any JAX model.

    One pass over the data, one more with eigenvalue correction. Parameters without a Kronecker
    form get an exact dense or diagonal block; `find_layers` says which, and why.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters, a pytree of arrays.
        data: One batch, ``(input, target)`` or ``{"input": ..., "target": ...}``, or an iterable
            of batches. Examples of a batch with a third key ``"weight"``, an array (N,), count so
            many times.
        loss_fn: A laplax ``LossFn``, its string (``"mse"``, ``"cross_entropy"``,
            ``"binary_cross_entropy"``), a callable ``loss(output, target)`` of one example, or a
            `Likelihood`, such as those in `laplax_kfac.likelihood`. The loss of the data is the
            sum over examples.
        options: What kind of curvature is computed.
        **keywords: How the data are gone through, see `PassKeywords`; and any of the `Options` by
            their names, which change those given.

    Returns:
        The curvature, a sum over the data.

    Raises:
        ValueError: If an option, the data or the model is not of a supported form.
        TypeError: If ``data`` or ``loss_fn`` is of an unsupported type, or a keyword is unknown.
    """
    own = {f.name: keywords.pop(f.name) for f in fields(_Passes) if f.name in keywords}  # type: ignore[misc]
    passes = _Passes(**own)
    options = Options.of(options, keywords)
    accumulate = accumulator(model_fn, params, loss_fn=loss_fn, options=options)
    passes.check(options)
    batch_size = positive_integer("batch_size", passes.batch_size)
    if passes.optimal_factors or passes.eigenvalue_correction:
        require_several_passes(data, "`ekfac`" if passes.eigenvalue_correction else "`kfoc`")
    keeper = passes.keeper()

    def stream(description: str) -> Placed:
        bar = BatchBar(data, description)
        found = same_number(bar.batches(batches(data, passes.transform)), keeper.sizes)
        return Placed(found, lambda found: bar.parts(even_batches(found, batch_size)))

    with showing(passes.progress):
        parts = stream("factors")
        state = accumulate.collect(parts, keeper)
        if is_known(state):  # else an earlier fit has checked it
            accumulate.check(state, parts.places)
        if passes.optimal_factors:
            again = functools.partial(stream, "optimal factors")
            iterations = positive_integer("iterations", passes.iterations)
            found = accumulate.optimise(state, again, iterations=iterations, keeper=keeper)
        else:
            found = applied(accumulate.finalize, state)
        if passes.eigenvalue_correction:
            return accumulate.correct(found, stream("eigenvalues"), keeper)
    return found


@no_type_check
def ekfac(model_fn: ModelFn, params: PyTree, data: object, **options: Any) -> Curvature:
    """Eigenvalue-corrected KFAC (George et al. 2018): `kfac` with ``eigenvalue_correction=True``.

    Its diagonal in the Kronecker eigenbases, and so its trace, is that of the exact curvature.

    Args:
        model_fn: As for `kfac`.
        params: As for `kfac`.
        data: As for `kfac`; it is iterated over twice.
        **options: Keyword arguments of `kfac`.
    """
    return kfac(model_fn, params, data, **{**options, "eigenvalue_correction": True})


@no_type_check
def kfoc(model_fn: ModelFn, params: PyTree, data: object, **options: Any) -> Curvature:
    """The Kronecker product nearest to every exact block: `kfac` with ``optimal_factors=True``.

    Nearest in Frobenius norm (Schnaus et al. 2021; Koroko et al. 2022, arXiv 2201.10285), by a
    power iteration over passes through the data that never forms a block.

    Args:
        model_fn: As for `kfac`.
        params: As for `kfac`.
        data: As for `kfac`; it is iterated over twice a step of the power iteration.
        **options: Keyword arguments of `kfac`.
    """
    return kfac(model_fn, params, data, **{**options, "optimal_factors": True})
