"""Compiled passes over a batch: capture, and a sum of a function of what it hands on."""

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt

from laplax_kfac import factors, jaxprs, machine
from laplax_kfac.caches import Cache
from laplax_kfac.capture.batches import Batch, pad
from laplax_kfac.capture.batches import batch_size as size_of
from laplax_kfac.capture.capture import capture_batch
from laplax_kfac.capture.checks import all_finite, faults_of
from laplax_kfac.capture.layer_io import Record
from laplax_kfac.capture.shards import Shards
from laplax_kfac.curvature.memory import (
    columns_at_once,
    examples_at_once,
    formed_bytes,
    num_columns_of,
    record_bytes,
)
from laplax_kfac.curvature.options import Settings
from laplax_kfac.curvature.peaks import Peak, PeakWith, require_room
from laplax_kfac.factors import Statistics
from laplax_kfac.factors.gradients import sum_over
from laplax_kfac.faults import NOT_FINITE, Fault, Faults, added
from laplax_kfac.likelihood.named import NAMED
from laplax_kfac.parsing.cache_keys import kept, of_function, of_mesh, of_program
from laplax_kfac.parsing.program import ModelFn, Program

OfRecords = Callable[..., PyTree]
Part = tuple[Batch, Float[Array, " n"], Key[Array, " n"]]
"""Some examples, their weights, and a random key for each."""
SUMS = Fault("sums", NOT_FINITE)


@dataclass(frozen=True)
class Compiled:
    """A parsed model, and its passes over a batch, compiled when first called.

    Attributes:
        program: The parsed model.
        statistics: Arrays -> the statistics of one batch, of wide matrices the upper tiles.
        add_in_place: (leaves of these, arrays) -> the leaves with one batch more; the old ones must
            not be used again.
        whole_statistics: Arrays -> the statistics of one batch.
        add: (leaves of these, arrays) -> leaves with one batch more.
        total: (function, arrays, *operands) -> sum of a function of the records of one batch, and
            the `Faults` of the batch.
        add_total: (function, total, arrays, *operands) -> the total, in place, with a batch more.
        settings: What is pulled back.
        known_shapes: What `shapes` has found so far; a loop over batches asks with every one.
    """

    program: Program
    statistics: Callable[..., Statistics]
    add_in_place: Callable[..., list[Array]]
    whole_statistics: Callable[..., Statistics]
    add: Callable[..., list[Array]]
    total: Callable[..., PyTree]
    add_total: Callable[..., PyTree]
    settings: Settings
    known_shapes: Cache[Statistics] = field(
        default_factory=lambda: Cache(machine.MACHINE.shapes_kept)
    )

    def shapes(self, statistics: Callable[..., Statistics], arrays: "Arrays") -> Statistics:
        """Shapes of statistics; known from the last batch of the same size.

        Raises:
            ValueError: If there is not enough memory for such a batch.
        """
        leaves, treedef = jax.tree.flatten(arrays)
        key = statistics, treedef, of_mesh(), tuple(jax.typeof(x) for x in leaves)

        def make() -> Statistics:
            found = jax.eval_shape(statistics, arrays)
            if not jaxprs.is_traced(arrays):
                require_room(*self.needs(arrays))
            return found

        return self.known_shapes.get(key, make)

    def total_shapes(self, of_records: OfRecords, arrays: "Arrays", *operands: PyTree) -> PyTree:
        """Shapes of `total`.

        Raises:
            ValueError: If there is not enough memory for such a batch.
        """
        if not jaxprs.is_traced((arrays, operands)):
            require_room(*self.needs(arrays, of_records, *operands))
        return jax.eval_shape(self.total, of_records, arrays, *operands)

    def needs(
        self, arrays: "Arrays", of_records: OfRecords | None = None, *operands: PyTree
    ) -> tuple[Settings, int, PeakWith]:
        """What `require_room` asks of a pass over a batch: statistics, or a total of a function."""

        def peak_with(settings: Settings, examples: int) -> Peak:
            passes = self if settings is self.settings else Compiled.of(self.program, settings)
            some = arrays if examples == size_of(arrays.batch) else arrays.shapes_of(examples)
            if of_records is None:
                new = jax.eval_shape(passes.statistics, some)
                return Peak.of(passes.add_in_place, jax.tree.leaves(new), some)
            total = jax.eval_shape(passes.total, of_records, some, *operands)
            return Peak.of(passes.add_total, of_records, total, some, *operands)

        return self.settings, size_of(arrays.batch), peak_with

    def added_to(
        self, state: Statistics, arrays: "Arrays", *, in_place: bool = False
    ) -> Statistics:
        """A state and the statistics of one batch more; in place, the old one is used up.

        Raises:
            ValueError: If there is not enough memory for it.
        """
        statistics, add = self.whole_statistics, self.add
        if in_place:
            statistics, add = self.statistics, self.add_in_place
        new = self.shapes(statistics, arrays)
        if not state.layers:
            state = zeros_of(new)
        factors.require_same_blocks(state, new)
        if in_place and not have_one_form(state, new):  # those of images of another size may differ
            return self.added_to(factors.mirrored(state), arrays)
        leaves, treedef = jax.tree.flatten(state)
        if jaxprs.is_traced((leaves, arrays)):  # nothing can be changed in place
            leaves = jax.tree.leaves(added(state, statistics(arrays)))
        else:
            leaves = add(leaves, arrays)
        return jax.tree.unflatten(treedef, leaves)

    @classmethod
    def of(cls, program: Program, settings: Settings) -> "Compiled":
        """The passes of a model; `add` and its like have their traces from what they add."""
        statistics = jax.jit(functools.partial(_statistics, program, settings))
        whole_statistics = jax.jit(lambda arrays: factors.mirrored(statistics(arrays)))
        total = jax.jit(functools.partial(_total, program, settings), static_argnums=0)

        def add(of: Callable[..., PyTree], leaves: list[Array], arrays: "Arrays") -> list[Array]:
            new = of(arrays)
            old = jax.tree.unflatten(jax.tree.structure(new), leaves)
            return jax.tree.leaves(added(old, new))

        def add_total(
            of_records: OfRecords, old: PyTree, arrays: "Arrays", *operands: PyTree
        ) -> PyTree:
            return added(old, total(of_records, arrays, *operands))

        return cls(
            program,
            statistics, jax.jit(functools.partial(add, statistics), donate_argnums=0),
            whole_statistics, jax.jit(functools.partial(add, whole_statistics)),
            total, jax.jit(add_total, static_argnums=0, donate_argnums=1), settings,
        )  # fmt: skip


def have_one_form(first: Statistics, second: Statistics) -> bool:
    """Whether sums of two statistics can be added entry by entry."""
    ours, theirs = (jax.tree.map(lambda x: x.shape, s.sums) for s in (first, second))
    return bool(ours == theirs)


def compiled_for(
    model_fn: ModelFn,
    program: Program,
    settings: Settings,
    target: PyTree,
    check: Callable[[], None],
) -> Compiled:
    """The passes of a model; those of an earlier fit where nothing they depend on has changed.

    Args:
        model_fn: The model.
        program: What it was parsed to.
        settings: What is pulled back.
        target: Shapes and dtypes of the target of one example.
        check: Refuses a model that cannot be worked with; called if there was no such fit.
    """
    columns = settings.columns
    kind = columns.fisher, columns.mc_samples, columns.sketches, settings.kfac_approx
    # The selection is part of the program, the random key an argument.
    key = (of_program(program), _of_loss(program, settings, target), kind)
    without_arrays = replace(program, consts=[])  # they are arguments: the latest ones

    def make() -> Compiled:
        check()
        return Compiled.of(without_arrays, settings)

    found = kept(
        model_fn,
        program.consts,
        (*key, machine.MACHINE.record_bytes, machine.MACHINE.reused_bytes),
        make,
    )
    return replace(found, program=program)


def _of_loss(program: Program, settings: Settings, target: PyTree) -> Hashable:
    """Equal for losses with the same vectors to pull back; they may be other functions."""
    columns, faults = settings.columns, settings.columns.likelihood.faults
    if any(columns.likelihood is known for known in NAMED.values()):
        return columns.likelihood.name

    def used(f: PyTree, y: PyTree, key: Key[Array, ""]) -> PyTree:
        vectors = columns.vectors(key, f, y) if columns.pull_back else ()
        return vectors, faults(f, y) if faults else {}

    return of_function(used, program.output, target, settings.key)


class Arrays(NamedTuple):
    """What a pass over a batch works on; arguments, so that nothing is compiled in.

    How the batch is spread over devices is one that what is compiled depends on.
    """

    leaves: list[Array]
    consts: list[ArrayLike]
    batch: Batch
    weights: Float[Array, " N"]
    key: Key[Array, ""]
    number: UInt[Array, ""]
    shards: Shards | None = None

    def shapes_of(self, examples: int) -> "Arrays":
        """Shapes with so many examples, on one device."""

        def cut(x: Shaped[Array, "N ..."]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype)

        batch, weights = jax.tree.map(cut, (self.batch, self.weights))
        return self._replace(batch=batch, weights=weights, shards=None)

    def faults(
        self, program: Program, settings: Settings, wrong: dict[Fault, Bool[Array, ""]]
    ) -> dict[Fault, Bool[Array, ""]]:
        """What is wrong with the batch, and with what was made of it; see `faults_of`."""
        likelihood = settings.columns.likelihood
        return faults_of(likelihood, program.output, self.batch, self.weights, wrong)


def zeros_of(shapes: PyTree) -> PyTree:
    """Arrays of zeros; made without JAX, which compiles a program for every shape."""
    return jax.tree.map(lambda s: jnp.array(np.zeros(s.shape, s.dtype)), shapes)


def _total(
    program: Program, settings: Settings, of_records: OfRecords, arrays: Arrays, *operands: PyTree
) -> tuple[PyTree, Faults]:
    def sums(records: list[Record], weights: Float[Array, " n"], _: Float[Array, " n"]) -> PyTree:
        return of_records(program.resolved, records, weights, *operands)

    total = _summed(program, settings, arrays, sums, functools.partial(record_bytes, program))
    found = arrays.faults(program, settings, {SUMS: ~all_finite(total)})
    return total, Faults.of_batch(found, arrays.number)


def _statistics(program: Program, settings: Settings, arrays: Arrays) -> Statistics:
    def sums(
        records: list[Record], weights: Float[Array, " n"], input_weights: Float[Array, " n"]
    ) -> PyTree:
        approximation = settings.kfac_approx_for
        return factors.batch_sums(program.resolved, records, weights, approximation, input_weights)

    formed = functools.partial(formed_bytes, program, settings)
    total = _summed(program, settings, arrays, sums, formed)
    count, updates = jnp.sum(arrays.weights), jnp.ones((), jnp.int32)
    edges = [factors.edge(*of) for of in zip(program.layers, total, strict=True)]
    found = arrays.faults(program, settings, {SUMS: ~all_finite(edges)})
    faults = Faults.of_batch(found, arrays.number)
    return Statistics(count, updates, total, program.layers, program.space, faults)


def _summed(
    program: Program,
    settings: Settings,
    arrays: Arrays,
    of_records: Callable[[list[Record], Float[Array, " n"], Float[Array, " n"]], PyTree],
    record_bytes: Callable[[int], int],
) -> PyTree:
    """Sum over a batch, in parts of no more than `examples_at_once`.

    A part has at least one example; if the records of one are too large, some columns of it.

    Args:
        program: The parsed model.
        settings: What is pulled back.
        arrays: The batch, and what else the pass works on.
        of_records: Takes records, the weights of their examples, and those of their inputs: these
            are zeros with all columns of an example but the first.
        record_bytes: Memory for what this needs of one example, for a number of columns.
    """
    leaves, consts, batch, weights, key, number, shards = arrays
    keys = jax.random.split(jax.random.fold_in(key, number), size_of(batch))
    columns = num_columns_of(program, settings.columns, batch)
    at_once = columns_at_once(program, settings.columns.fisher, columns)

    def sums(leaves: list[Array], part: Part) -> PyTree:
        batch, weights, keys = part

        def of_window(first: Int[Array, ""] | None) -> PyTree:
            records = capture_batch(
                program, (leaves, consts), batch, settings.columns,
                keys=keys, window=None if first is None else (first, at_once),
            )  # fmt: skip
            return of_records(
                records, weights, weights if first is None else weights * (first == 0)
            )

        if at_once == columns:
            return of_window(None)
        return sum_over(of_window, jnp.arange(0, columns, at_once))

    def of_share(leaves: list[Array], share: Part) -> PyTree:
        most = examples_at_once(program, record_bytes(at_once))
        return sum_in_turn(functools.partial(sums, leaves), share, most)

    whole = batch, weights, keys
    if shards is not None:
        try:
            return shards.sum(functools.partial(of_share, shards.gathered(leaves)), whole)
        except NotImplementedError:  # a primitive of the model that cannot be vmapped
            pass
    return of_share(leaves, whole)


def sum_in_turn(function: Callable[[Part], PyTree], examples: Part, most: int) -> PyTree:
    """Sum a function over examples, no more than so many of them at once."""
    batch, weights, keys = examples
    size = len(weights)
    parts = math.ceil(size / most)
    if parts == 1:
        return function(examples)
    each = math.ceil(size / parts)
    padded, _ = pad({**batch, "key": keys}, each * parts)
    weights = jnp.concatenate([weights, jnp.zeros(each * parts - size, weights.dtype)])
    split = jax.tree.map(lambda x: x.reshape(parts, each, *x.shape[1:]), (padded, weights))
    return sum_over(lambda part: function((part[0], part[1], part[0]["key"])), split)
