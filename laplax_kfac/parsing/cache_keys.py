"""Cache keys: what tells two programs apart, so that none is compiled twice, and none mistaken.

A model is traced anew at every fit, for it may have changed; what was compiled for it is used
again only if everything that went into the compilation is the same. So is a loss: what its code
refers to may have changed as well. Equations are compared by what JAX itself compares: primitives
and their parameters by their own equality, whatever they print, bodies equation by equation. What
has no hash is unlike everything, so that a program with such a thing in it is not kept.
"""

import dataclasses
import hashlib
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.typing import ArrayLike

from laplax_kfac import jaxprs, machine
from laplax_kfac.caches import Cache
from laplax_kfac.parsing.program import Program

Made = TypeVar("Made")

_KEPT: weakref.WeakKeyDictionary[Any, Cache[Any]] = weakref.WeakKeyDictionary()
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
        mine = _KEPT.setdefault(model_fn, Cache(machine.MACHINE.passes_kept))
    except TypeError:  # a model that cannot be referred to weakly, or has no hash
        return make()
    found: Made = mine.get(key, make)
    return found


def of_mesh() -> Hashable:
    """The mesh that programs are traced on at this moment."""
    return jax.sharding.get_abstract_mesh()


def of_program(program: Program) -> Hashable:
    """Equal for programs that compile to the same; values of ``program.consts`` play no part."""
    outputs, treedef = jax.tree.flatten(program.output)
    return (
        of_jaxpr(program.jaxpr, program.consts),
        of_mesh(),
        program.space,
        program.space.paths,
        (treedef, tuple((o.shape, str(o.dtype)) for o in outputs)),
        of_value((program.resolved, program.uses, program.custom_vjp)),
    )


def of_jaxpr(jaxpr: Jaxpr, consts: Sequence[Any]) -> Hashable:
    """Equal for jaxprs that compute the same from constants of the same types."""
    return _of_equations(jaxpr), tuple(jax.typeof(c) for c in consts)


def of_function(function: Callable[..., Any], *args: Any) -> Hashable:
    """Equal for functions that compute the same at arguments of these shapes and dtypes.

    The function is traced, so whatever it refers to counts as it is at this moment.
    """
    jaxpr, consts, output = jaxprs.trace(function, *args)
    return of_jaxpr(jaxpr, consts), of_value(consts), jax.tree.structure(output)


def _of_equations(jaxpr: Jaxpr) -> Hashable:
    """Variables by number in the order of their appearance, equations one by one."""
    number: dict[Any, int] = {}
    for variable in [*jaxpr.constvars, *jaxpr.invars]:
        number.setdefault(variable, len(number))

    def of_atom(atom: Any) -> Hashable:
        return of_value(atom.val) if isinstance(atom, Literal) else number[atom]

    def of_equation(eqn: JaxprEqn) -> Hashable:
        operands = tuple(map(of_atom, eqn.invars))
        for variable in eqn.outvars:
            number[variable] = len(number)
        types_out = tuple(variable.aval for variable in eqn.outvars)
        parameters = tuple((name, _of_parameter(v)) for name, v in sorted(eqn.params.items()))
        return eqn.primitive, operands, types_out, parameters, _of_context(eqn), *eqn.effects

    types_in = tuple(variable.aval for variable in [*jaxpr.constvars, *jaxpr.invars])
    equations = tuple(map(of_equation, jaxpr.eqns))
    return types_in, equations, tuple(map(of_atom, jaxpr.outvars))


def _of_context(eqn: JaxprEqn) -> Hashable:
    """What of the context that an equation was traced in changes what it computes."""
    names = ("compute_type", "threefry_partitionable", "cur_abstract_mesh", "xla_metadata")
    return tuple(hashable(getattr(eqn.ctx, name, None)) for name in names)


def _of_parameter(value: Any) -> Hashable:
    """A parameter of an equation: by its own equality; bodies by their equations and constants."""
    if isinstance(getattr(value, "jaxpr", value), Jaxpr):
        body, constants = jaxprs.open_jaxpr(value)
        return _of_equations(body), of_value(constants)
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        return of_value(value)
    if isinstance(value, tuple | list):
        return (type(value), *map(_of_parameter, value))
    if isinstance(value, Mapping):
        return tuple((hashable(k), _of_parameter(v)) for k, v in value.items())
    return hashable(value)


def hashable(value: Any) -> Hashable:
    """The value itself, compared as it compares itself; unlike everything if it has no hash."""
    try:
        hash(value)
    except TypeError:
        return object()
    return type(value), value


def of_value(value: Any) -> Hashable:
    """Equal for values that are made alike: of equal arrays, and of the same code."""
    if isinstance(value, jax.core.Tracer):
        return object()  # unlike everything
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        array = np.asarray(value)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes()).digest()
        return (array.shape, str(array.dtype), digest)
    if isinstance(value, JaxprEqn):
        return None  # told apart by its jaxpr and its site
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
    return hashable(value)
