"""Functions of one example for many of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import PyTree


def map_examples(
    function: Callable[..., Any], examples: PyTree, batch_size: int | None = None
) -> Any:
    """Vmap a function of one example; loop where a primitive of the model has no vmap rule.

    Args:
        function: Takes an example, and whether to do without vmap itself as ``sequential``.
        examples: Examples stacked in front.
        batch_size: Most examples that are vmapped at once; all by default.
    """
    try:
        if batch_size is not None:
            return lax.map(function, examples, batch_size=batch_size)
        return jax.vmap(function)(examples)
    except NotImplementedError:
        return lax.map(functools.partial(function, sequential=True), examples)
