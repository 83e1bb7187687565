"""Complex numbers as their real and imaginary parts, and products of data with complex weights.

Parameters are real. A complex weight ``W = R + iJ`` that consists of them acts on the parts of the
complex input ``x = a + ib`` as a real one. Of the two ways to put its parts into one matrix,

    Re(x W) = [a, -b] [R; J],    Im(x W) = [b, a] [R; J],                                   (rows)
    [Re, Im](x W) = a [R, J] + b [-J, R],                                                (columns)

the first has ``[R; J]`` itself in both products. It is one layer with twice the inputs, used twice.
With cotangents (g, h) of the two parts of the output, the gradient in it is

    [a; -b] g^T + [b; a] h^T,    that is  dR = a g^T + b h^T,  dJ = a h^T - b g^T.

The sum of ``[a; -b] [a; -b]^T`` and ``[b; a] [b; a]^T`` is the real form of the Hermitian matrix
``x^* x^T`` (the star conjugates), so that the input factor has the phases between inputs, which
blocks of R and of J by themselves lose. Where cotangents are circular, ``g g^T = h h^T`` and
``g h^T = 0`` on average, as those at the interior modes of a Fourier transform are if the rest of
the model commutes with shifts (Neeser & Massey 1993, on proper complex random vectors), the exact
block of one example is this Kronecker product. At the modes without an imaginary part, the first
and the last, ``h = 0``, so that the first product alone is the sum of both.

A real input has one product, ``[Re, Im](a W) = a [R, J]``: one use, exact for one example.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jax.typing import ArrayLike, DTypeLike

from laplax_kfac import jaxprs, pytrees
from laplax_kfac.jaxprs import Value

IMAGINARY = "imaginary_part_of_a_product"
"""The scope of the second of two products with one weight, whose positions are those of the first.

It tells them from two products that have positions of their own, as of a network that is called
twice: there is nothing else in a jaxpr that would.
"""


@pytrees.register
@dataclass(frozen=True)
class Parts:
    """A complex number as two real ones; None stands for zero.

    Attributes:
        re: Its real part.
        im: Its imaginary part. At least one of the two is there.
    """

    re: Value
    im: Value

    @classmethod
    def of(cls, value: ArrayLike) -> "Parts":
        """The parts of an array; those of a known one that are zero are left out."""
        if isinstance(value, np.ndarray | np.generic | complex | float | int):
            known = np.asarray(value)
            return cls(known.real, known.imag if np.any(known.imag) else None).without_zero()
        return cls(lax.real(value), lax.imag(value))

    @classmethod
    def of_pairs(cls, pairs: Value) -> "Parts":
        """The numbers whose parts lie along a last axis of two."""
        return cls(*(lax.index_in_dim(pairs, part, -1, keepdims=False) for part in (0, 1)))

    def without_zero(self) -> "Parts":
        """Without a known real part of zero beside an imaginary one."""
        return Parts(None, self.im) if self.im is not None and not np.any(self.re) else self

    def map(self, function: Callable[[Value], Value]) -> "Parts":
        """A function that is linear over the real numbers, of the number itself."""
        return Parts(*[None if part is None else function(part) for part in (self.re, self.im)])

    def whole(self, dtype: DTypeLike) -> Value:
        """The complex number itself."""
        if self.im is None:
            return lax.convert_element_type(self.re, dtype)
        return lax.complex(jnp.zeros_like(self.im) if self.re is None else self.re, self.im)

    def part(self, *, imaginary: bool) -> Value:
        """One of its parts, as an array."""
        mine, other = (self.im, self.re) if imaginary else (self.re, self.im)
        return jnp.zeros_like(other) if mine is None else mine

    def times(self, other: "Parts", product: Callable[[Value, Value], Value]) -> "Parts":
        """A product of two numbers by a bilinear function of their parts."""

        def of(a: Value, b: Value) -> Value:
            return None if a is None or b is None else product(a, b)

        of_real = Parts(of(self.re, other.re), of(self.re, other.im))
        with jax.named_scope(IMAGINARY):
            straight, turned = of(self.im, other.re), of(self.im, other.im)
        return of_real.plus(Parts(None if turned is None else lax.neg(turned), straight))

    def plus(self, other: "Parts") -> "Parts":
        """The sum of two numbers."""

        def of(a: Value, b: Value) -> Value:
            return jnp.add(a, b) if a is not None and b is not None else b if a is None else a

        return Parts(of(self.re, other.re), of(self.im, other.im))


def real_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype of the parts of complex numbers."""
    return np.zeros((), dtype).real.dtype


@dataclass(frozen=True)
class ComplexProduct:
    """A product of data with a complex weight: an equation that is linear in both.

    Attributes:
        eqn: The equation.
        weight: Which of its two operands is the weight.
        inputs: The axis of either operand, data first, that is contracted; None if none is.
        outputs: The axis of the weight, and that of the output, along which outputs lie; None if
            there is one output.
    """

    eqn: JaxprEqn
    weight: int
    inputs: tuple[int, int] | None = None
    outputs: tuple[int, int] | None = None

    @classmethod
    def of(cls, eqn: JaxprEqn, weight: int) -> "ComplexProduct":
        """How an equation multiplies a weight."""
        if eqn.primitive.name == "conv_general_dilated":
            grouped = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
            if weight != 1 or grouped != (1, 1):
                return cls(eqn, weight)
            numbers = eqn.params["dimension_numbers"]
            out, features, *_ = numbers.rhs_spec
            return cls(eqn, weight, (numbers.lhs_spec[1], features), (out, numbers.out_spec[1]))
        contract, batch = eqn.params["dimension_numbers"]
        taken = (*contract[weight], *batch[weight])
        free = [d for d in range(jaxprs.ndim(eqn.invars[weight])) if d not in taken]
        # The axes of the output are those of the batch, the free ones of the left, of the right.
        positions = jaxprs.ndim(eqn.invars[0]) - len(contract[0]) if weight else len(batch[0])
        inputs = (contract[1 - weight][0], contract[weight][0]) if contract[0] else None
        return cls(eqn, weight, inputs, (free[0], positions) if free else None)

    def __call__(self, x: Parts, w: Parts) -> Parts:
        """The parts of the product of data and the weight."""
        if x.re is None:
            turned = self(Parts(x.im, None), w)
            return Parts(None if turned.im is None else lax.neg(turned.im), turned.re)
        if w.re is None or w.im is None:
            return x.times(w, self.of_reals)
        if x.im is None and self.outputs is not None:
            axis, out = self.outputs
            return Parts(
                *jnp.split(self.of_reals(x.re, lax.concatenate([w.re, w.im], axis)), 2, axis=out)
            )
        if x.im is None or self.inputs is None:
            return x.times(w, self.of_reals)
        axis, features = self.inputs
        weight = lax.concatenate([w.re, w.im], features)
        real = lax.concatenate([x.re, lax.neg(x.im)], axis)
        imaginary = lax.concatenate([x.im, x.re], axis)
        re = self.of_reals(real, weight)
        with jax.named_scope(IMAGINARY):
            return Parts(re, self.of_reals(imaginary, weight))

    def of_reals(self, data: Value, weight: Value) -> Value:
        """The product of real data and a real weight."""
        operands = (data, weight) if self.weight else (weight, data)
        params = dict(self.eqn.params)
        if params["preferred_element_type"] is not None:
            params["preferred_element_type"] = real_dtype(params["preferred_element_type"])
        return self.eqn.primitive.bind(*operands, **params)
