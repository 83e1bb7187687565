"""Matrices on the parameters as operators of lineax, for its solvers and whatever takes them.

Products stay products in the eigenbases. That the matrices are symmetric and positive
semi-definite is part of the operator, so that conjugate gradients take them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from laplax_kfac.arguments import no_type_check
from laplax_kfac.parsing.layout import ParameterSpace

if TYPE_CHECKING:
    import lineax


@no_type_check
def linear_operator(
    product: Callable[[PyTree], PyTree], space: ParameterSpace
) -> "lineax.FunctionLinearOperator":
    """A symmetric positive semi-definite matrix on the parameters, by its products.

    Args:
        product: A pytree like the parameters -> its product with the matrix.
        space: Structure of the parameters.

    Raises:
        ImportError: If lineax is not installed.
        ValueError: If some parameters are no real numbers: lineax's vectors are of one field.
    """
    try:
        import lineax
    except ImportError as error:
        msg = "Linear operators need lineax: pip install lineax, or '.[lineax]' of a clone."
        raise ImportError(msg) from error
    for name, dtype in zip(space.names, space.dtypes, strict=True):
        if not jnp.issubdtype(dtype, jnp.floating):
            msg = (
                f"`as_linear_operator` is for parameters of real numbers; {name!r} is {dtype}. "
                "Close over it in the model, so that it is no parameter."
            )
            raise ValueError(msg)
    pairs = zip(space.shapes, space.dtypes, strict=True)
    structure = jax.tree.unflatten(space.treedef, [jax.ShapeDtypeStruct(*pair) for pair in pairs])
    tag = lineax.positive_semidefinite_tag
    return lineax.FunctionLinearOperator(product, structure, frozenset({tag, lineax.symmetric_tag}))
