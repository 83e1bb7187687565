"""How much memory a traced program needs: which of its arrays are there at the same time.

What is computed entry by entry is fused by the compiler into what reads it. Stored are the results
of sums, products, convolutions, loops and the like, and what those read that cannot be fused into
them. Of all steps that may come next, the one is taken that leaves the least in memory, as XLA's
own order does. Against what XLA says of its compiled programs this is mostly within a fifth, in
milliseconds, where compiling takes seconds: see `benchmarks/memory.py`.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

MOVES = (
    "reshape", "squeeze", "expand_dims", "transpose", "rev", "bitcast_convert_type", "copy",
    "stop_gradient", "optimization_barrier", "sharding_constraint",
)  # fmt: skip
"""Primitives whose result is the operand's memory, read in another order."""

REDUCTIONS = (
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
    "argmin",
)  # fmt: skip
"""Primitives with a result of its own, which read what can be fused into them."""

WHOLE = (
    "dot_general", "conv_general_dilated", "reduce_window", "reduce_window_sum",
    "reduce_window_max", "reduce_window_min", "select_and_scatter_add", "select_and_gather_add",
    "sort", "top_k", "gather", "scatter", "scatter-add", "scatter_add", "scatter_max",
    "dynamic_update_slice", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp",
    "threefry2x32", "random_bits", "eigh", "cholesky", "triangular_solve", "fft",
)  # fmt: skip
"""Primitives that read and write whole arrays."""

CUTS = ("concatenate", "slice", "dynamic_slice", "pad", "broadcast_in_dim", "iota")
"""Primitives that compute nothing."""

SMALL_PART = 8
"""A slice of less than one in so many is stored: what it is of need not be kept for it."""

LOOPS = ("scan", "while", "cond", "shard_map")
"""Primitives with a body that needs memory of its own while it is evaluated."""


@dataclass(frozen=True)
class Step:
    """Something that is computed and stored.

    Attributes:
        size: Bytes of the result.
        reads: Numbers of the steps whose results it reads.
        inside: Bytes that are needed only while it is computed.
    """

    size: int
    reads: frozenset[int]
    inside: int = 0


@dataclass
class Value:
    """What stands for a variable: stored by a step, or computed where it is read.

    Attributes:
        size: Bytes of it.
        reads: Numbers of the steps whose results it is computed from.
        stored: Number of the step that stores it, if there is one.
        joined: Whether it is made of parts side by side: only fused into a larger one of that kind.
        computed: Whether it is neither that nor a part of something: not fused into such a one.
    """

    size: int = 0
    reads: frozenset[int] = frozenset()
    stored: int | None = None
    joined: bool = False
    computed: bool = False

    @property
    def fused(self) -> frozenset[int]:
        """The steps that are read where it is fused into what reads it."""
        return self.reads if self.stored is None else frozenset({self.stored})


@dataclass
class Steps:
    """The steps of a program, in the order of its equations."""

    steps: list[Step] = field(default_factory=list)

    def add(self, size: int, reads: frozenset[int], inside: int = 0) -> int:
        """One step more; returns its number."""
        self.steps.append(Step(size, reads, inside))
        return len(self.steps) - 1

    def stored(self, value: Value) -> frozenset[int]:
        """The step that stores a value; arguments of the program are there anyway."""
        if value.stored is None and value.size:
            value.stored = self.add(value.size, value.reads)
        return value.fused

    def evaluate(self, jaxpr: Jaxpr, arguments: Sequence[Value]) -> list[Value]:
        """The steps of all equations; returns what stands for the outputs."""
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {var: Value() for var in jaxpr.constvars}

        def read(atoms: Iterable[Var | Literal]) -> list[Value]:
            return [Value() if isinstance(x, Literal) else known[x] for x in atoms]

        for eqn in jaxpr.eqns:
            found = self.results(eqn, read(eqn.invars))
            known.update(zip(eqn.outvars, found, strict=True))
        return read(jaxpr.outvars)

    def results(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
        """What stands for the outputs of an equation."""
        name, sizes = eqn.primitive.name, [num_bytes(var) for var in eqn.outvars]
        if name in MOVES:
            return operands[: len(sizes)]
        inner = bodies_in(eqn)
        if name not in LOOPS and inner and len(inner[0].invars) == len(operands):
            return self.evaluate(inner[0], operands)
        for value in operands:
            if value.joined != (name == "concatenate") and (value.joined or value.computed):
                self.stored(value)
        fused = frozenset[int]().union(*(x.fused for x in operands))
        cut = name in ("slice", "dynamic_slice") and sizes[0] * SMALL_PART <= operands[0].size
        if cut or name in (*REDUCTIONS, *LOOPS):
            inside = max(map(peak, inner), default=0) if name in LOOPS else 0
            number = self.add(sum(sizes), fused, inside)
            return [Value(size, stored=number) for size in sizes]
        if name in WHOLE:
            number = self.add(sum(sizes), frozenset[int]().union(*map(self.stored, operands)))
            return [Value(size, stored=number) for size in sizes]
        joined, computed = name == "concatenate", name not in CUTS
        return [Value(size, fused, None, joined, computed) for size in sizes]

    def peak(self, outputs: frozenset[int]) -> int:
        """Most bytes that are there at once, if the step that leaves the least is always next."""
        users: list[list[int]] = [[] for _ in self.steps]
        for number, step in enumerate(self.steps):
            for read in step.reads:
                users[read].append(number)
        waits = [len(step.reads) for step in self.steps]
        left = [len(of) + (k in outputs) for k, of in enumerate(users)]

        def growth(number: int) -> int:
            step = self.steps[number]
            return step.size - sum(self.steps[k].size for k in step.reads if left[k] == 1)

        ready = [(growth(k), k) for k, wait in enumerate(waits) if not wait]
        heapq.heapify(ready)
        done, now, most = [False] * len(self.steps), 0, 0
        while ready:
            _, number = heapq.heappop(ready)
            if done[number]:
                continue
            step, done[number] = self.steps[number], True
            most = max(most, now + step.size + step.inside)
            now += growth(number) - (0 if left[number] else step.size)
            for read in step.reads:
                left[read] -= 1
                for last in users[read] if left[read] == 1 else ():  # frees it, if it is ready
                    if not done[last] and not waits[last]:
                        heapq.heappush(ready, (growth(last), last))
            for user in users[number]:
                waits[user] -= 1
                if not waits[user]:
                    heapq.heappush(ready, (growth(user), user))
        return most


def num_bytes(var: Var) -> int:
    """Bytes of an array; those of what is none, such as a token or a random key, do not count."""
    found = getattr(var.aval, "shape", None)
    width = getattr(getattr(var.aval, "dtype", None), "itemsize", 0)
    return 0 if found is None else math.prod(found) * width


def bodies_in(eqn: JaxprEqn) -> list[Jaxpr]:
    """All jaxprs in the parameters of an equation."""
    lists = (x if isinstance(x, tuple | list) else (x,) for x in eqn.params.values())
    found = (getattr(x, "jaxpr", x) for values in lists for x in values)
    return [jaxpr for jaxpr in found if isinstance(jaxpr, Jaxpr)]


def peak(jaxpr: Jaxpr) -> int:
    """Most bytes that are there at once beside the arguments of a jaxpr.

    What is only added to an argument, as the sums of a batch to those so far, takes its place.
    """
    steps = Steps()
    found = steps.evaluate(jaxpr, [Value() for _ in jaxpr.invars])
    for value in found:
        if value.stored is None:
            steps.add(0, value.reads)
    return steps.peak(frozenset(x.stored for x in found if x.stored is not None))
