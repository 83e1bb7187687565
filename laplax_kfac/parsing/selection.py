"""Which parameters get curvature, and which block those get that have no Kronecker form."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from laplax_kfac.arguments import no_type_check
from laplax_kfac.bases import kind_of
from laplax_kfac.parsing.layer import BlockKind

Fallback = Literal["dense", "diagonal", "none", "error"]
CurvatureKind = Literal["kronecker", "diagonal", "block"]
FactorKinds = tuple[str | None, str | None]
PathFilter = str | Sequence[str] | Callable[[str], bool] | None

LAST_LAYER = "last_layer"
ALL_INPUTS = "*"
DENSE_LIMIT = 256


@dataclass(frozen=True)
class Selection:
    """How parameters are grouped into blocks; paths are written ``encoder/attention/kernel``.

    Attributes:
        params_filter: Whether the parameters at a path are covered; None covers all.
        fallback: Pairs of a pattern and the block for parameters without a Kronecker form at
            paths that match it; the first match counts, ``"dense"`` where none does.
        dense_limit: Most parameters of a leaf that get a dense block; more get a diagonal.
        separate_weight_and_bias: Whether biases get blocks of their own.
        last_layer: Whether only the last layer is covered.
        factor_kinds: Pairs of a pattern of layers' names and the kinds of their input and output
            factors; the first match counts, and where there is none, or None, the default.
        curvature: Whether layers with a Kronecker form get Kronecker blocks; or every parameter
            its exact diagonal entry; or every layer its exact dense block.
    """

    params_filter: Callable[[str], bool] | None = None
    fallback: tuple[tuple[str, Fallback], ...] = ()
    dense_limit: int = DENSE_LIMIT
    separate_weight_and_bias: bool = False
    last_layer: bool = False
    curvature: CurvatureKind = "kronecker"
    factor_kinds: tuple[tuple[str, FactorKinds], ...] = ()

    def kinds_for(self, layer: str) -> FactorKinds:
        """The kinds of factors that are asked for in a layer; None for the default."""
        kinds = (kinds for pattern, kinds in self.factor_kinds if matches(layer, [pattern]))
        return next(kinds, (None, None))

    def check_kinds(self, layers: Sequence[str]) -> None:
        """Refuse patterns of `factor_kinds` that are no layer's.

        Raises:
            ValueError: If there is one.
        """
        for pattern, _ in self.factor_kinds:
            if not any(matches(name, [pattern]) for name in layers):
                msg = (
                    f"`factor_kinds` names {pattern!r}, which matches none of the layers "
                    f"{list(layers)}."
                )
                raise ValueError(msg)

    def covers(self, path: str) -> bool:
        """Whether the parameters at a path are covered."""
        return self.params_filter is None or bool(self.params_filter(path))

    def fallback_for(self, path: str) -> Fallback:
        """The block of parameters at a path that have no Kronecker form."""
        return next((f for pattern, f in self.fallback if matches(path, [pattern])), "dense")

    def block_of(self, path: str, size: int, reason: str, *, real: bool) -> BlockKind:
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
        dense = real and small and self.curvature != "diagonal"
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
            or a function of the path; ``"last_layer"`` covers the last layer alone.
        fallback: ``"dense"``, ``"diagonal"``, ``"none"`` or ``"error"``; or these by pattern.
        dense_limit: Most parameters of a leaf that get a dense block.
        separate_weight_and_bias: Whether biases get blocks of their own.
        curvature: ``"kronecker"``, ``"diagonal"`` or ``"block"``.
        factor_kinds: A kind for all input factors but those of lookups; or, by patterns of layers'
            names, one for both factors of a layer, or a pair.

    Raises:
        ValueError: If a value is unknown.
        TypeError: If ``params_filter`` is neither patterns nor a function.
    """
    pairs = fallback.items() if isinstance(fallback, Mapping) else [("*", fallback)]
    for _, value in pairs:
        if value not in get_args(Fallback):
            msg = f"`fallback` must be one of {get_args(Fallback)}, found {value!r}."
            raise ValueError(msg)
    if not isinstance(dense_limit, int) or dense_limit < 0:
        msg = f"`dense_limit` must be an integer of at least 0, found {dense_limit!r}."
        raise ValueError(msg)
    if curvature not in get_args(CurvatureKind):
        msg = f"`curvature` must be one of {get_args(CurvatureKind)}, found {curvature!r}."
        raise ValueError(msg)
    last_layer = isinstance(params_filter, str) and params_filter == LAST_LAYER
    return Selection(
        None if last_layer else _as_function(params_filter),
        tuple(pairs),  # type: ignore[arg-type]
        dense_limit,
        separate_weight_and_bias,
        last_layer,
        curvature,  # type: ignore[arg-type]
        _factor_kinds(factor_kinds),
    )


def _factor_kinds(wanted: Any) -> tuple[tuple[str, FactorKinds], ...]:
    """Pairs of a pattern and two kinds, checked."""
    if wanted is None:
        return ()
    if not isinstance(wanted, Mapping):
        return ((ALL_INPUTS, (kind_of(wanted).text, None)),)
    pairs = []
    for pattern, kinds in wanted.items():
        both = (kinds, kinds) if isinstance(kinds, str) else tuple(kinds)
        if len(both) != 2:
            msg = (
                "`factor_kinds` takes one kind for a layer, or a pair of them, for the inputs and "
                f"the outputs; found {kinds!r} for {pattern!r}."
            )
            raise ValueError(msg)
        pairs.append((pattern, (kind_of(both[0]).text, kind_of(both[1]).text)))
    return tuple(pairs)


def _as_function(params_filter: Any) -> Callable[[str], bool] | None:
    if params_filter is None or callable(params_filter):
        return params_filter
    chosen = [params_filter] if isinstance(params_filter, str) else params_filter
    if not isinstance(chosen, Sequence) or not all(isinstance(p, str) for p in chosen):
        msg = (
            "`params_filter` must be a pattern such as 'encoder/*', a list of them, 'last_layer', "
            f"or a function of the path; found {params_filter!r}."
        )
        raise TypeError(msg)
    return lambda path: matches(path, chosen)


def matches(path: str, chosen: Sequence[str]) -> bool:
    """Whether a path, or a module that it lies in, matches one of the patterns."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: k + 1]) for k in range(len(parts))]
    return any(fnmatch.fnmatchcase(prefix, p) for prefix in prefixes for p in chosen)
