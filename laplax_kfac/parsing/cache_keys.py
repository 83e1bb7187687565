"""What tells two programs apart, so that one that was compiled before is not compiled again.

A model is traced anew at every fit, for it may have changed; what was compiled for it is used
again only if everything that went into the compilation is the same. So is a loss: what its code
refers to may have changed as well.
"""

import dataclasses
import hashlib
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.typing import ArrayLike

from laplax_kfac import jaxprs
from laplax_kfac.parsing.program import Program

Made = TypeVar("Made")

MOST_KEPT = 16
"""Most compiled functions of one model that are kept, for other calls with it."""

_KEPT: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
"""What was made for a model, as long as the model lives: see `kept`."""


def kept(
    model_fn: Any, consts: Sequence[ArrayLike], key: Hashable, make: Callable[[], Made]
) -> Made:
    """What was made for a model under an equal key before; made now if there is no such thing.

    Args:
        model_fn: The model; what is made for it is kept no longer than it lives.
        consts: Arrays that it closes over. Where they belong to a transformation, which ends,
            nothing is kept.
        key: All that it depends on: `of_program`, and what else there is.
        make: Makes it; not with ``consts``, which may be others when it is used again.
    """
    if jaxprs.is_traced(list(consts)):
        return make()
    try:
        mine = _KEPT.setdefault(model_fn, {})
    except TypeError:  # a model that cannot be referred to weakly, or has no hash
        return make()
    if key not in mine:
        while len(mine) >= MOST_KEPT:
            mine.pop(next(iter(mine)))
        mine[key] = make()
    return mine[key]


def of_program(program: Program) -> Hashable:
    """Equal for programs that compile to the same; values of ``program.consts`` play no part."""
    outputs, treedef = jax.tree.flatten(program.output)
    return (
        of_jaxpr(program.jaxpr, program.consts),
        program.space,
        program.space.paths,
        (treedef, tuple((o.shape, str(o.dtype)) for o in outputs)),
        of_value((program.resolved, program.uses, program.custom_vjp)),
    )


def of_jaxpr(jaxpr: Jaxpr, consts: Sequence[Any]) -> Hashable:
    """Equal for jaxprs that compute the same from constants of the same shapes."""
    return str(jaxpr), _inner_constants(jaxpr), tuple((c.shape, str(c.dtype)) for c in consts)


def of_function(function: Callable[..., Any], *args: Any) -> Hashable:
    """Equal for functions that compute the same at arguments of these shapes and dtypes.

    The function is traced, so whatever it refers to counts as it is at this moment.
    """
    jaxpr, consts, output = jaxprs.trace(function, *args)
    return of_jaxpr(jaxpr, consts), of_value(consts), jax.tree.structure(output)


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
