"""Data in, curvature out: `kfac`, `ekfac`, and the `accumulator` that they are loops over."""

import functools
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree, UInt
from tqdm import tqdm

from laplax_kfac import factors, jaxprs, pytrees
from laplax_kfac.arguments import no_type_check, positive_integer, require_choice
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import (
    Batch,
    WeightedBatch,
    as_batch,
    batches,
    even_batches,
    first_example,
    pad,
    require_several_passes,
    same_number,
    to_arrays,
    weighted_batch,
)
from laplax_kfac.capture.batches import batch_size as size_of
from laplax_kfac.capture.capture import capture_batch, record_size
from laplax_kfac.capture.layer_io import Record
from laplax_kfac.factors import KFAC_APPROXIMATIONS, KfacApprox, Statistics, optimal_factors
from laplax_kfac.factors.eigenvalue_correction import corrected_eigenvalues
from laplax_kfac.factors.gradients import sum_over
from laplax_kfac.likelihood.losses import (
    FISHER_TYPES,
    NAMED,
    FisherType,
    Likelihood,
    columns,
    num_columns,
    resolve_likelihood,
)
from laplax_kfac.parsing import cache_keys as fingerprint
from laplax_kfac.parsing.grouping import Member
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.program import ModelFn, Program, parse
from laplax_kfac.parsing.selection import DENSE_LIMIT, PathFilter, Selection, matches, select
from laplax_kfac.posterior.posterior import make_posterior
from laplax_kfac.posterior.prior import PriorPrecision

DEFAULT_BATCH_SIZE = 256
KFOC_ITERATIONS = 30
OfRecords = Callable[..., Any]
RECORD_BYTES = 2**30
"""Most memory for the records of a batch; larger batches are worked on in parts."""
REUSED_BYTES = 2**25
"""Memory for records that a CPU can well use again and again."""
_LAYOUTS = 3
"""Copies of what sums are formed from: the model's, a weighted one, one for the products."""


@pytrees.register
@dataclass(frozen=True)
class Curvature(BlockDiagonal):
    """Curvature of the loss at the trained parameters: a sum over the data, without a prior.

    A pytree: it goes through ``jit``, ``vmap`` and ``grad``. `mv`, `to_dense`, `diagonal` and
    `trace` are of the curvature alone; the methods here add a prior, posterior precision being
    ``curvature + prior_prec * I``; ``prior_prec`` is a scalar, an array with one value a layer,
    or a pytree prefix of the parameters.
    """

    def inverse_mv(self, v: PyTree, *, prior_prec: PriorPrecision) -> PyTree:
        """Posterior covariance times a pytree like the parameters."""
        return make_posterior(self, prior_prec).covariance_mv(v)

    def logdet(self, *, prior_prec: PriorPrecision) -> Float[Array, ""]:
        """Log-determinant of the posterior precision."""
        return make_posterior(self, prior_prec).log_determinant()

    def sample(
        self, key: Key[Array, ""], n: int, params: PyTree, *, prior_prec: PriorPrecision
    ) -> PyTree:
        """Draw ``n`` parameter pytrees from the posterior around ``params``, stacked in front."""
        return make_posterior(self, prior_prec).sample(key, n, params)


@dataclass(frozen=True)
class Options:
    """What kind of curvature is computed; see `kfac` for their meaning."""

    likelihood: Likelihood
    fisher_type: FisherType
    mc_samples: int
    key: Key[Array, ""]
    kfac_approx: tuple[tuple[str, KfacApprox], ...]
    selection: Selection
    vmap_over_data: bool
    sketches: int | None = None

    @no_type_check
    @classmethod
    def checked(
        cls,
        loss_fn: Any,
        fisher_type: str = "type2",
        mc_samples: int = 1,
        key: Key[Array, ""] | None = None,
        kfac_approx: str | Mapping[str, str] = "expand",
        *,
        selection: Selection,
        vmap_over_data: bool = True,
        sketches: int | None = None,
    ) -> "Options":
        """Check values that would otherwise fail far from their cause."""
        require_choice("fisher_type", fisher_type, FISHER_TYPES)
        pairs = kfac_approx.items() if isinstance(kfac_approx, Mapping) else [("*", kfac_approx)]
        for _, value in pairs:
            require_choice("kfac_approx", value, KFAC_APPROXIMATIONS)
        mc_samples = positive_integer("mc_samples", mc_samples)
        if sketches is not None:
            sketches = positive_integer("sketches", sketches)
            if fisher_type != "type2":
                msg = (
                    "`sketches` combines the columns of the loss Hessian's root, which only "
                    f"fisher_type='type2' pulls back; found {fisher_type!r}, leave `sketches` out."
                )
                raise ValueError(msg)
        if fisher_type == "forward_only" and selection.curvature != "kronecker":
            msg = (
                "`fisher_type='forward_only'` defines Kronecker factors alone: it needs "
                f"`curvature='kronecker'`, found {selection.curvature!r}."
            )
            raise ValueError(msg)
        return cls(
            resolve_likelihood(loss_fn),
            fisher_type,  # type: ignore[arg-type]
            mc_samples,
            jax.random.key(0) if key is None else key,
            tuple(pairs),  # type: ignore[arg-type]
            selection,
            vmap_over_data,
            sketches,
        )

    def kfac_approx_for(self, layer: Layer) -> KfacApprox:
        """The treatment of weight sharing in a layer: that of the first pattern it matches."""
        return next(
            (a for pattern, a in self.kfac_approx if matches(layer.name, [pattern])), "expand"
        )

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Refuse patterns that are no layer's.

        Raises:
            ValueError: If there is one.
        """
        names = [layer.name for layer in layers]
        for pattern, _ in self.kfac_approx:
            if not any(matches(name, [pattern]) for name in names):
                msg = f"`kfac_approx` names {pattern!r}, which matches none of the layers {names}."
                raise ValueError(msg)


@dataclass(frozen=True)
class Accumulator:
    """Streaming curvature: pure functions around `factors.Statistics`; made by `accumulator`.

    Statistics are sums: they may be accumulated in any order and over any split of the data, and
    merged. `finalize` does the eigendecompositions.
    """

    model_fn: ModelFn
    params: PyTree
    options: Options

    def at(self, params: PyTree) -> "Accumulator":
        """The same at other parameters of the same shapes; nothing is traced or compiled anew."""
        moved = replace(self, params=params)
        moved.__dict__["_programs"] = self._programs
        return moved

    def init(self) -> Statistics:
        """The state before any data."""
        return factors.empty_statistics()

    @no_type_check
    def update(
        self, state: Statistics, batch: Any, weights: Float[Array, " N"] | None = None
    ) -> Statistics:
        """Add one batch; compiled once for each shape of a batch.

        Args:
            state: Statistics so far.
            batch: ``(input, target)`` or ``{"input": ..., "target": ...}``, either with a weight
                for every example if these differ; see `kfac`.
            weights: 1 for every example that counts and 0 for padding; all count by default.
                They multiply the weights of the batch.

        Raises:
            TypeError: If the batch is of no known form.
            ValueError: If its arrays disagree about the number of examples.
        """
        batch, weights = weighted_batch(to_arrays(as_batch(batch)), weights)
        compiled, arrays = self._pass(batch, weights, state.num_updates)
        return _added(state, compiled, arrays)

    def collect(self, data: Iterable[WeightedBatch]) -> Statistics:
        """Statistics of all data: updates from the first, but in place.

        Args:
            data: Batches with their weights, such as `parts` of data.
        """
        state = self.init()
        for number, part in enumerate(data):
            compiled, arrays = self._pass(*weighted_batch(*part), number)
            state = _added(state, compiled, arrays, in_place=True)
        return factors.mirrored(state)

    def merge(self, first: Statistics, second: Statistics) -> Statistics:
        """Statistics of the data of both."""
        return factors.merge(first, second)

    def parts(self, data: Iterable[Any], batch_size: int) -> Iterator[WeightedBatch]:
        """Split batches into parts of one size for `collect`, with weights 0 for padding.

        Args:
            data: Batches.
            batch_size: Most examples of a part.
        """
        return even_batches(map(as_batch, data), batch_size)

    def finalize(self, state: Statistics) -> Curvature:
        """The curvature of all data seen.

        Raises:
            ValueError: If the state has seen no data.
        """
        blocks = factors.finalize(state)
        assert state.space is not None
        return Curvature(blocks, state.layers, state.space)

    def optimise(
        self,
        state: Statistics,
        passes: Callable[[], Iterable[WeightedBatch]],
        *,
        iterations: int = KFOC_ITERATIONS,
    ) -> Curvature:
        """The curvature with the Kronecker products nearest to the exact blocks (Frobenius norm).

        A power iteration from the factors of the state, two passes over the data a step, that
        never forms a block. It stops when the input factors' directions stay the same.

        Args:
            state: Statistics of the data.
            passes: Gives the same batches with their weights, at every call.
            iterations: Most steps.

        Raises:
            ValueError: If the state has seen no data.
        """
        factors.require_data(state)
        old_inputs, outputs = factors.kronecker_factors(state)
        for _ in range(iterations):
            new = self.total(optimal_factors.over_outputs, passes(), outputs)
            inputs = optimal_factors.over_squared_norms(state.layers, new, outputs, 0)
            new = self.total(optimal_factors.over_inputs, passes(), inputs)
            outputs = optimal_factors.over_squared_norms(state.layers, new, inputs, 1)
            if optimal_factors.same_directions(state.layers, old_inputs, inputs):
                break
            old_inputs = inputs
        else:
            msg = (
                f"`kfoc` stopped after {iterations} steps before the factors had settled: they are "
                "nearer to the exact blocks than KFAC's, but not the nearest. Raise `iterations`."
            )
            warnings.warn(msg, stacklevel=3)
        return self.finalize(factors.with_kronecker_factors(state, inputs, outputs))

    def correct(self, curvature: Curvature, data: Iterable[WeightedBatch]) -> Curvature:
        """Replace the eigenvalues of Kronecker blocks by exact second moments in their bases.

        Args:
            curvature: The curvature of the same data.
            data: The same batches with their weights, once more.
        """
        moments = self.total(corrected_eigenvalues, data, curvature.blocks)
        blocks = tuple(
            replace(block, eigenvalues=m) if layer.block == "kronecker" else block
            for layer, block, m in zip(curvature.layers, curvature.blocks, moments, strict=True)
        )
        return replace(curvature, blocks=blocks)

    def total(self, of_records: OfRecords, data: Iterable[WeightedBatch], *operands: Any) -> Any:
        """Sum a function of the layers' records over the data.

        Args:
            of_records: ``(layers, records, weights, *operands)`` -> a pytree of arrays, for the
                records of some examples; compiled once for each shape of a batch.
            data: Batches with their weights.
            *operands: What else it takes.
        """
        total: Any = None
        for number, (batch, weights) in enumerate(weighted_batch(*part) for part in data):
            compiled, arrays = self._pass(batch, weights, number)
            if total is None:
                shapes = jax.eval_shape(compiled.total, of_records, arrays, *operands)
                total = _zeros(shapes)
            if jaxprs.is_traced((arrays, operands)):
                new = compiled.total(of_records, arrays, *operands)
                total = jax.tree.map(jnp.add, total, new)
            else:
                total = compiled.add_total(of_records, total, arrays, *operands)
        return total

    def _pass(
        self, batch: Batch, weights: Float[Array, " N"], number: int | Int[Array, ""]
    ) -> tuple["_Compiled", "_Arrays"]:
        """What is compiled for a batch, and its arguments; batches have a number each."""
        compiled = self._compiled(batch)
        leaves, consts = jax.tree.leaves(self.params), compiled.program.consts
        number = jnp.asarray(number, jnp.uint32)
        return compiled, _Arrays(leaves, consts, batch, weights, self.options.key, number)

    @functools.cached_property
    def _programs(self) -> dict[Any, "_Compiled"]:
        return {}

    def _compiled(self, batch: Batch) -> "_Compiled":
        """The parsed model and its compiled statistics, for one shape of examples."""
        example, target = first_example(batch), first_example(batch, "target")
        leaves, treedef = jax.tree.flatten((example, target))
        shapes = (treedef, tuple((x.shape, x.dtype) for x in leaves))
        if shapes not in self._programs:
            program = parse(
                self.model_fn,
                self.params,
                example,
                vmap_over_data=self.options.vmap_over_data,
                selection=self.options.selection,
            )
            self.options.check_layers(program.layers)
            if self.options.fisher_type == "forward_only":
                resolved = tuple(map(factors.without_cotangents, program.resolved))
                program = replace(program, resolved=resolved)
            self._programs[shapes] = _compiled(self.model_fn, program, self.options, target)
        return self._programs[shapes]


@dataclass(frozen=True)
class _Compiled:
    """A parsed model, and its passes over a batch, compiled when first called.

    Attributes:
        program: The parsed model.
        statistics: Arrays -> the statistics of one batch, of wide matrices the upper tiles.
        add_in_place: (leaves of these, arrays) -> the leaves with one batch more; the old ones must
            not be used again.
        whole_statistics: Arrays -> the statistics of one batch.
        add: (leaves of these, arrays) -> leaves with one batch more.
        total: (function, arrays, *operands) -> sum of a function of the records of one batch.
        add_total: (function, total, arrays, *operands) -> the total, in place, with a batch more.
        known_shapes: What `shapes` has found so far; a loop over batches asks with every one.
    """

    program: Program
    statistics: Callable[..., Statistics]
    add_in_place: Callable[..., list[Array]]
    whole_statistics: Callable[..., Statistics]
    add: Callable[..., list[Array]]
    total: Callable[..., Any]
    add_total: Callable[..., Any]
    known_shapes: dict[Hashable, Statistics] = field(default_factory=dict)

    def shapes(self, statistics: Callable[..., Statistics], arrays: "_Arrays") -> Statistics:
        """Shapes of statistics; known from the last batch of the same size."""
        leaves, treedef = jax.tree.flatten(arrays)
        key = statistics, treedef, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self.known_shapes:
            self.known_shapes[key] = jax.eval_shape(statistics, arrays)
        return self.known_shapes[key]

    @classmethod
    def of(cls, program: Program, options: Options) -> "_Compiled":
        """The passes of a model; `add` and its like have their traces from what they add."""
        statistics = jax.jit(functools.partial(_statistics, program, options))
        whole_statistics = jax.jit(lambda arrays: factors.mirrored(statistics(arrays)))
        total = jax.jit(functools.partial(_total, program, options), static_argnums=0)

        def add(of: Callable[..., Any], leaves: list[Array], arrays: "_Arrays") -> list[Array]:
            return list(map(jnp.add, leaves, jax.tree.leaves(of(arrays))))

        def add_total(of_records: OfRecords, old: Any, arrays: "_Arrays", *operands: Any) -> Any:
            return jax.tree.map(jnp.add, old, total(of_records, arrays, *operands))

        return cls(
            program,
            statistics, jax.jit(functools.partial(add, statistics), donate_argnums=0),
            whole_statistics, jax.jit(functools.partial(add, whole_statistics)),
            total, jax.jit(add_total, static_argnums=0, donate_argnums=1),
        )  # fmt: skip


def _compiled(model_fn: ModelFn, program: Program, options: Options, target: PyTree) -> _Compiled:
    """The passes of a model; those of an earlier fit where nothing they depend on has changed."""
    settings = options.fisher_type, options.mc_samples, options.kfac_approx, options.sketches
    # The selection is part of the program, the random key an argument.
    key = (fingerprint.of_program(program), _of_loss(program, options, target), settings)
    without_arrays = replace(program, consts=[])  # they are arguments: the latest ones
    found = fingerprint.kept(
        model_fn,
        program.consts,
        (*key, RECORD_BYTES, REUSED_BYTES),
        lambda: _Compiled.of(without_arrays, options),
    )
    return replace(found, program=program)


def _of_loss(program: Program, options: Options, target: PyTree) -> Hashable:
    """Equal for losses with the same vectors to pull back; they may be other functions."""
    if options.fisher_type == "forward_only":
        return None
    likelihood, kind = options.likelihood, options.fisher_type
    if any(likelihood is known for known in NAMED.values()):
        return likelihood.name

    def vectors(f: PyTree, y: PyTree, key: Key[Array, ""]) -> PyTree:
        return columns(
            likelihood, kind, f, y,
            key=key, mc_samples=options.mc_samples, sketches=options.sketches,
        )  # fmt: skip

    return fingerprint.of_function(vectors, program.output, target, options.key)


def _added(
    state: Statistics, compiled: _Compiled, arrays: "_Arrays", *, in_place: bool = False
) -> Statistics:
    """A state and the statistics of one batch more."""
    statistics, add = compiled.whole_statistics, compiled.add
    if in_place:
        statistics, add = compiled.statistics, compiled.add_in_place
    new = compiled.shapes(statistics, arrays)
    if not state.layers:
        state = _zeros(new)
    factors.require_same_blocks(state, new)
    if in_place and not _have_one_form(state, new):  # those of images of another size may differ
        return _added(factors.mirrored(state), compiled, arrays)
    leaves, treedef = jax.tree.flatten(state)
    if jaxprs.is_traced((leaves, arrays)):  # nothing can be changed in place
        leaves = list(map(jnp.add, leaves, jax.tree.leaves(statistics(arrays))))
    else:
        leaves = add(leaves, arrays)
    return jax.tree.unflatten(treedef, leaves)


def _have_one_form(first: Statistics, second: Statistics) -> bool:
    """Whether sums of two statistics can be added entry by entry."""
    ours, theirs = (jax.tree.map(lambda x: x.shape, s.sums) for s in (first, second))
    return bool(ours == theirs)


class _Arrays(NamedTuple):
    """What a pass over a batch works on; arguments, so that nothing is compiled in."""

    leaves: list[Array]
    consts: list[ArrayLike]
    batch: Batch
    weights: Float[Array, " N"]
    key: Key[Array, ""]
    number: UInt[Array, ""]


def _num_columns(program: Program, options: Options, batch: Batch) -> int:
    """How many vectors are pulled back for one example."""
    target = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), batch["target"])
    return num_columns(
        options.likelihood, options.fisher_type, program.output, target, options.mc_samples,
        options.sketches,
    )  # fmt: skip


def _columns_at_once(program: Program, options: Options, columns: int) -> int:
    """All columns, unless the records of one example are larger than `RECORD_BYTES` then."""
    if _record_bytes(program, columns) <= RECORD_BYTES or (
        program.custom_vjp and options.fisher_type == "type2"  # may pull all unit vectors back
    ):
        return columns
    without = _record_bytes(program, 0)
    each = _record_bytes(program, 1) - without
    return min(columns, max(1, (RECORD_BYTES - without) // max(1, each)))


def _record_bytes(program: Program, columns: int) -> int:
    """Memory for the records of one example."""
    return 4 * sum(record_size(layer, columns) for layer in program.layers)


def _formed_bytes(program: Program, options: Options, columns: int) -> int:
    """Memory for what is formed of the records of one example, if they are summed up to factors."""
    numbers = 0
    for resolved in program.resolved:
        inputs = factors.needs_inputs(resolved, options.kfac_approx_for(resolved.layer))
        numbers += record_size(resolved.layer, columns, inputs=inputs)
        if not inputs:
            operands = sum(_num_in_operands(program, member) for member in resolved.members)
            numbers += _LAYOUTS * operands
    return 4 * numbers


def _num_in_operands(program: Program, member: Member) -> int:
    """Numbers of one example that the inputs of a use would be made of."""
    use = program.uses[member.claim.use]
    operands = (x for number, x in enumerate(use.eqn.invars) if number != use.operand)
    return sum(math.prod(jaxprs.shape(x)) for x in operands)


def _examples_at_once(program: Program, record_bytes: int) -> int:
    """How many examples are worked on at once: as many as `RECORD_BYTES` hold; on a CPU fewer.

    New pages of memory cost a CPU as much time as what it computes in them, and a loop over small
    parts uses the same ones again. But the sums are read and written with every part: its records
    should be larger. Powers of two divide most batches, and fill its vectors.

    Args:
        program: The parsed model.
        record_bytes: Memory for the records of one example.
    """
    examples = RECORD_BYTES // max(1, record_bytes)
    if jax.default_backend() == "cpu":
        room = max(REUSED_BYTES, 5 * sum(map(sum_bytes, program.layers)) // 2)
        examples = min(examples, room // max(1, record_bytes))
        examples = 1 << max(examples, 1).bit_length() - 1
    return max(examples, 1)


def sum_bytes(layer: Layer) -> int:
    """Memory for the sums of a Kronecker layer, and for its bases."""
    return 4 * layer.factor_elements


def _zeros(shapes: Any) -> Any:
    """Arrays of zeros; made without JAX, which compiles a program for every shape."""
    return jax.tree.map(lambda s: jnp.array(np.zeros(s.shape, s.dtype)), shapes)


def _total(
    program: Program, options: Options, of_records: OfRecords, arrays: _Arrays, *operands: Any
) -> Any:
    def sums(records: list[Record], weights: Float[Array, " n"], _: Float[Array, " n"]) -> Any:
        return of_records(program.resolved, records, weights, *operands)

    return _summed(program, options, arrays, sums, functools.partial(_record_bytes, program))


def _statistics(program: Program, options: Options, arrays: _Arrays) -> Statistics:
    def sums(
        records: list[Record], weights: Float[Array, " n"], input_weights: Float[Array, " n"]
    ) -> Any:
        approximation = options.kfac_approx_for
        return factors.batch_sums(program.resolved, records, weights, approximation, input_weights)

    formed = functools.partial(_formed_bytes, program, options)
    total = _summed(program, options, arrays, sums, formed)
    count, updates = jnp.sum(arrays.weights), jnp.ones((), jnp.int32)
    return Statistics(count, updates, total, program.layers, program.space)


def _summed(
    program: Program,
    options: Options,
    arrays: _Arrays,
    of_records: Callable[[list[Record], Float[Array, " n"], Float[Array, " n"]], Any],
    record_bytes: Callable[[int], int],
) -> Any:
    """Sum over a batch, in parts of no more than `_examples_at_once`.

    A part has at least one example; if the records of one are too large, some columns of it.

    Args:
        program: The parsed model.
        options: What is pulled back.
        arrays: The batch, and what else the pass works on.
        of_records: Takes records, the weights of their examples, and those of their inputs: these
            are zeros with all columns of an example but the first.
        record_bytes: Memory for what this needs of one example, for a number of columns.
    """
    leaves, consts, batch, weights, key, number = arrays
    key = jax.random.fold_in(key, number)
    size, columns = size_of(batch), _num_columns(program, options, batch)
    at_once = _columns_at_once(program, options, columns)

    def sums(part: tuple[Batch, Float[Array, " n"], Key[Array, ""]]) -> Any:
        batch, weights, key = part

        def of_window(first: Int[Array, ""] | None) -> Any:
            records = capture_batch(
                program, leaves, consts, batch, options.likelihood, options.fisher_type,
                key=key, mc_samples=options.mc_samples, sketches=options.sketches,
                window=None if first is None else (first, at_once),
            )  # fmt: skip
            return of_records(
                records, weights, weights if first is None else weights * (first == 0)
            )

        if at_once == columns:
            return of_window(None)
        return sum_over(of_window, jnp.arange(0, columns, at_once))

    parts = math.ceil(size / _examples_at_once(program, record_bytes(at_once)))
    if parts == 1:
        return sums((batch, weights, key))
    each = math.ceil(size / parts)
    padded, _ = pad(batch, each * parts)
    weights = jnp.concatenate([weights, jnp.zeros(each * parts - size, weights.dtype)])
    split = jax.tree.map(lambda x: x.reshape(parts, each, *x.shape[1:]), (padded, weights))
    return sum_over(sums, (*split, jax.random.split(key, parts)))


@no_type_check
def accumulator(
    model_fn: ModelFn,
    params: PyTree,
    *,
    loss_fn: Any,
    fisher_type: str = "type2",
    mc_samples: int = 1,
    sketches: int | None = None,
    key: Key[Array, ""] | None = None,
    kfac_approx: str | Mapping[str, str] = "expand",
    curvature: str = "kronecker",
    params_filter: PathFilter = None,
    fallback: str | Mapping[str, str] = "dense",
    dense_limit: int = DENSE_LIMIT,
    factor_kinds: str | Mapping[str, Any] | None = None,
    separate_weight_and_bias: bool = False,
    vmap_over_data: bool = True,
) -> Accumulator:
    """Streaming curvature: ``init``, ``update``, ``merge`` and ``finalize``.

    The arguments are those of `kfac`, without the data. States that are accumulated apart and
    merged need accumulators with a ``key`` each if ``fisher_type`` is ``"mc"``, or if there are
    ``sketches``: every state draws the same sequence from its key.

    Raises:
        ValueError: If an option has an unknown value.
        TypeError: If ``loss_fn`` is neither a name nor a callable.
    """
    selection = select(
        params_filter, fallback, dense_limit,
        separate_weight_and_bias=separate_weight_and_bias, curvature=curvature,
        factor_kinds=factor_kinds,
    )  # fmt: skip
    options = Options.checked(
        loss_fn, fisher_type, mc_samples, key, kfac_approx,
        selection=selection, vmap_over_data=vmap_over_data, sketches=sketches,
    )  # fmt: skip
    return Accumulator(model_fn, params, options)


@no_type_check
def kfac(
    model_fn: ModelFn,
    params: PyTree,
    data: Any,
    *,
    loss_fn: Any,
    fisher_type: str = "type2",
    mc_samples: int = 1,
    sketches: int | None = None,
    key: Key[Array, ""] | None = None,
    kfac_approx: str | Mapping[str, str] = "expand",
    curvature: str = "kronecker",
    params_filter: PathFilter = None,
    fallback: str | Mapping[str, str] = "dense",
    dense_limit: int = DENSE_LIMIT,
    factor_kinds: str | Mapping[str, Any] | None = None,
    separate_weight_and_bias: bool = False,
    vmap_over_data: bool = True,
    eigenvalue_correction: bool = False,
    optimal_factors: bool = False,
    iterations: int = KFOC_ITERATIONS,
    batch_size: int = DEFAULT_BATCH_SIZE,
    transform: Callable[[Any], Any] | None = None,
    progress: bool = False,
) -> Curvature:
    """Kronecker-factored curvature (Martens & Grosse 2015) of any JAX model.

    One pass over the data, one more with eigenvalue correction. Parameters without a Kronecker
    form get an exact dense or diagonal block; `find_layers` says which, and why.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters, a pytree of arrays.
        data: One batch, ``(input, target)`` or ``{"input": ..., "target": ...}``, or an iterable
            of batches. Examples of a batch ``(input, target, weight)``, or of one with a key
            ``"weight"``, an array (N,), count so many times.
        loss_fn: A laplax ``LossFn``, its string (``"mse"``, ``"cross_entropy"``,
            ``"binary_cross_entropy"``), a callable ``loss(output, target)`` of one example, or a
            `Likelihood`, such as those in `laplax_kfac.likelihood`. The loss of the data is the
            sum over examples.
        fisher_type: ``"type2"`` for the generalised Gauss-Newton matrix, ``"mc"`` for its estimate
            from sampled targets, ``"empirical"`` for the Fisher matrix at the observed targets,
            ``"forward_only"`` for input factors alone, with output factors that are the identity.
        mc_samples: Samples an example for ``"mc"``.
        sketches: For ``"type2"`` with large outputs: how many vectors to pull back for an example,
            independent random combinations of the columns of its Hessian's root. The factor of the
            outputs and blocks without a Kronecker form are then unbiased estimates, at a cost that
            does not grow with the number of outputs, but for the factor of a layer that has as
            many outputs itself. A derivative rule of the model's own that is not linear is applied
            to the combinations. All columns by default.
        key: Random key for ``"mc"`` and ``sketches``; ``jax.random.key(0)`` by default.
        kfac_approx: How positions that share a weight are treated: ``"expand"`` as if they were
            examples, ``"reduce"`` summed up (Eschenhagen et al. 2023, arXiv 2311.00636); or these
            by patterns of layers' names, ``"expand"`` for those that match none.
        curvature: ``"kronecker"``; or, from the same quantities, the exact ``"diagonal"``, or the
            exact dense ``"block"`` of every layer.
        params_filter: Which parameters get curvature: patterns of paths as in a shell
            (``"encoder/*"``; one or several), a function of the path, or ``"last_layer"``. The
            others are frozen at their value; all are covered by default.
        fallback: Block of parameters without a Kronecker form: ``"dense"`` (up to ``dense_limit``,
            diagonal above), ``"diagonal"``, ``"none"``, or ``"error"``; or these by pattern.
        dense_limit: Most parameters of a leaf that get a dense block.
        factor_kinds: What Kronecker factors may be: ``"dense"``, ``"diagonal"``, ``"identity"`` (a
            multiple of it), or ``"blocked:64"`` for blocks of 64 neighbouring features. One kind is
            for all input factors but those of lookups; or give, by patterns of layers' names, one
            for both factors, or a pair for inputs and outputs. Dense by default, and diagonal for
            rows that data pick and for very wide factors.
        separate_weight_and_bias: Whether biases get blocks of their own.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        eigenvalue_correction: Whether to replace the eigenvalues of Kronecker blocks by the exact
            second moments of the gradients in their eigenbases (George et al. 2018, EKFAC).
        optimal_factors: Whether to use the Kronecker product nearest to each exact block (KFOC; see
            `kfoc`).
        iterations: Most steps of the power iteration for optimal factors.
        batch_size: Most examples that are worked on at once; larger batches are split. A CPU works
            on fewer where their memory can then be reused.
        transform: Applied to every batch first, to bring it to one of the forms above.
        progress: Whether to show a progress bar over the batches.

    Returns:
        The curvature, a sum over the data.

    Raises:
        ValueError: If an option, the data or the model is not of a supported form.
        TypeError: If ``data`` or ``loss_fn`` is of an unsupported type.
    """
    accumulate = accumulator(
        model_fn, params, loss_fn=loss_fn, fisher_type=fisher_type, mc_samples=mc_samples,
        sketches=sketches, key=key,
        kfac_approx=kfac_approx, curvature=curvature, params_filter=params_filter,
        fallback=fallback, dense_limit=dense_limit, factor_kinds=factor_kinds,
        separate_weight_and_bias=separate_weight_and_bias, vmap_over_data=vmap_over_data,
    )  # fmt: skip
    batch_size, iterations = (
        positive_integer("batch_size", batch_size),
        positive_integer("iterations", iterations),
    )
    _check_refinements(
        fisher_type, curvature, eigenvalue_correction=eigenvalue_correction,
        optimal_factors=optimal_factors,
    )  # fmt: skip

    if optimal_factors or eigenvalue_correction:
        require_several_passes(data, "`ekfac`" if eigenvalue_correction else "`kfoc`")
    sizes: list[int] = []

    def stream(description: str) -> Iterator[WeightedBatch]:
        parts = accumulate.parts(same_number(batches(data, transform), sizes), batch_size)
        return iter(tqdm(parts, desc=description, unit="batch", disable=not progress))

    state = accumulate.collect(stream("factors"))
    if optimal_factors:
        passes = functools.partial(stream, "optimal factors")
        found = accumulate.optimise(state, passes, iterations=iterations)
    else:
        found = accumulate.finalize(state)
    return accumulate.correct(found, stream("eigenvalues")) if eigenvalue_correction else found


def _check_refinements(fisher_type: str, curvature: str, **refinements: bool) -> None:
    """Refuse what refines Kronecker factors by gradients where there is no such thing."""
    for name, wanted in refinements.items():
        if wanted and (curvature != "kronecker" or fisher_type == "forward_only"):
            msg = (
                f"`{name}` refines Kronecker blocks by per-example gradients; it needs "
                "`curvature='kronecker'` and another `fisher_type` than 'forward_only', found "
                f"{curvature!r} and {fisher_type!r}."
            )
            raise ValueError(msg)


@no_type_check
def ekfac(model_fn: ModelFn, params: PyTree, data: Any, **options: Any) -> Curvature:
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
def kfoc(model_fn: ModelFn, params: PyTree, data: Any, **options: Any) -> Curvature:
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
