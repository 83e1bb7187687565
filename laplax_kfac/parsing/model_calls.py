"""Calls of the model, and what is wrong where one fails.

Whatever a model raises on an example is raised again with what it was called with and what is
nearest to it that works: another signature, a batch instead of an example. Looking for it traces
the model again, which costs something only where it fails.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check, require_callable, shown

ModelFn = Callable[..., PyTree]

SHOWN = 240
"""Most characters of a description of a pytree, or of a model's own message."""
NAMES_OF_PARAMS = ("params", "parameters", "variables", "weights", "theta", "p", "w", "state")
NAMES_OF_KEYS = ("rng", "rngs", "key")


def require_model(model_fn: object) -> None:
    """Refuse what is no function, before anything is done with it.

    Raises:
        TypeError: If it is none.
    """
    require_callable("model_fn", model_fn, "a function of `input` and `params`")


@no_type_check
def call(model_fn: ModelFn, params: PyTree, x: PyTree, *, batched: bool) -> PyTree:
    """The model's output; not a call is made but by the names ``input`` and ``params``.

    Args:
        model_fn: ``model_fn(input=, params=)``.
        params: Its parameters.
        x: One example, or a batch of one where ``batched``.
        batched: Whether the model takes batches.

    Raises:
        TypeError: If the model fails, or returns something else than arrays of floating-point
            numbers.
    """
    require_model(model_fn)
    try:
        output = model_fn(input=x, params=params)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        msg = wrong_signature(model_fn) or failure(model_fn, params, x, error, batched=batched)
        raise TypeError(msg) from error
    require_output(output, batched=batched)
    return output


def require_output(output: PyTree, *, batched: bool) -> None:
    """Refuse what is no output: something that has no derivative, or lacks the axis of a batch.

    Raises:
        TypeError: If it is such.
    """
    leaves = jax.tree.leaves(output)
    wrong = [leaf for leaf in leaves if not hasattr(leaf, "dtype")]
    if wrong or not leaves:
        found = shown(wrong[0]) if wrong else "nothing"
        msg = f"`model_fn` must return an array, or a pytree of arrays; it returns {found}."
        raise TypeError(msg)
    if not any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves):
        msg = (
            f"`model_fn` returns {described(output)}, which has no derivative: it must return what "
            "the loss takes, such as logits, not classes."
        )
        raise TypeError(msg)
    if batched and any(jnp.shape(leaf)[:1] != (1,) for leaf in leaves):
        msg = (
            "With `vmap_over_data=False` `model_fn` takes a batch, and must return arrays with the "
            f"axis of examples in front; for a batch of one it returns {described(output)}."
        )
        raise TypeError(msg)


def wrong_signature(model_fn: ModelFn) -> str:
    """What is wrong with the arguments that the model takes, and how to wrap it; or nothing."""
    try:
        signature = inspect.signature(model_fn)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(input=None, params=None)
    except TypeError:
        name = getattr(model_fn, "__name__", type(model_fn).__name__)
        parameters = str(signature)[:SHOWN]
        return (
            f"`model_fn` must take the keywords `input` and `params`, by laplax's convention; "
            f"{name} takes {parameters}. Wrap it: {wrapped(name, signature)}."
        )
    return ""


def wrapped(name: str, signature: inspect.Signature) -> str:
    """A function of ``input`` and ``params`` that calls another one, as far as names tell."""
    name = "f" if name == "<lambda>" else name
    arguments = []
    for parameter in signature.parameters.values():
        one, many = parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL
        if parameter.kind not in (one, parameter.POSITIONAL_ONLY, many):
            continue
        if parameter.default is not parameter.empty:
            continue
        if parameter.name in NAMES_OF_PARAMS and "params" not in arguments:
            arguments.append("params")
        elif parameter.name in NAMES_OF_KEYS:
            arguments.append("None")
        elif "input" not in arguments:
            arguments.append("input")
        elif "params" not in arguments:
            arguments.append("params")
    if "params" not in arguments:
        return (
            "the parameters must be an argument, as in `lambda input, params: "
            "eqx.combine(params, static)(input)` (equinox) or `lambda input, params: "
            "nnx.merge(graphdef, params)(input)` (flax.nnx)"
        )
    return f"`lambda input, params: {name}({', '.join(arguments)})`"


def failure(
    model_fn: ModelFn, params: PyTree, x: PyTree, error: Exception, *, batched: bool
) -> str:
    """What a model was called with, what it raised, and what is nearest that works."""
    said = str(error).partition("\n")[0][:SHOWN].rstrip(".")
    names = isinstance(error, KeyError | AttributeError)
    return (
        f"`model_fn` fails on {'a batch of one' if batched else 'one'} example "
        f"({type(error).__name__}: {said}). It was called with `input` = {described(x)} and "
        f"`params` = {described(params)}. "
        + (
            "It looks for a name that is not there: are these its parameters?"
            if names
            else advice(model_fn, params, x, batched=batched)
        )
    )


def advice(model_fn: ModelFn, params: PyTree, x: PyTree, *, batched: bool) -> str:
    """What to do about a model that fails on an example."""
    leaves, treedef = jax.tree.flatten(x)
    if all(hasattr(leaf, "shape") for leaf in leaves):
        shapes = [leaf.shape[1:] if batched else (1, *leaf.shape) for leaf in leaves]
        specs = [jax.ShapeDtypeStruct(s, a.dtype) for s, a in zip(shapes, leaves, strict=True)]
        if leaves and works(model_fn, params, jax.tree.unflatten(treedef, specs)):
            if batched:
                return "It takes single examples: leave `vmap_over_data=True`."
            return "It takes batches: pass `vmap_over_data=False`."
        if not batched and any(leaf.ndim == 0 for leaf in leaves):
            return (
                "The example is a single number: is the axis of examples missing in front, or are "
                "input and target swapped? A batch is (input, target)."
            )
    return (
        "Batches are (input, target), all arrays of `data` and `inputs` have an axis of examples "
        "in front, and behind it what `model_fn` takes."
    )


def works(model_fn: ModelFn, params: PyTree, x: PyTree) -> bool:
    """Whether a model takes an input of other shapes."""

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))

    try:
        specs = jax.tree.map(spec, params)
        jax.eval_shape(lambda params, x: model_fn(input=x, params=params), specs, x)
    except Exception:  # whatever it raises, it does not work
        return False
    return True


def described(tree: PyTree) -> str:
    """A pytree by the dtypes and shapes of its arrays, not longer than a person reads."""

    def of_leaf(leaf: Any) -> str:
        if not hasattr(leaf, "dtype"):
            return shown(leaf)
        return f"{leaf.dtype}[{','.join(map(str, jnp.shape(leaf)))}]"

    text = str(jax.tree.map(of_leaf, tree)).replace("'", "")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
