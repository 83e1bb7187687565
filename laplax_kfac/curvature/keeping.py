"""A fit that goes on where it was killed: what it has summed up is kept in a file.

A fit is a sequence of passes over the data, each a sum over batches: the factors; for `kfoc` the
half steps of its power iteration; the corrected eigenvalues. The file holds what the present pass
began with and its sum so far, bit by bit. A later fit of the same finds them, reads the batches
that were seen and drops them, and goes on: it adds up the same numbers in the same order.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from laplax_kfac import files
from laplax_kfac.arguments import no_type_check, positive_integer
from laplax_kfac.capture.batches import WeightedBatch
from laplax_kfac.curvature.identity import of_arrays

Total = TypeVar("Total")
Result = TypeVar("Result")

DEFAULT_EVERY = 100
FACTORS, EIGENVALUES = 0, 10**6
"""Numbers of the first pass and of the last one; those of optimal factors are between."""
KIND = "fit"


@dataclass
class Keeper:
    """Keeps a fit in a file, and knows how far an earlier one came.

    Attributes:
        path: The file; none is kept if None.
        every: Batches between two times that it is written.
        choices: What decides about the numbers beside model, data and `Options`.
        sizes: Numbers of examples of the passes so far.
        found: What an earlier fit left.
        identity: What this fit is of; known from the first batch on.
        now: Number of the present pass, and what it began with.
    """

    path: str | os.PathLike[str] | None = None
    every: int = DEFAULT_EVERY
    choices: Mapping[str, object] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    found: files.Archive | None = None
    identity: dict[str, str] = field(default_factory=dict)
    now: tuple[int, PyTree] = (FACTORS, None)

    @classmethod
    def of(cls, path: Any, every: object, choices: Mapping[str, object]) -> "Keeper":
        """A keeper, with what an earlier fit left in the file.

        Raises:
            ValueError: If the file holds something else, or is damaged, or ``every`` is no
                positive integer, or stands alone.
            TypeError: If ``path`` is no path.
            FileNotFoundError: If the folder of the file does not exist.
        """
        if path is None:
            if every is not None:
                msg = "`checkpoint_every` needs `checkpoint`, the path of a file."
                raise ValueError(msg)
            return cls()
        number = positive_integer("checkpoint_every", DEFAULT_EVERY if every is None else every)
        target = files.file_path("checkpoint", path)
        if files.regular("checkpoint", target) is None:
            if not target.parent.is_dir():
                msg = f"`checkpoint` ({path}): there is no folder {target.parent}; make it first."
                raise FileNotFoundError(msg)
            return cls(path, number, choices)
        found = files.read(path, "checkpoint")
        if found.header.get("kind") != KIND:
            msg = (
                f"`checkpoint` ({path}) holds a {found.header.get('kind')}, no half of a fit: give "
                "a path of its own."
            )
            raise ValueError(msg)
        with files.damaged(path, "checkpoint"):
            sizes = [int(size) for size in found.header["sizes"]]
            stage, batches = found.header["stage"], found.header["batches"]
            if not (type(stage) is type(batches) is int and batches > 0 <= stage):
                msg = f"it was written in pass {stage} after {batches} batches"
                raise ValueError(msg)
        return cls(path, number, choices, sizes, found)

    @property
    def stage(self) -> int:
        """The pass that an earlier fit was in."""
        return FACTORS if self.found is None else int(self.found.header["stage"])

    def recognise(self, identity: dict[str, str]) -> None:
        """Compare what this fit is of, known with the first batch, with what is in the file.

        Raises:
            ValueError: If the file is of another fit.
        """
        self.identity = identity
        if self.found is None:
            return
        left = self.found.header["identity"]
        other = [name for name, text in self.identity.items() if left.get(name) != text]
        if other:
            msg = (
                f"`checkpoint` ({self.path}) is of another fit, which differs in "
                f"{', '.join(other)}. "
                "Remove the file to begin anew, or give another path."
            )
            raise ValueError(msg)

    def restored(self, group: str, like: PyTree) -> PyTree:
        """Arrays of the file in the place of those in a tree, of their shapes and dtypes.

        Raises:
            ValueError: If they are others.
        """
        assert self.found is not None
        leaves, treedef = jax.tree.flatten(like)
        with files.damaged(self.found.path, "checkpoint"):
            kept = [self.found.take(f"{group}/{k}", x.shape, "fiubc") for k, x in enumerate(leaves)]
            if [x.dtype for x in kept] != [x.dtype for x in leaves]:
                msg = "its sums are of another dtype"
                raise ValueError(msg)
        return jax.tree.unflatten(treedef, [jnp.asarray(x) for x in kept])

    def begin(self, stage: int, begun: PyTree) -> PyTree:
        """Begin a pass.

        Args:
            stage: Its number.
            begun: What it begins with, which is kept with its sum; shapes alone where an earlier
                fit was in this pass.

        Returns:
            What it begins with; from the file where shapes alone were known.
        """
        if self.path is None:
            return begun
        self.now = stage, begun if is_known(begun) else self.restored("begun", begun)
        return self.now[1]

    @no_type_check
    def total(
        self,
        data: Iterable[WeightedBatch],
        start: Total,
        step: Callable[[Total, int, WeightedBatch], Total],
        forms: Callable[[WeightedBatch], Sequence[PyTree]],
    ) -> Total:
        """Sum over the present pass; from where the file left off, if it did so in this one.

        Args:
            data: Batches.
            start: The sum of nothing.
            step: (sum, number of a batch, the batch) -> the sum with it.
            forms: Shapes that the sum may have, from the first batch.

        Raises:
            ValueError: If data are not where they were.
        """
        total, done, number = start, 0, -1
        for number, part in enumerate(data):
            if number == 0 and self.found is not None and self.stage == self.now[0]:
                total, done = self._left(forms(part))
            if number + 1 == done:
                self._compare(number, part)
                self.found = None
            if number < done:
                continue
            total = step(total, number, part)
            if self.path is not None and (number + 1) % self.every == 0:
                self._write(number + 1, part, total)
        if number + 1 < done:
            msg = (
                f"`data` had {number + 1} batches, but `checkpoint` ({self.path}) was written "
                f"after {done}: pass the same data, or remove the file."
            )
            raise ValueError(msg)
        return total

    def _left(self, forms: Sequence[PyTree]) -> tuple[Any, int]:
        """The sum in the file, and of how many batches it is."""
        assert self.found is not None
        header = self.found.header
        shapes = [tuple(s) for s in header["shapes"]]
        form = next((f for f in forms if [x.shape for x in jax.tree.leaves(f)] == shapes), forms[0])
        return self.restored("sum", form), int(header["batches"])

    def _compare(self, number: int, part: WeightedBatch) -> None:
        """Refuse data of which the last batch that was seen is another one."""
        assert self.found is not None
        if of_arrays(part) != self.found.header["last"]:
            msg = (
                f"`data` has another batch in the place of number {number + 1}, the last that "
                f"`checkpoint` ({self.path}) has seen: batches must come in the same order, as "
                "those of a shuffled loader with its seed do. Remove the file to begin anew."
            )
            raise ValueError(msg)

    def _write(self, batches: int, part: WeightedBatch, total: PyTree) -> None:
        """Write the file: what the pass began with, and its sum."""
        stage, begun = self.now
        leaves = jax.tree.leaves(total)
        header = {
            "kind": KIND,
            "stage": stage,
            "batches": batches,
            "sizes": self.sizes,
            "identity": self.identity,
            "last": of_arrays(part),
            "shapes": [x.shape for x in leaves],
        }
        arrays = {f"begun/{k}": np.asarray(x) for k, x in enumerate(jax.tree.leaves(begun))}
        arrays.update({f"sum/{k}": np.asarray(x) for k, x in enumerate(leaves)})
        files.write(self.path, header, arrays, "checkpoint")


def is_known(tree: PyTree) -> bool:
    """Whether a tree has values, and not shapes alone."""
    return not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def applied(function: Callable[..., Result], operand: PyTree) -> Result:
    """A function's value; its shapes alone where only shapes of the operand are known."""
    if is_known(operand):
        return function(operand)
    shapes: Result = jax.eval_shape(function, operand)
    return shapes


NOBODY = Keeper()
"""Keeps nothing."""
