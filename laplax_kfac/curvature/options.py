"""Options of a curvature: one record at the public door, checked once, and what becomes of it."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, cast

import jax
from jaxtyping import Array, Key

from laplax_kfac import summaries
from laplax_kfac.arguments import (
    no_type_check,
    positive_integer,
    require_choice,
    require_flags,
    require_key,
)
from laplax_kfac.factors import KFAC_APPROXIMATIONS, KfacApprox
from laplax_kfac.faults import NONFINITE
from laplax_kfac.fisher import Columns, fisher_type_of
from laplax_kfac.likelihood.named import Loss, resolve_likelihood
from laplax_kfac.parsing.layer import Layer
from laplax_kfac.parsing.selection import (
    DENSE_LIMIT,
    FACTOR_LIMIT,
    FactorLimit,
    PathFilter,
    Selection,
    matches,
    require_matches,
    require_patterns,
    select,
)


class OptionKeywords(TypedDict, total=False):
    """The attributes of `Options` as keywords."""

    fisher_type: str
    mc_samples: int
    sketches: int | None
    key: Key[Array, ""] | None
    kfac_approx: str | Mapping[str, str]
    curvature: str
    params_filter: PathFilter
    fallback: str | Mapping[str, str]
    dense_limit: int
    factor_kinds: str | Mapping[str, Any] | None
    max_factor_size: int
    wide_factors: str | Mapping[str, str]
    separate_weight_and_bias: bool
    vmap_over_data: bool
    nonfinite: str


@no_type_check
@summaries.summarised
@dataclass(frozen=True, eq=False)
class Options:
    """What kind of curvature is computed; each is also a keyword of the functions that take it.

    Attributes:
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
            examples, ``"reduce"`` summed up over all uses (Eschenhagen et al. 2023); or these
            by patterns of layers' names, ``"expand"`` for those that match none.
        curvature: ``"kronecker"``; or, from the same quantities, the exact ``"diagonal"``, the
            exact dense ``"block"`` of every layer, or ``"full"``, the exact matrix of all covered
            parameters as one dense block. `find_layers` says before what that costs.
        params_filter: Which parameters get curvature: patterns of paths as in a shell
            (``"encoder/*"``, or as frontends print them, ``"layers[2]*"``; one or several), a
            function of the path, or ``"last_layer"``. With ``curvature`` ``"full"`` or
            ``"diagonal"`` also single parameters, a subnetwork: a pytree of booleans like the
            parameters, as `masks` makes them, or an array of indices in their flat order. The
            others are frozen at their value; all are covered by default.
        fallback: Block of parameters without a Kronecker form: ``"dense"`` (up to ``dense_limit``,
            above a diagonal, but exact blocks of a few for norm layers and tables of positions),
            ``"diagonal"``, ``"none"``, or ``"error"``; or these by pattern.
        dense_limit: Most parameters of a leaf that get a dense block.
        factor_kinds: What Kronecker factors may be: ``"dense"``, ``"diagonal"``, ``"identity"`` (a
            multiple of it), or ``"blocked:64"`` for blocks of 64 neighbouring features. One kind is
            for all input factors but those of lookups; or give, by patterns of layers' names, one
            for both factors, or a pair for inputs and outputs. Dense by default up to
            ``max_factor_size``, and diagonal for rows that data pick.
        max_factor_size: Most features of a factor that is dense by default, and most parameters of
            any dense block.
        wide_factors: What wider factors are: ``"diagonal"``; ``"blocks"``, of ``max_factor_size``
            neighbouring features; or an ``"error"``. Or these by patterns of layers' names,
            ``"diagonal"`` for those that match none. `find_layers` says which are.
        separate_weight_and_bias: Whether biases get blocks of their own.
        vmap_over_data: Whether ``model_fn`` takes one example (laplax's convention) or a batch.
        nonfinite: ``"error"`` refuses data, parameters or a model that make the curvature NaN or
            infinite, at the end of the pass, and names the first batch and the layers; ``"keep"``
            returns it as it is.

    Raises:
        ValueError: If an option has an unknown value, or two exclude each other. When the model
            is known, if a pattern matches nothing in it.
        TypeError: If one is of an unsupported type.
    """

    fisher_type: str = "type2"
    mc_samples: int = 1
    sketches: int | None = None
    key: Key[Array, ""] | None = None
    kfac_approx: str | Mapping[str, str] = "expand"
    curvature: str = "kronecker"
    params_filter: PathFilter = None
    fallback: str | Mapping[str, str] = "dense"
    dense_limit: int = DENSE_LIMIT
    factor_kinds: str | Mapping[str, Any] | None = None
    max_factor_size: int = FACTOR_LIMIT
    wide_factors: str | Mapping[str, str] = "diagonal"
    separate_weight_and_bias: bool = False
    vmap_over_data: bool = True
    nonfinite: str = "error"

    def __post_init__(self) -> None:
        self.selection()
        require_flags(vmap_over_data=self.vmap_over_data)
        if self.key is not None:
            require_key("key", self.key)
        fisher = fisher_type_of(self.fisher_type)
        require_patterns("kfac_approx", self.kfac_approx)
        for _, value in self._approximations():
            require_choice("kfac_approx", value, KFAC_APPROXIMATIONS)
        positive_integer("mc_samples", self.mc_samples)
        require_choice("nonfinite", self.nonfinite, NONFINITE)
        if self.sketches is not None:
            positive_integer("sketches", self.sketches)
            if not fisher.takes_sketches:
                msg = (
                    "`sketches` combines the columns of the loss Hessian's root, which only "
                    f"fisher_type='type2' pulls back; found {self.fisher_type!r}, leave `sketches` "
                    "out."
                )
                raise ValueError(msg)
        if fisher.columns is None and self.curvature != "kronecker":
            msg = (
                f"`fisher_type={self.fisher_type!r}` defines Kronecker factors alone: it needs "
                f"`curvature='kronecker'`, found {self.curvature!r}."
            )
            raise ValueError(msg)

    @classmethod
    def of(cls, options: "Options | None", keywords: Mapping[str, Any]) -> "Options":
        """Options with some of them changed by keywords.

        Raises:
            TypeError: If there is no option of a name, or ``options`` are no `Options`.
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" did you mean {near[0]!r}?" if near else ""
                msg = f"unexpected keyword argument {name!r};{hint} options are {known}."
                raise TypeError(msg)
        if options is not None and not isinstance(options, cls):
            msg = f"`options` must be laplax_kfac.Options, got {type(options).__name__}."
            raise TypeError(msg)
        return cls(**keywords) if options is None else replace(options, **keywords)

    def selection(self) -> Selection:
        """Which parameters are covered, and which blocks they get."""
        selection = select(
            self.params_filter,
            self.fallback,
            self.dense_limit,
            separate_weight_and_bias=self.separate_weight_and_bias,
            curvature=self.curvature,
            factor_kinds=self.factor_kinds,
        )
        return replace(selection, limit=FactorLimit.of(self.max_factor_size, self.wide_factors))

    def settings(self, loss_fn: Loss) -> "Settings":
        """What a pass over data needs of the options.

        Raises:
            ValueError: If the loss has an unknown name.
            TypeError: If it is neither a name nor a callable.
        """
        sketches = None if self.sketches is None else positive_integer("sketches", self.sketches)
        return Settings(
            Columns(
                resolve_likelihood(loss_fn),
                fisher_type_of(self.fisher_type),
                positive_integer("mc_samples", self.mc_samples),
                sketches,
            ),
            jax.random.key(0) if self.key is None else self.key,
            tuple((k, cast(KfacApprox, v)) for k, v in self._approximations()),
            self.selection(),
            self.vmap_over_data,
            self.nonfinite,
        )

    def _approximations(self) -> list[tuple[str, str]]:
        given = self.kfac_approx
        return list(given.items()) if isinstance(given, Mapping) else [("*", given)]


@summaries.summarised
@dataclass(frozen=True, eq=False)
class Settings:
    """What a pass over data works with.

    Attributes:
        columns: The vectors that are pulled back.
        key: Random key.
        kfac_approx: Pairs of a pattern of layers' names and the treatment of weight sharing.
        selection: Which parameters are covered, and which blocks they get.
        vmap_over_data: Whether the model takes one example or a batch.
        nonfinite: Whether numbers that are not finite are an error, or are kept.
    """

    columns: Columns
    key: Key[Array, ""]
    kfac_approx: tuple[tuple[str, KfacApprox], ...]
    selection: Selection
    vmap_over_data: bool
    nonfinite: str

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
        require_matches("kfac_approx", [pattern for pattern, _ in self.kfac_approx], names)
