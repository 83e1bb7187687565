"""The problem behind a matrix-vector product: what KFAC needs and the product does not show.

laplax's ``laplace`` hands a curvature type the product that ``GGN`` returned, and nothing else. Our
``GGN`` returns a product that carries what it was called with, and is laplax's own as soon as
somebody multiplies with it. KFAC never does, so the pass over all data by which laplax checks the
product's shapes is left out, and not even one batch of a loader is read.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import laplax.util.flatten
import laplax.util.loader  # registers how loaders are multiplied with
import laplax.util.mv
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.parsing.program import ModelFn

Product: TypeAlias = Callable[..., PyTree]


@no_type_check
@dataclass(frozen=True)
class Problem:
    """What ``laplax.api.GGN`` was called with.

    Attributes:
        model_fn: ``model_fn(input=, params=)``.
        data: One batch, or an iterable of batches.
        loss_fn: A laplax ``LossFn``, its string, or a callable.
        factor: Factor of the curvature.
        vmap_over_data: Whether ``model_fn`` takes one example or a batch.
        transform: Makes a batch what laplax takes.
    """

    model_fn: ModelFn
    data: Iterable[PyTree]
    loss_fn: object
    factor: float | int = 1.0
    vmap_over_data: bool = True
    transform: Callable[[PyTree], PyTree] | None = None

    def options(self) -> dict[str, object]:
        """Arguments of `kfac`."""
        names = ["model_fn", "data", "loss_fn", "vmap_over_data"]
        return {name: getattr(self, name) for name in names + ["transform"] * bool(self.transform)}


@dataclass(frozen=True, eq=False)
class LazyProduct:
    """A product with the GGN matrix that knows the problem it is of.

    Attributes:
        make: Makes laplax's own product, which passes over the data once to check its shapes.
        problem: What it is of.
    """

    make: Callable[[], Product]
    problem: Problem

    @functools.cached_property
    def product(self) -> Product:
        """laplax's own product."""  # noqa: D403
        return self.make()

    def __call__(self, vector: PyTree) -> PyTree:
        """What laplax's own does."""
        return self.product(vector)

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # tools ask for these, of any function
            raise AttributeError(name)
        return getattr(self.product, name)


@no_type_check
def lazy_ggn(
    original: Callable[..., Product],
    model_fn: ModelFn,
    params: PyTree,
    data: Iterable[PyTree],
    loss_fn: object,
    **options: object,
) -> LazyProduct:
    """What ``laplax.api.GGN`` is bound to; ``original`` is laplax's own."""
    make = functools.partial(original, model_fn, params, data, loss_fn=loss_fn, **options)
    known = {k: v for k, v in options.items() if k != "verbose_logging"}
    return LazyProduct(make, Problem(model_fn, data, loss_fn, **known))  # type: ignore[arg-type]


def problem_of(mv: object) -> Problem | None:
    """The problem that a product carries; None for other products."""
    product = getattr(mv, "__wrapped__", mv)  # `laplace` compiles it with `curv_mv_jit=True`
    return product.problem if isinstance(product, LazyProduct) else None


def multiply_as_laplax_does() -> None:
    """Let laplax's functions of products find laplax's own product in ours.

    They are generic functions: a product over a loader has its own methods there, which work
    through the batches in an order of their own.
    """
    for function in (
        laplax.util.flatten.wrap_function,
        laplax.util.mv.diagonal,
        laplax.util.mv.to_dense,
    ):

        def of_lazy(
            mv: LazyProduct,
            *args: object,
            function: Callable[..., object] = function,
            **kwargs: object,
        ) -> object:
            return function(mv.product, *args, **kwargs)

        function.register(LazyProduct)(of_lazy)
