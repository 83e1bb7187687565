"""What tells two programs apart, so that one that was compiled before is not compiled again.

A model is traced anew at every fit, for it may have changed; what was compiled for it is used
again only if everything that went into the compilation is the same.
"""

import dataclasses
import hashlib
import types
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from laplax_kfac import jaxprs
from laplax_kfac.parser import Program


def of_program(program: Program) -> Hashable:
    """Equal for programs that compile to the same; values of ``program.consts`` play no part."""
    outputs, treedef = jax.tree.flatten(program.output)
    return (
        str(program.jaxpr),
        _inner_constants(program.jaxpr),
        tuple((c.shape, str(c.dtype)) for c in program.consts),
        program.space,
        program.space.paths,
        (treedef, tuple((o.shape, str(o.dtype)) for o in outputs)),
        of_value((program.resolved, program.uses, program.custom_vjp)),
    )


def _inner_constants(jaxpr: Jaxpr) -> Hashable:
    """Arrays that bodies inside a jaxpr carry along: a compilation has their values."""
    found: list[Hashable] = []
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(getattr(inner, "jaxpr", inner), Jaxpr):
                    body, constants = jaxprs.open_jaxpr(inner)
                    found += [of_value(constants), _inner_constants(body)]
    return tuple(found)


def of_value(value: Any) -> Hashable:
    """Equal for values that are made alike: of equal arrays, and of the same code."""
    if isinstance(value, jax.core.Tracer):
        return object()  # unlike everything
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        array = np.asarray(value)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()
        return (array.shape, str(array.dtype), digest)
    if isinstance(value, JaxprEqn):
        return None  # told apart by the text of its jaxpr and its site
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [of_value(getattr(value, f.name)) for f in dataclasses.fields(value)]
        return (type(value), *parts)
    if isinstance(value, types.FunctionType):
        cells = tuple(of_value(cell.cell_contents) for cell in value.__closure__ or ())
        return (value.__code__, cells, of_value(value.__defaults__))
    if isinstance(value, Mapping):
        return tuple((k, of_value(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(of_value(v) for v in value)
    return value if isinstance(value, Hashable) else object()  # unlike everything
