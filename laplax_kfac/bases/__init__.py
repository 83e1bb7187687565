"""Bases: what matrices one side of a block may be, and the eigenbasis that it becomes.

`contract` says what a kind promises; `dense`, `blocked`, `diagonal` and `identity` keep it. Nothing
outside asks which kind a side is. To add one: a file here, and a line in `KINDS`.
"""

from collections.abc import Callable

from laplax_kfac.bases.blocked import Blocked
from laplax_kfac.bases.contract import Basis, Kind, Side, Sum, sum_into_rows
from laplax_kfac.bases.dense import Dense
from laplax_kfac.bases.diagonal import UNROTATED, Diagonal, Unrotated
from laplax_kfac.bases.eigh import eigh, eigh_each
from laplax_kfac.bases.identity import Identity

__all__ = [
    "KINDS", "UNROTATED", "Basis", "Blocked", "Dense", "Diagonal", "Identity", "Kind", "Side",
    "Sum", "Unrotated", "common_kind", "eigh", "eigh_each", "kind_of", "sum_into_rows",
]  # fmt: skip

KINDS: dict[str, Callable[..., Kind]] = {
    "identity": Identity,
    "diagonal": Diagonal,
    "blocked": Blocked,
    "dense": Dense,
}
"""Name -> kind; from the least general to the one that contains all."""


def kind_of(text: object) -> Kind:
    """The kind that a text stands for, such as ``"dense"`` or ``"blocked:32"``.

    Raises:
        ValueError: If it stands for none.
    """
    name, *options = text.split(":") if isinstance(text, str) else ("",)
    try:
        return KINDS[name](*map(int, options))
    except (KeyError, TypeError, ValueError) as error:
        kinds = ", ".join(repr(make().text) for make in KINDS.values())
        msg = f"{text!r} is no kind of factor; the kinds of `factor_kinds` are {kinds}."
        raise ValueError(msg) from error


def common_kind(first: Kind, second: Kind) -> Kind:
    """The least general kind that contains both."""
    if first == second:
        return first
    if first.generality == second.generality:
        return Dense()
    return max(first, second, key=lambda kind: kind.generality)
