"""Which parameters get curvature, and which block those get that have no Kronecker form.

Patterns are those of a shell, on paths as ``layers/2/weight``; what frontends print for the same,
``.layers[2].weight`` or ``['layers'][2]['weight']``, is read as such a path, too.
"""

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jax import Array

from laplax_kfac.arguments import (
    listed,
    no_type_check,
    positive_integer,
    require_choice,
    require_flags,
)
from laplax_kfac.bases import kind_of
from laplax_kfac.parsing.entries import Entries
from laplax_kfac.parsing.layer import BlockKind

Fallback = Literal["dense", "diagonal", "none", "error"]
Wanted = Fallback | Literal["joint"]
CurvatureKind = Literal["kronecker", "diagonal", "block", "full"]
WideFactors = Literal["diagonal", "blocks", "error"]
FactorKinds = tuple[str | None, str | None]
PathFilter = str | Sequence[str] | Callable[[str], bool] | Mapping[str, object] | Array | None

LAST_LAYER = "last_layer"
ALL_INPUTS = "*"
DENSE_LIMIT = 256
FACTOR_LIMIT = 16384


@dataclass(frozen=True)
class FactorLimit:
    """What becomes of Kronecker factors that are wider than a limit.

    Attributes:
        size: Most features of a dense factor.
        above: Pairs of a pattern of layers' names and what a wider one is: diagonal, blocks of at
            most that many features, or an error; the first match counts, diagonal where none does.
    """

    size: int = FACTOR_LIMIT
    above: tuple[tuple[str, WideFactors], ...] = ()

    @classmethod
    @no_type_check
    def of(cls, size: int, above: str | Mapping[str, str]) -> "FactorLimit":
        """The limit that the options ``max_factor_size`` and ``wide_factors`` stand for, checked.

        Raises:
            ValueError: If a value is unknown.
            TypeError: If a pattern is no string.
        """
        require_patterns("wide_factors", above)
        pairs = above.items() if isinstance(above, Mapping) else [(ALL_INPUTS, above)]
        for _, value in pairs:
            require_choice("wide_factors", value, get_args(WideFactors))
        return cls(positive_integer("max_factor_size", size), tuple(pairs))  # type: ignore[arg-type]

    def kind_for(self, layer: str, size: int) -> str:
        """The kind of a layer's factor of that many features, unless `factor_kinds` names one.

        Raises:
            ValueError: If it is too wide, and that is an error.
        """
        if size <= self.size:
            return "dense"
        found = (value for pattern, value in self.above if matches(layer, [pattern]))
        chosen = next(found, "diagonal")
        if chosen == "error":
            msg = (
                f"layer {layer!r} has a factor of {size:,} features, more than `max_factor_size` = "
                f"{self.size:,}, and `wide_factors` is 'error' for it. Raise `max_factor_size`, "
                "choose 'blocks' or 'diagonal', or give the layer a kind by `factor_kinds`."
            )
            raise ValueError(msg)
        return f"blocked:{self.size}" if chosen == "blocks" else "diagonal"

    def check_layers(self, layers: Sequence[str]) -> None:
        """Refuse patterns that are no layer's.

        Raises:
            ValueError: If there is one.
        """
        require_matches("wide_factors", [pattern for pattern, _ in self.above], layers)


@dataclass(frozen=True)
class Selection:
    """How parameters are grouped into blocks; paths are written ``encoder/attention/kernel``.

    Attributes:
        params_filter: Whether the parameters at a path are covered; None covers all.
        fallback: Pairs of a pattern and the block for parameters without a Kronecker form at
            paths that match it; the first match counts, ``"dense"`` where none does. ``"joint"``
            stands for those that are in blocks of some each (`joins`), whatever their number.
        dense_limit: Most parameters of a leaf that get a dense block; more get a diagonal, or
            blocks of some each, if they are those of a norm layer or of a table that is added.
        separate_weight_and_bias: Whether biases get blocks of their own.
        last_layer: Whether only the last layer is covered.
        factor_kinds: Pairs of a pattern of layers' names and the kinds of their input and output
            factors; the first match counts, and where there is none, or None, the default.
        patterns: The patterns that ``params_filter`` is made of, where it is.
        limit: What becomes of wide factors for which ``factor_kinds`` names no kind.
        curvature: Whether layers with a Kronecker form get Kronecker blocks; or every parameter
            its exact diagonal entry; or every layer its exact dense block; or all of them one.
        entries: Parameters that are chosen one by one, in place of a ``params_filter``.
    """

    params_filter: Callable[[str], bool] | None = None
    fallback: tuple[tuple[str, Wanted], ...] = ()
    dense_limit: int = DENSE_LIMIT
    separate_weight_and_bias: bool = False
    last_layer: bool = False
    curvature: CurvatureKind = "kronecker"
    factor_kinds: tuple[tuple[str, FactorKinds], ...] = ()
    patterns: tuple[str, ...] = ()
    limit: FactorLimit = FactorLimit()
    entries: Entries | None = None

    @property
    def by_entries(self) -> bool:
        """Whether blocks are on parameters themselves, whatever their use."""
        return self.curvature == "full" or self.entries is not None

    def kinds_for(self, layer: str) -> FactorKinds:
        """The kinds of factors that are asked for in a layer; None for the default."""
        kinds = (kinds for pattern, kinds in self.factor_kinds if matches(layer, [pattern]))
        return next(kinds, (None, None))

    def check_kinds(self, layers: Sequence[str]) -> None:
        """Refuse patterns of `factor_kinds` and `wide_factors` that are no layer's.

        Raises:
            ValueError: If there is one.
        """
        require_matches("factor_kinds", [pattern for pattern, _ in self.factor_kinds], layers)
        self.limit.check_layers(layers)

    def check_paths(self, paths: Sequence[str], trainable: Sequence[bool]) -> None:
        """Refuse patterns that match no parameter, and a selection that covers none.

        Args:
            paths: Paths of all parameters.
            trainable: Which of them are floating-point numbers.

        Raises:
            ValueError: If there is such a pattern, or no such parameter is covered.
        """
        require_matches("params_filter", self.patterns, paths, ["last_layer"])
        require_matches("fallback", [pattern for pattern, _ in self.fallback], paths)
        pairs = list(zip(paths, trainable, strict=True))
        if any(moves for _, moves in pairs) and not any(self.covers(p) for p, m in pairs if m):
            msg = (
                "`params_filter` covers no parameter (of floating-point numbers): nothing would be "
                f"uncertain; their paths are {listed(p for p, moves in pairs if moves)}."
            )
            raise ValueError(msg)

    def covers(self, path: str) -> bool:
        """Whether the parameters at a path are covered."""
        return self.params_filter is None or bool(self.params_filter(path))

    def fallback_for(self, path: str) -> Wanted:
        """The block of parameters at a path that have no Kronecker form."""
        return next((f for pattern, f in self.fallback if matches(path, [pattern])), "dense")

    def joins(self, path: str, size: int) -> bool:
        """Whether that many parameters of a leaf may be in exact blocks of some of them each.

        This is what some get in the place of a diagonal: see `norms` and `tables`.
        """
        return self.betters_diagonal(path, size) and not self.separate_weight_and_bias

    def betters_diagonal(self, path: str, size: int) -> bool:
        """Whether parameters of a leaf that would get a diagonal may get something better."""
        wanted = self.fallback_for(path)
        large = wanted == "dense" and size > self.dense_limit
        return self.curvature == "kronecker" and (wanted == "joint" or large)

    def block_of(self, path: str, size: int, reason: str) -> BlockKind:
        """The block of that many parameters of a leaf that have no Kronecker form.

        Raises:
            ValueError: If there shall be none such.
        """
        wanted = self.fallback_for(path)
        if wanted == "error":
            msg = (
                f"the parameters at {path!r} have no Kronecker form ({reason}), and `fallback` is "
                "'error' for them. Choose 'dense', 'diagonal' or 'none', or leave them out by "
                "`params_filter`."
            )
            raise ValueError(msg)
        small = size <= self.dense_limit or self.curvature == "block"
        dense = small and self.curvature != "diagonal"
        if wanted == "joint":  # of a pair that the model no longer has
            return "diagonal"
        return "diagonal" if wanted == "dense" and not dense else wanted


@no_type_check
def select(
    params_filter: PathFilter = None,
    fallback: str | Mapping[str, str] = "dense",
    dense_limit: int = DENSE_LIMIT,
    *,
    separate_weight_and_bias: bool = False,
    curvature: str = "kronecker",
    factor_kinds: str | Mapping[str, Any] | None = None,
) -> Selection:
    """A selection from the arguments of `kfac`, checked.

    Args:
        params_filter: Patterns as in a shell (``"encoder/*"``; one or several) of paths to cover,
            or a function of the path; ``"last_layer"`` covers the last layer alone. Or a mask, or
            indices, of single parameters.
        fallback: ``"dense"``, ``"diagonal"``, ``"none"`` or ``"error"``; or these by pattern.
        dense_limit: Most parameters of a leaf that get a dense block.
        separate_weight_and_bias: Whether biases get blocks of their own.
        curvature: ``"kronecker"``, ``"diagonal"``, ``"block"`` or ``"full"``.
        factor_kinds: A kind for all input factors but those of lookups; or, by patterns of layers'
            names, one for both factors of a layer, or a pair.

    Raises:
        ValueError: If a value is unknown, or single parameters are chosen for blocks of layers.
        TypeError: If ``params_filter`` is neither patterns nor a function, or a pattern no string.
    """
    pairs = fallback.items() if isinstance(fallback, Mapping) else [(ALL_INPUTS, fallback)]
    for _, value in pairs:
        require_choice("fallback", value, get_args(Fallback))
    for name, by_pattern in (("fallback", fallback), ("factor_kinds", factor_kinds)):
        require_patterns(name, by_pattern)
    require_choice("curvature", curvature, get_args(CurvatureKind))
    require_flags(separate_weight_and_bias=separate_weight_and_bias)
    last_layer = isinstance(params_filter, str) and params_filter == LAST_LAYER
    entries = None if callable(params_filter) else Entries.of(params_filter)
    if entries is not None and curvature not in ("full", "diagonal"):
        msg = (
            "`params_filter` chooses single parameters, which needs `curvature='full'`, one dense "
            f"block of them, or 'diagonal'; found {curvature!r}, whose blocks are of whole layers."
        )
        raise ValueError(msg)
    whole = last_layer or params_filter is None or callable(params_filter) or entries is not None
    patterns = () if whole else _patterns(params_filter)
    by_patterns = None if whole else functools.partial(matches, chosen=patterns)
    return Selection(
        params_filter if callable(params_filter) else by_patterns,
        tuple(pairs),  # type: ignore[arg-type]
        positive_integer("dense_limit", dense_limit, least=0),
        separate_weight_and_bias,
        last_layer,
        curvature,  # type: ignore[arg-type]
        _factor_kinds(factor_kinds),
        patterns,
        entries=entries,
    )


def _factor_kinds(wanted: Any) -> tuple[tuple[str, FactorKinds], ...]:
    """Pairs of a pattern and two kinds, checked."""
    if wanted is None:
        return ()
    if not isinstance(wanted, Mapping):
        return ((ALL_INPUTS, (kind_of(wanted).text, None)),)
    pairs = []
    for pattern, kinds in wanted.items():
        both = kinds if isinstance(kinds, tuple | list) else (kinds, kinds)
        if len(both) != 2:
            msg = (
                "`factor_kinds` takes one kind for a layer, or a pair of them, for the inputs and "
                f"the outputs; found {kinds!r} for {pattern!r}."
            )
            raise ValueError(msg)
        pairs.append((pattern, (kind_of(both[0]).text, kind_of(both[1]).text)))
    return tuple(pairs)


def _patterns(params_filter: Any) -> tuple[str, ...]:
    """The patterns that were passed, checked."""
    chosen = [params_filter] if isinstance(params_filter, str) else params_filter
    if not isinstance(chosen, Sequence) or not all(isinstance(p, str) for p in chosen):
        msg = (
            "`params_filter` must be a pattern such as 'encoder/*', a list of them, 'last_layer', "
            "a function of the path, or for single parameters a mask like `params` or an array of "
            f"indices; found {params_filter!r}."
        )
        raise TypeError(msg)
    return tuple(chosen)


def require_patterns(argument: str, value: object) -> None:
    """Refuse a mapping whose keys are no patterns.

    Raises:
        TypeError: If one is no string.
    """
    for pattern in value if isinstance(value, Mapping) else ():
        if not isinstance(pattern, str):
            msg = f"`{argument}` has the key {pattern!r}; keys must be patterns of names, strings."
            raise TypeError(msg)


def require_matches(
    argument: str, patterns: Sequence[str], names: Sequence[str], words: Sequence[str] = ()
) -> None:
    """Refuse patterns that match no name: they were meant for something that is not there.

    Args:
        argument: The argument that they were passed as.
        patterns: The patterns.
        names: Paths of parameters, or names of layers.
        words: Other values of the argument, one of which may have been meant.

    Raises:
        ValueError: If there is one.
    """
    for pattern in patterns:
        if pattern == ALL_INPUTS or any(matches(name, [pattern]) for name in names):
            continue
        of_layers = ("factor_kinds", "kfac_approx", "wide_factors")
        what = "layers" if argument in of_layers else "parameters"
        msg = f"`{argument}` names {pattern!r}, which matches none of the {what}: {listed(names)}."
        if pattern in words:
            msg += f" The word {pattern!r} stands alone, not in a list."
        else:
            msg += nearest_path(slashed(pattern).strip("*/"), names, words)
        raise ValueError(msg)


def nearest_path(path: str, names: Sequence[str], words: Sequence[str]) -> str:
    """A sentence with the path or module that was meant, be it under another root, or a word."""
    modules = dict.fromkeys(prefix for name in names for prefix in prefixes(name))
    tails = {tail: module for module in reversed(modules) for tail in suffixes(module)}
    known = {**tails, **{word: word for word in (*words, *modules)}}
    for wanted in suffixes(path):
        for near in difflib.get_close_matches(wanted, known, 1):
            return f" Did you mean {known[near]!r}?"
    return ""


def suffixes(path: str) -> list[str]:
    """A path, and what is left of it without the modules that it lies in."""
    parts = path.split("/")
    return ["/".join(parts[k:]) for k in range(len(parts))]


def prefixes(path: str) -> list[str]:
    """A path, and before it the modules that it lies in."""
    parts = path.split("/")
    return ["/".join(parts[: k + 1]) for k in range(len(parts))]


def matches(path: str, chosen: Sequence[str]) -> bool:
    """Whether a path, or a module that it lies in, matches one of the patterns."""
    wanted = [form for pattern in chosen for form in {pattern, slashed(pattern)}]
    return any(fnmatch.fnmatchcase(prefix, p) for prefix in prefixes(path) for p in wanted)


@functools.cache
def slashed(pattern: str) -> str:
    """A path as frontends print it, as a path with slashes; other patterns as they are.

    A key in brackets may hold dots and slashes of its own (haiku's do). What follows a number in
    brackets is no further digit: ``layers[2]*`` is all of layer 2, and nothing of layer 21.
    """
    dotted = "/" not in re.sub(r"\['[^']*'\]|\[\"[^\"]*\"\]", "", pattern)

    def key(found: re.Match[str]) -> str:
        first, second, number, star = found.groups()
        if found[0] == ".":
            return "/" if dotted else "."
        within = star and found.end() < len(pattern)
        return f"/{first or second or number or ''}" + ("/*" if within else "")

    keys = r"""\['([^']*)'\]|\["([^"]*)"\]|\[(\d+)\](\*?)|\.(?=\w|\*)"""
    return re.sub(keys, key, pattern.removesuffix(".value")).lstrip("/")
