"""Names in laplax's modules that its functions look up when they run, bound to something of ours.

No function of laplax is changed: ``laplace`` calls whatever ``laplax.api.GGN`` is bound to at that
moment. So a reference to ``laplace`` that was taken before the import does as any other, and
``inspect.getsource`` shows laplax's own text.
"""

import functools
from collections.abc import Callable
from types import ModuleType


class Rebound:
    """What a name of laplax is bound to: runs ``handler(original, *args, **kwargs)``.

    Attributes:
        handler: What we do instead.
        original: What the name was bound to; `inspect` shows its signature, text and documentation.
    """

    def __init__(self, handler: Callable[..., object], original: Callable[..., object]) -> None:
        self.handler, self.original = handler, original
        functools.update_wrapper(self, original, updated=())

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the handler around the original."""
        return self.handler(self.original, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.original!r} by way of {self.handler.__module__}>"


def rebind(module: ModuleType, name: str, handler: Callable[..., object]) -> None:
    """Bind a name of a module of laplax to a handler around what it was bound to."""
    setattr(module, name, rebound(handler, getattr(module, name)))


def rebound(handler: Callable[..., object], function: Callable[..., object]) -> Rebound:
    """A handler around a function of laplax, in place of an earlier handler around it."""
    if isinstance(function, Rebound) and function.handler is handler:
        return function
    return Rebound(handler, original_of(function))


def original_of(function: Callable[..., object]) -> Callable[..., object]:
    """What a name of laplax was bound to before; the function itself if it was not rebound."""
    # By the name of the class: this module may have been reloaded since.
    kind = type(function)
    if (kind.__module__, kind.__qualname__) == (Rebound.__module__, Rebound.__qualname__):
        return function.original  # type: ignore[attr-defined]
    return function
