"""Streaming curvature: `init`, `update`, `merge` and `finalize`."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from laplax_kfac import factors, jaxprs, machine, summaries
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_callable,
    require_weights,
    shown,
)
from laplax_kfac.blocks.merging import require_curvature
from laplax_kfac.caches import Cache
from laplax_kfac.capture.batches import (
    Batch,
    WeightedBatch,
    as_batch,
    even_batches,
    first_example,
    to_arrays,
    weighted_batch,
)
from laplax_kfac.capture.left_out import without_left_out
from laplax_kfac.capture.shards import Shards
from laplax_kfac.curvature import identity
from laplax_kfac.curvature.curvature import Curvature, Origin
from laplax_kfac.curvature.keeping import EIGENVALUES, FACTORS, NOBODY, Keeper, applied
from laplax_kfac.curvature.options import OptionKeywords, Options, Settings
from laplax_kfac.curvature.passes import Arrays, Compiled, OfRecords, compiled_for, zeros_of
from laplax_kfac.factors import Statistics, optimal_factors
from laplax_kfac.factors.eigenvalue_correction import corrected_eigenvalues
from laplax_kfac.faults import Context, Place, Placed, added
from laplax_kfac.likelihood.named import Loss
from laplax_kfac.meshes import on_automatic_axes
from laplax_kfac.parsing.cache_keys import of_mesh
from laplax_kfac.parsing.independence import require_independent
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.program import ModelFn, parse, require_model

KFOC_ITERATIONS = 30


@summaries.summarised
@dataclass(frozen=True)
class Accumulator:
    """Streaming curvature: pure functions around `factors.Statistics`; made by `accumulator`.

    Statistics are sums: they may be accumulated in any order and over any split of the data, and
    merged. `finalize` does the eigendecompositions.
    """

    model_fn: ModelFn
    params: PyTree
    settings: Settings
    programs: Cache[Compiled] = field(
        default_factory=lambda: Cache(machine.MACHINE.shapes_kept), repr=False, compare=False
    )

    def at(self, params: PyTree) -> "Accumulator":
        """The same at other parameters of the same shapes; nothing is traced or compiled anew.

        Raises:
            ValueError: If they have other shapes, or another structure.
        """
        ParameterSpace.of(self.params).require_like(params, "params")
        return replace(self, params=params)  # with the same programs

    def init(self) -> Statistics:
        """The state before any data."""
        return factors.empty_statistics()

    @no_type_check
    @on_automatic_axes
    def update(
        self, state: Statistics, batch: object, weights: Float[Array, " N"] | None = None
    ) -> Statistics:
        """Add one batch; compiled once for each shape of a batch.

        Args:
            state: Statistics so far.
            batch: ``(input, target)`` or ``{"input": ..., "target": ...}``, this one with a key
                ``"weight"`` for the weights of examples if these differ; see `kfac`.
            weights: 1 for every example that counts and 0 for padding; all count by default.
                They multiply the weights of the batch.

        Raises:
            TypeError: If the batch is of no known form.
            ValueError: If its arrays disagree about the number of examples, or a weight is not
                finite or negative.
        """
        require_statistics("state", state)
        if weights is not None:
            require_weights("weights", weights)
        given = to_arrays(as_batch(batch, "batch"))
        examples, counts = weighted_batch(given, weights)
        examples = without_left_out(examples, weights, given.get("weight"))
        compiled, arrays = self._pass(examples, counts, state.num_updates)
        return compiled.added_to(state, arrays)

    @no_type_check
    @on_automatic_axes
    def collect(self, data: Iterable[WeightedBatch], keeper: Keeper = NOBODY) -> Statistics:
        """Statistics of all data: updates from the first, but in place.

        Args:
            data: Batches with their weights, such as `parts` of data.
            keeper: Keeps what is summed up; if it was in a later pass already, the statistics are
                shapes alone.
        """

        def forms(part: WeightedBatch) -> list[Statistics]:
            compiled, arrays = self._pass(*weighted_batch(*part), 0)
            tiles = compiled.shapes(compiled.statistics, arrays)
            return [tiles, jax.eval_shape(factors.mirrored, tiles)]

        def step(state: Statistics, number: int, part: WeightedBatch) -> Statistics:
            compiled, arrays = self._pass(*weighted_batch(*part), number)
            return compiled.added_to(state, arrays, in_place=True)

        if keeper.path is not None:
            data = self._recognised(data, keeper)
        if keeper.stage > FACTORS:
            return forms(next(iter(data)))[1]
        keeper.begin(FACTORS, None)
        return factors.mirrored(keeper.total(data, self.init(), step, forms))

    def _recognised(self, data: Iterable[WeightedBatch], keeper: Keeper) -> Iterator[WeightedBatch]:
        """The data, if the keeper knows their first batch, and the model, from an earlier fit."""
        for number, part in enumerate(data):
            if number == 0:
                compiled, arrays = self._pass(*weighted_batch(*part), 0)
                if jaxprs.is_traced(arrays):
                    msg = "`checkpoint` needs values: call `kfac` outside of jit, grad and vmap."
                    raise ValueError(msg)
                program = compiled.program
                keeper.recognise(identity.of_fit(program, self.settings, arrays, keeper.choices))
            yield part

    @no_type_check
    @on_automatic_axes
    def merge(self, first: Statistics, second: Statistics) -> Statistics:
        """Statistics of the data of both."""
        require_statistics("first", first)
        require_statistics("second", second)
        return factors.merge(first, second)

    @no_type_check
    def parts(self, data: Iterable[object], batch_size: int) -> Placed:
        """Split batches into parts of one size for `collect`, with weights 0 for padding.

        Args:
            data: Batches.
            batch_size: Most examples of a part.
        """
        most = positive_integer("batch_size", batch_size)
        return Placed(map(as_batch, data), lambda stream: even_batches(stream, most))

    def check(self, state: Statistics, places: Sequence[Place] = ()) -> None:
        """Refuse statistics of what is no target, or not finite; `finalize` does the same.

        Args:
            state: Statistics of the data.
            places: Where the data of every update are from, for the error to say; of `parts`.

        Raises:
            ValueError: If there is such a thing.
        """
        affected = functools.partial(factors.nonfinite_layers, state)
        state.faults.check(self.settings.nonfinite, Context(self.params, places, affected))

    @no_type_check
    @on_automatic_axes
    def finalize(self, state: Statistics) -> Curvature:
        """The curvature of all data seen.

        Raises:
            ValueError: If the state has seen no data, or what was seen is no target, or not finite.
        """
        require_statistics("state", state)
        self.check(state)
        blocks = factors.finalize(state)
        assert state.space is not None
        degree = self.settings.columns.fisher.degree
        return self.finite(Curvature(blocks, state.layers, state.space, degree, self.origin()))

    def origin(self) -> Origin:
        """What its curvatures are of, as far as it has seen the data itself."""
        columns = self.settings.columns
        ranks = {compiled.program.input_ranks for compiled in self.programs.values()}
        loss = columns.likelihood.name.removeprefix("weighted ")
        return Origin(
            "" if loss.startswith("the callable") else loss,
            columns.fisher.name,
            ranks.pop() if len(ranks) == 1 else (),
        )

    @no_type_check
    @on_automatic_axes
    def optimise(
        self,
        state: Statistics,
        passes: Callable[[], Iterable[WeightedBatch]],
        *,
        iterations: int = KFOC_ITERATIONS,
        keeper: Keeper = NOBODY,
    ) -> Curvature:
        """The curvature with the Kronecker products nearest to the exact blocks (Frobenius norm).

        A power iteration from the factors of the state, two passes over the data a step, that
        never forms a block. It stops when the input factors' directions stay the same.

        Args:
            state: Statistics of the data.
            passes: Gives the same batches with their weights, at every call.
            iterations: Most steps.
            keeper: Keeps what is summed up.

        Raises:
            ValueError: If the state has seen no data.
        """
        iterations = positive_integer("iterations", iterations)
        require_statistics("state", state)
        require_callable("passes", passes, "a function that returns the batches anew")
        factors.require_data(state)
        if keeper.stage == EIGENVALUES:  # these are over: what comes next knows what they gave
            return applied(self.finalize, state)

        def start(state: Statistics) -> PyTree:
            inputs, outputs = factors.kronecker_factors(state)
            return state, inputs, inputs, outputs

        known = applied(start, state)
        for number in range(max(1, keeper.stage), 2 * iterations + 1):
            state, old, inputs, outputs = known = keeper.begin(number, known)
            if number % 2:
                new = self.total(optimal_factors.over_outputs, passes(), outputs, keeper=keeper)
                inputs = optimal_factors.over_squared_norms(state.layers, new, outputs, 0)
                known = state, old, inputs, outputs
                continue
            new = self.total(optimal_factors.over_inputs, passes(), inputs, keeper=keeper)
            outputs = optimal_factors.over_squared_norms(state.layers, new, inputs, 1)
            if optimal_factors.same_directions(state.layers, old, inputs):
                break
            known = state, inputs, inputs, outputs
        else:
            msg = (
                f"`kfoc` stopped after {iterations} steps before the factors had settled: they are "
                "nearer to the exact blocks than KFAC's, but not the nearest. Raise `iterations`."
            )
            warnings.warn(msg, stacklevel=3)
        return self.finalize(factors.with_kronecker_factors(state, inputs, outputs))

    @no_type_check
    @on_automatic_axes
    def correct(
        self, curvature: Curvature, data: Iterable[WeightedBatch], keeper: Keeper = NOBODY
    ) -> Curvature:
        """Replace the eigenvalues of Kronecker blocks by exact second moments in their bases.

        Args:
            curvature: The curvature of the same data.
            data: The same batches with their weights, once more.
            keeper: Keeps what is summed up.
        """
        require_curvature("curvature", curvature)
        curvature = keeper.begin(EIGENVALUES, curvature)
        moments = self.total(corrected_eigenvalues, data, curvature.blocks, keeper=keeper)
        blocks = tuple(
            replace(block, eigenvalues=m) if layer.block == "kronecker" else block
            for layer, block, m in zip(curvature.layers, curvature.blocks, moments, strict=True)
        )
        return self.finite(replace(curvature, blocks=blocks))

    def finite(self, curvature: Curvature) -> Curvature:
        """A curvature as it is, if it is finite: products of finite sums may be too large.

        One that is zero gets a warning.

        Raises:
            ValueError: If it is not, unless numbers that are not finite are kept.
        """
        names = [] if self.settings.nonfinite == "keep" else curvature.nonfinite_layers()
        if names:
            msg = (
                f"The curvature of the layers {names} is beyond the range of its floating-point "
                "type, though inputs and gradients are finite: scale the inputs or the loss, "
                "compute with jax_enable_x64, or pass nonfinite='keep' for a result with NaN."
            )
            raise ValueError(msg)
        if curvature.is_zero():
            msg = (
                "The curvature is zero: for all examples the output's gradients or the layers' "
                "inputs vanish, or they are so small that their squares are zero in their "
                "floating-point type. The posterior is the prior. Scale the inputs, or compute "
                "with jax_enable_x64."
            )
            warnings.warn(msg, UserWarning, stacklevel=3)
        return curvature

    @on_automatic_axes
    def total(
        self,
        of_records: OfRecords,
        data: Iterable[WeightedBatch],
        *operands: PyTree,
        keeper: Keeper = NOBODY,
    ) -> PyTree:
        """Sum a function of the layers' records over the data.

        Args:
            of_records: ``(layers, records, weights, *operands)`` -> a pytree of arrays, for the
                records of some examples; compiled once for each shape of a batch.
            data: Batches with their weights.
            *operands: What else it takes.
            keeper: Keeps what is summed up.

        Raises:
            ValueError: If the data hold what is no target, the sum is not finite, or a batch needs
                more memory than there is.
        """

        def forms(part: WeightedBatch) -> list[PyTree]:
            compiled, arrays = self._pass(*weighted_batch(*part), 0)
            return [compiled.total_shapes(of_records, arrays, *operands)]

        def step(total: PyTree, number: int, part: WeightedBatch) -> PyTree:
            compiled, arrays = self._pass(*weighted_batch(*part), number)
            if total is None:
                total = zeros_of(forms(part)[0])
            if jaxprs.is_traced((arrays, operands)):
                new = compiled.total(of_records, arrays, *operands)
                return added(total, new)
            return compiled.add_total(of_records, total, arrays, *operands)

        found, faults = keeper.total(data, None, step, forms)
        places = data.places if isinstance(data, Placed) else ()
        faults.check(self.settings.nonfinite, Context(self.params, places))
        return found

    def _pass(
        self, batch: Batch, weights: Float[Array, " N"], number: int | Int[Array, ""]
    ) -> tuple["Compiled", "Arrays"]:
        """What is compiled for a batch, and its arguments; batches have a number each."""
        compiled = self._compiled(batch)
        leaves = compiled.program.space.as_real(jax.tree.leaves(self.params))
        number = jnp.asarray(number, jnp.uint32)
        shards = Shards.of(batch, leaves)
        consts = compiled.program.consts
        return compiled, Arrays(leaves, consts, batch, weights, self.settings.key, number, shards)

    def _compiled(self, batch: Batch) -> "Compiled":
        """The parsed model and its compiled statistics, for one shape of examples."""
        example, target = first_example(batch), first_example(batch, "target")
        leaves, treedef = jax.tree.flatten((example, target))
        shapes = (treedef, of_mesh(), tuple((x.shape, x.dtype) for x in leaves))

        def make() -> Compiled:
            program = parse(
                self.model_fn,
                self.params,
                example,
                vmap_over_data=self.settings.vmap_over_data,
                selection=self.settings.selection,
            )
            self.settings.check_layers(program.layers)
            if not self.settings.columns.pull_back:
                resolved = tuple(map(factors.without_cotangents, program.resolved))
                program = replace(program, resolved=resolved)
            self.settings.columns.likelihood.check(program.output, target)

            def check() -> None:
                if not self.settings.vmap_over_data:
                    require_independent(self.model_fn, self.params, example)

            return compiled_for(self.model_fn, program, self.settings, target, check)

        return self.programs.get(shapes, make)


@no_type_check
def require_statistics(name: str, value: object) -> None:
    """Refuse what is no state of an accumulator.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, Statistics):
        msg = (
            f"`{name}` must be a state of an accumulator, from its `init`, `update` or `merge`; "
            f"found {shown(value)}."
        )
        raise TypeError(msg)


@no_type_check
def accumulator(
    model_fn: ModelFn,
    params: PyTree,
    *,
    loss_fn: Loss,
    options: Options | None = None,
    **keywords: Unpack[OptionKeywords],
) -> Accumulator:
    """Streaming curvature: ``init``, ``update``, ``merge`` and ``finalize``.

    States that are accumulated apart and merged need accumulators with a ``key`` each if
    ``fisher_type`` is ``"mc"``, or if there are ``sketches``: every state draws the same sequence
    from its key.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: The trained parameters, a pytree of arrays.
        loss_fn: As for `kfac`.
        options: What kind of curvature is computed.
        **keywords: Any of the `Options` by their names; they change those given.

    Raises:
        ValueError: If an option has an unknown value.
        TypeError: If ``loss_fn`` is neither a name nor a callable, or an option is unknown.
    """
    require_model(model_fn)
    return Accumulator(model_fn, params, Options.of(options, keywords).settings(loss_fn))
