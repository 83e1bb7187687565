"""Faults of data: found within a compiled pass over them, and read once, at its end.

To look at a value of every batch would stop the device with every batch. So a pass keeps, with its
sums, a few integers: the first batch that had each fault, as ``LATEST - number``, and 0 if there
was none. The earliest batch has the largest of them: faults of two parts of the data are combined
by the maximum, and zeros are the neutral element, as they are of sums.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PyTree

from laplax_kfac import jaxprs, pytrees

LATEST = int(np.iinfo(np.int32).max)
NONFINITE = ("error", "keep")
NOT_FINITE = "numbers that are not finite"
"""What likelihoods call targets that are NaN or infinite."""


class Fault(NamedTuple):
    """One thing that may be wrong.

    Attributes:
        where: ``"inputs"``, ``"targets"``, ``"weights"``, ``"losses"``, or ``"sums"`` over batches.
        text: What is wrong there, and what to do.
    """

    where: str
    text: str

    @property
    def is_nonfinite(self) -> bool:
        """Whether it is that numbers are not finite, which users may want to keep."""
        return self.text == NOT_FINITE


class Place(NamedTuple):
    """Where a part of the data is from: the number of its batch, and its examples there."""

    batch: int
    first: int
    size: int


Part = tuple[PyTree, Float[Array, " N"]]
"""A part of the data: a batch, and the weights of its examples."""


class Placed(Iterator[Part]):
    """Parts that batches are split into, which remember where they are from.

    Attributes:
        places: Of all parts so far.
    """

    def __init__(
        self, stream: Iterable[PyTree], split: Callable[[Iterable[PyTree]], Iterable[Part]]
    ) -> None:
        self.places: list[Place] = []
        self._batch, self._taken = 0, 0
        self._parts = iter(split(self._counted(stream)))

    def _counted(self, stream: Iterable[PyTree]) -> Iterator[PyTree]:
        for number, batch in enumerate(stream):
            self._batch, self._taken = number, 0
            yield batch

    def __next__(self) -> Part:
        """The next part."""
        part = next(self._parts)
        size = len(part[1])
        self.places.append(Place(self._batch, self._taken, size))
        self._taken += size
        return part


@pytrees.register
@dataclass(frozen=True)
class Faults:
    """What a pass over data found wrong, and where first.

    Attributes:
        first: For every fault `LATEST` less the number of the first batch with it; 0 for none.
        of: The faults.
    """

    first: Int[Array, " faults"]
    of: tuple[Fault, ...] = field(metadata={"static": True})

    @classmethod
    def none(cls) -> "Faults":
        """Those of no data at all."""
        return cls(jnp.zeros(0, jnp.int32), ())

    @classmethod
    def of_batch(
        cls, found: Mapping[Fault, Bool[Array, ""]], number: Integer[Array, ""]
    ) -> "Faults":
        """Those of one batch: which it has, and its number."""
        code = LATEST - number.astype(jnp.int32)
        return cls(jnp.where(jnp.stack(list(found.values())), code, 0), tuple(found))

    def __or__(self, other: "Faults") -> "Faults":
        """Those of both parts of the data."""
        return Faults(jnp.maximum(self.first, other.first), self.of)

    def numbers(self) -> dict[Fault, int]:
        """The faults there are, and the first batch with each; none while they are traced."""
        if jaxprs.is_traced(self):
            return {}
        codes = np.asarray(self.first)
        return {f: LATEST - int(code) for f, code in zip(self.of, codes, strict=True) if code}

    def check(self, nonfinite: str, context: "Context") -> None:
        """Refuse what is wrong; the numbers are read here, once, and not while they are traced.

        Args:
            nonfinite: ``"error"``, or ``"keep"`` to let numbers pass that are not finite.
            context: What errors tell of.

        Raises:
            ValueError: If there is a fault.
        """
        found = self.numbers()
        for fault, number in found.items():
            if not fault.is_nonfinite:
                first = context.first(number)
                msg = f"The {fault.where} of `data` hold {fault.text}. {first}"
                raise ValueError(msg)
        if found and nonfinite == "error":
            where = [fault.where for fault in found]
            raise ValueError(context.not_finite(where, min(found.values())))


@dataclass(frozen=True)
class Context:
    """What errors about faults tell of.

    Attributes:
        params: The parameters.
        places: Where the parts of the data are from, if they are no whole batches.
        layers: Finds names of layers that are affected.
    """

    params: PyTree
    places: Sequence[Place] = ()
    layers: Callable[[], list[str]] = list

    def first(self, number: int) -> str:
        """Where a fault was met first."""
        if not self.places:
            return f"The first is in batch {number} (counted from 0)."
        place, after = self.places[number], self.places[number + 1 :][:1]
        text = f"The first is in batch {place.batch} (counted from 0)"
        if place.first or (after and after[0].batch == place.batch):
            text += f", among its examples {place.first} to {place.first + place.size - 1}"
        return f"{text}."

    def not_finite(self, where: Sequence[str], number: int) -> str:
        """What to say of numbers that are not finite, of the inputs or what was made of them."""
        keep = "pass nonfinite='keep' for a result with NaN."
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.params)
        wrong = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, x in leaves
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and not jnp.all(jnp.isfinite(x))
        ]
        names = self.layers()
        affected = f" Layers that are affected: {names}." if names else ""
        if wrong:
            return f"The parameters {wrong} hold NaN or infinity.{affected} Train anew, or {keep}"
        known = [name for name in ("targets", "inputs") if name in where]
        cause = (
            f"The {known[0]} of `data` hold NaN or infinity."
            if known
            else "NaN or infinity arise inside the model or its loss, or in squares beyond the "
            "range of the floating-point type: inputs and parameters are finite."
        )
        return (
            f"{cause} {self.first(number)}{affected} Correct or leave out these examples (those of "
            f"weight 0 are left out, whatever is in them), scale what is too large, or {keep}"
        )


def added(first: PyTree, second: PyTree) -> PyTree:
    """The sum of two pytrees of arrays, in which faults are combined by their own rule."""

    def one(a: Array | Faults, b: Array | Faults) -> Array | Faults:
        if isinstance(a, Faults) or isinstance(b, Faults):
            assert isinstance(a, Faults)
            assert isinstance(b, Faults)
            return a | b
        return jnp.add(a, b)

    return jax.tree.map(one, first, second, is_leaf=lambda x: isinstance(x, Faults))
