"""The public record of a layer: which parameters it holds and which curvature block it gets."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from laplax_kfac.bases import Dense, Diagonal, Kind, kind_of
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Segment

FROZEN = "frozen"
"""Pattern of parameters that are left out: fixed at their value."""

NORM = "norm"
MADE = "made"
"""Pattern of matrices of parameters whose function is a weight, and acts not on two sides apart."""
"""Pattern of the scale and the shift of a norm layer, in one block a feature."""
TABLE = "table"
"""Pattern of parameters that are added, each at places of its own, in one block a row."""
CHOSEN = "chosen"
"""Pattern of parameters whose block is on themselves, whatever their use: the dense matrix of all
that are covered, or the diagonal of some that are chosen one by one."""

ROOTS = ("", "params", "~")
"""Paths at which frameworks keep what belongs to no module: flax.linen's and haiku's."""

BlockKind = Literal["kronecker", "dense", "diagonal", "none"]


@dataclass(frozen=True)
class Layer:
    """A group of parameters that share one curvature block.

    Attributes:
        name: Path of the layer in the parameter pytree, e.g. ``"encoder/attention/query"``.
        pattern: How the model uses the parameters: ``"dense"``, ``"conv"``, ``"bias"``,
            ``"scale"``, ..., ``"unused"``, ``"frozen"``, or ``"chosen"`` where a block is on them
            whatever their use.
        params: Paths of the leaves, as ``jax.tree_util.keystr`` writes them.
        block: ``"kronecker"``, ``"dense"``, ``"diagonal"``, or ``"none"`` where the parameters
            cannot influence the output, so that their posterior is the prior, and where they are
            frozen, so that they have no uncertainty.
        in_features: Rows of the weight matrix, without a joint bias; the number of parameters
            where these are no weight.
        out_features: Columns of the weight matrix; 1 where the parameters are no weight.
        positions: Places one example shares the weight over, S; 1 without weight sharing.
        stack: Independent matrices in the block: groups, heads, experts, scanned layers.
        bias: Whether a bias is joint with the weight, as the last row of its matrix.
        uses: How often the model uses the weight.
        sides: Kinds of the input factor and of the output factor of a Kronecker block, as
            `bases.kind_of` reads them.
        reason: Why this block, and no better one.
        segments: Ids of the block's rows, in order.
    """

    name: str
    pattern: str
    params: tuple[str, ...]
    block: BlockKind
    in_features: int
    out_features: int
    positions: int = 1
    stack: int = 1
    bias: bool = False
    uses: int = 1
    sides: tuple[str, str] = ("dense", "dense")
    reason: str = ""
    segments: tuple[Segment, ...] = field(default=(), repr=False)

    @property
    def frozen(self) -> bool:
        """Whether the parameters are fixed at their value."""
        return self.pattern == FROZEN

    @property
    def is_matrix(self) -> bool:
        """Whether the parameters are those of a weight matrix, whatever its block."""
        return bool(self.segments) and len(self.segments[0].shape) == 3

    @property
    def rows(self) -> int:
        """Rows of the layer's matrix: the inputs, and one more for a joint bias."""
        return self.in_features + int(self.bias)

    @property
    def size(self) -> int:
        """Number of parameters in the block."""
        return self.stack * self.rows * self.out_features

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a vector viewed in this block; a leading axis only for a stack."""
        if self.block == "dense" or not self.is_matrix:
            return (self.size,)
        matrix = (self.rows, self.out_features)
        return matrix if self.stack == 1 else (self.stack, *matrix)

    @property
    def size_text(self) -> str:
        """Its size for tables: inputs (and 1 for a joint bias) by outputs, or how many numbers."""
        if not self.is_matrix:
            return str(self.size)
        return f"{self.in_features}{'+1' if self.bias else ''} x {self.out_features}"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What the block's matrix may be along every axis of a vector in it: one kind a side."""
        if self.block == "kronecker":
            return tuple(map(kind_of, self.sides))
        if self.block == "dense":
            return (Dense(),)
        return (Diagonal(),) * (2 if self.is_matrix else 1)

    @property
    def factor_elements(self) -> int:
        """Numbers in the sums of a Kronecker block, for one use; none for other blocks."""
        if self.block != "kronecker":
            return 0
        pairs = zip(self.kinds, (self.rows, self.out_features), strict=True)
        return self.stack * sum(kind.num_elements(size) for kind, size in pairs)

    @property
    def basis_elements(self) -> int:
        """Numbers in the bases of the block."""
        if self.block == "kronecker":
            pairs = zip(self.kinds, (self.rows, self.out_features), strict=True)
            return self.stack * sum(kind.num_in_basis(size) for kind, size in pairs)
        return sum(kind.num_in_basis(self.size) for kind in self.kinds)

    @property
    def first(self) -> int:
        """Id of the first parameter of its matrix."""
        return self.segments[0].first if self.size else 0


@dataclass(frozen=True)
class Repeated:
    """Layers that differ in the numbers in their names alone, as those of a transformer's blocks.

    Attributes:
        name: Their name, with ``*`` for the numbers that differ.
        layers: The layers, at least one.
    """

    name: str
    layers: tuple[Layer, ...]

    @property
    def label(self) -> str:
        """Their name, and how many they are."""
        return self.name if len(self.layers) == 1 else f"{self.name} (x {len(self.layers)})"

    @classmethod
    def among(cls, layers: Iterable[Layer]) -> "list[Repeated]":
        """All layers, in the order of the first of their like; pairs are not joined."""
        groups: dict[object, list[Layer]] = {}
        for layer in layers:
            masked = re.sub(r"\d+", "*", layer.name)
            like = replace(layer, name=masked, params=(), segments=())
            groups.setdefault((like, layer.is_matrix), []).append(layer)
        found = []
        for group in groups.values():
            if len(group) < 3:
                found += [cls(layer.name, (layer,)) for layer in group]
                continue
            parts = zip(*(re.split(r"(\d+)", layer.name) for layer in group), strict=True)
            name = "".join(same[0] if len({*same}) == 1 else "*" for same in parts)
            found.append(cls(name, tuple(group)))
        return found


def unique_names(layers: Sequence[Layer], space: ParameterSpace) -> list[str]:
    """Name a layer by the module its parameters share, if no other layer does; else by its leaf."""
    name_of = dict(zip(space.paths, space.names, strict=True))
    modules = [{name_of[p].rpartition("/")[0] for p in layer.params} for layer in layers]
    owners = Counter(module for own in modules for module in own)
    names = []
    for layer, own in zip(layers, modules, strict=True):
        module = min(own)
        alone = module not in ROOTS and len(own) == 1 and owners[module] == 1
        path = space.paths[space.leaf_at(layer.first)] if layer.size else layer.params[0]
        names.append(module if alone else name_of[path])
    ranged = [_with_range(n, layer, space) if names.count(n) > 1 else n
              for n, layer in zip(names, layers, strict=True)]  # fmt: skip
    return [
        n if n not in ranged[:k] else f"{n}#{ranged[:k].count(n) + 1}" for k, n in enumerate(ranged)
    ]


def _with_range(name: str, layer: Layer, space: ParameterSpace) -> str:
    """The name of one of several layers in a leaf: with where its weight begins and ends."""
    if not layer.size:
        return name
    leaf = space.leaf_at(layer.first)
    begin = layer.first - space.offsets[leaf]
    end = min(begin + math.prod(layer.segments[0].shape), math.prod(space.real_shapes[leaf]))
    return f"{name}[{begin}:{end}]"
