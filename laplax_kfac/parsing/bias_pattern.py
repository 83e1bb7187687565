"""The pattern of a parameter that is added: one input, the constant 1, where an entry is added."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Int, Shaped

from laplax_kfac.parsing.segments import Scattered
from laplax_kfac.patterns import Pattern
from laplax_kfac.patterns.contract import Entries, Operands


@dataclass(frozen=True)
class _Ones:
    """The inputs of a bias: the constant 1 at every position."""

    positions: int

    def __call__(self, _: JaxprEqn, __: int, terms: Operands) -> Shaped[Array, "positions 1 1"]:
        return jnp.ones((self.positions, 1, 1), jnp.result_type(*terms))


@dataclass(frozen=True)
class _AtPlaces:
    """The outputs of a bias: the sum, at the places where every entry is added."""

    places: Scattered

    def __call__(self, _: JaxprEqn, __: int, y: Entries) -> Entries:
        return y.reshape(-1)[self.places.ids][:, None, :]


def _no_operand(_: JaxprEqn) -> tuple[int, ...]:
    return ()


def _as_row(_: JaxprEqn, __: int, w: Entries) -> Entries:
    return w[None, None]


def bias_pattern(places: Int[np.ndarray, "positions features"], axes: int) -> Pattern:
    """The pattern of a parameter added to something: one input, the constant 1.

    Args:
        places: Where in the raveled sum every feature is added, for each position.
        axes: Along how many axes of the sum the parameter varies.
    """
    return Pattern(
        name="bias" if axes <= 1 else "shift",
        operands=_no_operand,
        weight=_as_row,
        inputs=_Ones(len(places)),
        outputs=_AtPlaces(Scattered(places)),
    )
