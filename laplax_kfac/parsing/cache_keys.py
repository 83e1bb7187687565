"""Cache keys: what tells two programs apart, so that none is compiled twice, and none mistaken.

A model is traced anew at every fit, for it may have changed; what was compiled for it is used
again only if everything that went into the compilation is the same. So is a loss: what its code
refers to may have changed as well. Equations are compared by what JAX itself compares: primitives
and their parameters by their own equality, whatever they print, bodies equation by equation. What
has no hash is unlike everything, so that a program with such a thing in it is not kept.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend.core import Jaxpr
from jax.typing import ArrayLike
from jaxtyping import PyTree

from laplax_kfac import jaxprs, machine
from laplax_kfac.caches import Cache
from laplax_kfac.parsing.program import Program
from laplax_kfac.parsing.structure import Structure, of_value

Made = TypeVar("Made")

_KEPT: weakref.WeakKeyDictionary[Hashable, Cache[Any]] = weakref.WeakKeyDictionary()
"""What was made for a model, as long as the model lives: see `kept`."""


def kept(
    model_fn: object, consts: Sequence[ArrayLike], key: Hashable, make: Callable[[], Made]
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


def of_jaxpr(jaxpr: Jaxpr, consts: Sequence[ArrayLike]) -> Hashable:
    """Equal for jaxprs that compute the same from constants of the same types."""
    return Structure().of(jaxpr), tuple(jax.typeof(c) for c in consts)


def of_function(function: Callable[..., PyTree], *args: PyTree) -> Hashable:
    """Equal for functions that compute the same at arguments of these shapes and dtypes.

    The function is traced, so whatever it refers to counts as it is at this moment.
    """
    jaxpr, consts, output = jaxprs.trace(function, *args)
    return of_jaxpr(jaxpr, consts), of_value(consts), jax.tree.structure(output)
