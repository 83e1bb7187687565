"""The names of our curvature types, in any case, wherever laplax looks a curvature type up.

``laplace`` looks names up in the enumeration ``CurvApprox``, in small letters; the functions below
it look them up in six dictionaries, as they are spelt.
"""

from collections import UserDict
from types import ModuleType
from typing import TypeAlias

import laplax.curv.cov
import laplax.enums
import laplax.eval.likelihood
import laplax.register

from laplax_kfac.laplax_adapter import curvature_types

TABLES = (
    "CURVATURE_METHODS",
    "CURVATURE_PRECISION_METHODS",
    "CURVATURE_TO_POSTERIOR_STATE",
    "CURVATURE_STATE_TO_SCALE",
    "CURVATURE_STATE_TO_COV",
    "CURVATURE_MARGINAL_LOG_LIKELIHOOD",
)
"""laplax's dictionaries from names of curvature types to functions."""

Function: TypeAlias = object


class AnyCase(UserDict[str, Function]):
    """One of laplax's dictionaries, in which our names are found in any case.

    The entries are laplax's own dictionary, not a copy: what is added to either is in both.
    """

    def __init__(self, table: dict[str, Function] | UserDict[str, Function]) -> None:
        super().__init__()
        # If we have been here before, it is already one of these.
        self.data = table.data if isinstance(table, UserDict) else table

    def __missing__(self, name: object) -> Function:
        if isinstance(name, str) and name.lower() in curvature_types.CURVATURE_TYPES:
            return self.data[name.lower()]
        raise KeyError(name)


def in_any_case() -> None:
    """Let laplax find our names in any case."""
    modules: list[ModuleType] = [laplax.curv.cov, laplax.eval.likelihood, laplax.register]
    for module in modules:
        for name in TABLES:
            if hasattr(module, name):
                setattr(module, name, AnyCase(getattr(module, name)))


# -- the enumeration ---------------------------------------------------------------------------


def add_members() -> None:
    """Make ``CurvApprox("kfac")`` and ``CurvApprox.KFAC`` valid, and so on.

    An enumeration is closed, but asks ``_missing_`` about values that it does not know. So they are
    members by value and by attribute; ``list(CurvApprox)`` and ``CurvApprox["KFAC"]`` know laplax's
    own only. A type that was registered with one of ours as its default becomes a member when it is
    asked for.
    """
    enum = laplax.enums.CurvApprox
    enum._missing_ = classmethod(lambda _, value: member(value))
    for name in curvature_types.CURVATURE_TYPES:
        member(name)


def member(value: object) -> object | None:
    """The member of the enumeration for a curvature type of ours; None for others."""
    enum = laplax.enums.CurvApprox
    wanted = value.lower() if isinstance(value, str) else value
    for name, create in laplax.curv.cov.CURVATURE_METHODS.items():
        if str(name).lower() == wanted and isinstance(create, curvature_types.CurvatureType):
            if getattr(enum, name.upper(), None) != name:
                made = str.__new__(enum, name)
                made._name_, made._value_ = name.upper(), name
                setattr(enum, name.upper(), made)
            return getattr(enum, name.upper())
    return None
