"""When the evidence is computed during training, and the passes over the data that it takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from laplax_kfac.arguments import no_type_check, positive_integer
from laplax_kfac.capture.batches import (
    Transform,
    WeightedBatch,
    batches,
    even_batches,
    to_arrays,
)
from laplax_kfac.capture.batches import batch_size as size_of
from laplax_kfac.curvature.accumulator import Accumulator
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.evidence.fit import DataFit, FitOfBatch, summed_fit
from laplax_kfac.faults import Placed


@no_type_check
@dataclass(frozen=True)
class Schedule:
    """When steps on the evidence are made; see `marglik_training`."""

    epochs: int
    burn_in: int
    every: int
    hyper_steps: int
    patience: int | None = None

    def check(self) -> None:
        """Refuse a schedule without an evidence in it.

        Raises:
            ValueError: If it is one.
        """
        for name, value, least in (
            ("epochs", self.epochs, 1),
            ("every", self.every, 1),
            ("hyper_steps", self.hyper_steps, 0),
            ("burn_in", self.burn_in, 0),
            *([("patience", self.patience, 1)] if self.patience is not None else []),
        ):
            positive_integer(name, value, least)
        if self.burn_in + self.every > self.epochs:
            msg = (
                f"No evidence is computed in {self.epochs} epochs with burn_in={self.burn_in} and "
                f"every={self.every}: `burn_in` + `every` must not exceed `epochs`."
            )
            raise ValueError(msg)

    def has_evidence(self, epoch: int) -> bool:
        """Whether the evidence is computed after an epoch, counted from 1."""
        return epoch > self.burn_in and (epoch - self.burn_in) % self.every == 0


@dataclass(frozen=True)
class Passes:
    """Passes over the data of a training run.

    Attributes:
        data: One batch, or an iterable of batches.
        transform: Applied to every batch first.
        batch_size: Most examples of a batch.
        accumulate: The accumulator of the curvature.
        of_batch: (params, batch, weights, number) -> the fit to one batch, and its faults.
        eigenvalue_correction: Whether the curvature is EKFAC.
    """

    data: object
    transform: Transform | None
    batch_size: int
    accumulate: Accumulator
    of_batch: FitOfBatch
    eigenvalue_correction: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "of_batch", jax.jit(self.of_batch))

    def stream(self) -> Placed:
        """The batches with their weights."""
        found = batches(self.data, self.transform)
        return Placed(found, lambda stream: even_batches(stream, self.batch_size))

    def shuffled(self, key: Key[Array, ""]) -> Iterable[WeightedBatch]:
        """Those of one epoch: of a single batch in a new order, of an iterable as they come."""
        if not isinstance(self.data, tuple | Mapping):
            return self.stream()
        (batch,) = batches(self.data, self.transform)
        arrays = to_arrays(batch)
        order = np.asarray(jax.random.permutation(key, size_of(arrays)))
        return even_batches([jax.tree.map(lambda x: x[order], arrays)], self.batch_size)

    def curvature_at(self, params: PyTree, nonfinite: str = "keep") -> Curvature:
        """The curvature at some parameters; those of a run that diverges are kept as they are."""
        settings = replace(self.accumulate.settings, nonfinite=nonfinite)
        here = replace(self.accumulate.at(params), settings=settings)
        parts = self.stream()
        state = here.collect(parts)
        here.check(state, parts.places)
        curvature = here.finalize(state)
        return here.correct(curvature, self.stream()) if self.eigenvalue_correction else curvature

    def fit_at(self, params: PyTree, nonfinite: str = "keep") -> DataFit:
        """The fit at some parameters."""
        return summed_fit(self.of_batch, params, self.stream(), nonfinite)
