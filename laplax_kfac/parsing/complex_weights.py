"""Models with complex weights as models with real ones.

Parameters are followed by the real entries that they consist of. So a jaxpr in which some of them
are complex, or made into complex numbers (``re + 1j * im``, ``lax.complex``, a cast), is evaluated
once more, with these numbers as `Parts`: what is linear over the real numbers is done to both
parts, a product with data is written with real products (`ComplexProduct`), and any other equation
gets the complex number itself. What is traced so is another jaxpr with the same values and
derivatives, in which uses of the parameters are those of real weights. Complex numbers of data
(transforms, complex activations) stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.typing import ArrayLike

from laplax_kfac import jaxprs
from laplax_kfac.jaxprs import Atom, Value
from laplax_kfac.parsing.complex_numbers import ComplexProduct, Parts, real_dtype


class Origin(IntEnum):
    """What a value was computed of; of several, the last of these."""

    CONSTANTS = 0
    PARAMETERS = 1
    DATA = 2


MAKERS = ("convert_element_type", "complex")
"""Primitives that make real numbers into complex ones."""

PRODUCTS = ("dot_general", "conv_general_dilated")
"""Primitives that are products with a weight; one of the operands may be real."""

LINEAR = frozenset(
    """reshape broadcast_in_dim slice split transpose squeeze expand_dims concatenate stack unstack
    rev tile pad select_n gather dynamic_slice dynamic_update_slice scatter scatter-add reduce_sum
    cumsum copy copy_p neg name sharding_constraint""".split()
)
"""Primitives that are linear over the real numbers in all of their complex operands together."""


def makes_complex(jaxpr: Jaxpr, origins: Sequence[Origin]) -> bool:
    """Whether parameters alone are made into complex numbers, or multiply some, at any depth.

    Args:
        jaxpr: The jaxpr; what it holds itself is constant.
        origins: What its inputs are.
    """
    of: dict[Atom, Origin] = dict(zip(jaxpr.invars, origins, strict=True))
    for eqn in jaxpr.eqns:
        atoms = [(a, Origin.CONSTANTS if isinstance(a, Literal) else of.get(a, Origin.CONSTANTS))
                 for a in eqn.invars]  # fmt: skip
        if eqn.primitive.name in (*MAKERS, *PRODUCTS) and jaxprs.is_complex(eqn.outvars[0]):
            real = [origin for a, origin in atoms if not jaxprs.is_complex(a)]
            if Origin.PARAMETERS in real:
                return True
        inside = origins_inside(eqn, [origin for _, origin in atoms])
        if any(makes_complex(body, inside) for body in jaxprs.bodies(eqn)):
            return True
        of.update((var, max(origin for _, origin in atoms)) for var in eqn.outvars if atoms)
    return False


def origins_inside(eqn: JaxprEqn, origins: list[Origin]) -> list[Origin]:
    """Those of the inputs of an equation's body; what a scan carries may be data."""
    if eqn.primitive.name == "cond":
        return origins[1:]
    if eqn.primitive.name != "scan":
        return origins
    scan = jaxprs.scan_parts(eqn)
    xs = origins[scan.num_consts + scan.num_carry :]
    return [*origins[: scan.num_consts], *[Origin.DATA] * scan.num_carry, *xs]


def with_real_weights(
    jaxpr: Jaxpr, consts: list[ArrayLike], covered: Sequence[bool]
) -> tuple[Jaxpr, list[ArrayLike]]:
    """The same function with real weights, where it has complex ones.

    Args:
        jaxpr: A jaxpr whose inputs are the constants, the leaves of the parameters, and others.
        consts: The constants.
        covered: For every leaf, whether it counts as parameters; else it is fixed, like data.

    Returns:
        The jaxpr, which takes complex leaves as pairs of real numbers, in a last axis, and its
        constants.
    """
    begin, end = len(consts), len(consts) + len(covered)
    others = len(jaxpr.invars) - end
    origins = [
        *[Origin.CONSTANTS] * begin,
        *[Origin.PARAMETERS if used else Origin.DATA for used in covered],
        *[Origin.DATA] * others,
    ]
    in_pairs = [begin <= k < end and jaxprs.is_complex(v) for k, v in enumerate(jaxpr.invars)]
    found = jaxprs.computes_complex(jaxpr) and makes_complex(jaxpr, origins)
    if not found and not any(in_pairs):
        return jaxpr, consts
    known = {
        var: np.asarray(value)
        for var, value in zip(jaxpr.invars, consts, strict=False)
        if jaxprs.is_complex(var) and not isinstance(value, jax.core.Tracer)
    }

    def function(*values: Value) -> list[Value]:
        inputs = [Parts.of_pairs(x) if p else x for x, p in zip(values, in_pairs, strict=True)]
        outputs = _Evaluation(jaxpr, known).run(inputs, origins)
        return [whole(out, var) for out, var in zip(outputs, jaxpr.outvars, strict=True)]

    specs = [
        jax.ShapeDtypeStruct((*s.shape, 2), real_dtype(s.dtype)) if pair else s
        for s, pair in zip(map(jaxprs.spec, jaxpr.invars), in_pairs, strict=True)
    ]
    rewritten, more, _ = jaxprs.trace(function, *specs)
    return rewritten, [*more, *consts]


def whole(value: Value, atom: Atom) -> Value:
    """The value of a variable, put together if it is in parts."""
    return value.whole(jaxprs.spec(atom).dtype) if isinstance(value, Parts) else value


@dataclass(frozen=True)
class _Evaluation:
    """A jaxpr evaluated with complex numbers in parts where parameters make them.

    Attributes:
        jaxpr: The jaxpr.
        known: Complex arrays among its inputs whose entries are known.
        env: The values of variables so far.
        origins: Their origins.
    """

    jaxpr: Jaxpr
    known: dict[Value, np.ndarray] = field(default_factory=dict)
    env: dict[Value, Value] = field(default_factory=dict)
    origins: dict[Value, Origin] = field(default_factory=dict)

    def run(self, values: Sequence[Value], origins: Sequence[Origin]) -> list[Value]:
        """The values of its outputs, some of them in parts."""
        self.env.update(zip(self.jaxpr.invars, values, strict=True))
        self.origins.update(zip(self.jaxpr.invars, origins, strict=True))
        for eqn in self.jaxpr.eqns:
            outputs = self.outputs(eqn)
            self.env.update(zip(eqn.outvars, outputs, strict=True))
            origin = max(map(self.origin, eqn.invars), default=Origin.CONSTANTS)
            self.origins.update((var, origin) for var in eqn.outvars)
        return [self.read(atom) for atom in self.jaxpr.outvars]

    def read(self, atom: Atom) -> Value:
        """The value of a variable or literal."""
        if isinstance(atom, Literal):
            return np.asarray(atom.val, jaxprs.spec(atom).dtype)
        return self.env[atom]

    def origin(self, atom: Atom) -> Origin:
        """What it was computed of."""
        return Origin.CONSTANTS if isinstance(atom, Literal) else self.origins[atom]

    def parts(self, atom: Atom) -> Parts:
        """A number in parts."""
        known = None if isinstance(atom, Literal) else self.known.get(atom)
        value = self.read(atom) if known is None else known
        if isinstance(value, Parts):
            return value
        return Parts.of(value) if jaxprs.is_complex(atom) else Parts(value, None)

    def outputs(self, eqn: JaxprEqn) -> list[Value]:
        """The outputs of an equation: in parts where some operand is, and the equation allows."""
        values = [self.read(atom) for atom in eqn.invars]
        if jaxprs.has_body(eqn):
            origins = origins_inside(eqn, list(map(self.origin, eqn.invars)))
            inside = any(makes_complex(body, origins) for body in jaxprs.bodies(eqn))
            if inside or any(isinstance(v, Parts) for v in values):
                return self.nested(eqn, values, origins)
        elif eqn.primitive.name in MAKERS and jaxprs.is_complex(eqn.outvars[0]):
            return [self.made(eqn)]
        elif eqn.primitive.name in PRODUCTS or any(isinstance(v, Parts) for v in values):
            found = self.in_parts(eqn)
            if found is not None:
                return found
        pairs = zip(values, eqn.invars, strict=True)
        return jaxprs.evaluate(self.jaxpr, eqn, [whole(*pair) for pair in pairs])

    def made(self, eqn: JaxprEqn) -> Parts:
        """A number that is made of real ones."""
        if eqn.primitive.name == "complex":
            return Parts(*map(self.read, eqn.invars))
        dtype = real_dtype(jaxprs.spec(eqn.outvars[0]).dtype)
        return self.parts(eqn.invars[0]).map(lambda x: lax.convert_element_type(x, dtype))

    def in_parts(self, eqn: JaxprEqn) -> list[Value] | None:
        """The outputs of an equation with an operand in parts; None if it takes whole numbers."""
        name, first = eqn.primitive.name, eqn.invars[0]
        if name in LINEAR:
            return self.linear(eqn)
        if name in ("add", "add_any", "sub"):
            one, other = map(self.parts, eqn.invars)
            total = one.plus(other.map(lax.neg) if name == "sub" else other)
            return [total.map(lambda x: jnp.broadcast_to(x, jaxprs.shape(eqn.outvars[0])))]
        if name in ("real", "imag"):
            return [self.parts(first).part(imaginary=name == "imag")]
        if name == "convert_element_type":
            dtype = jaxprs.spec(eqn.outvars[0]).dtype
            real = self.parts(first).part(imaginary=False)
            return [lax.convert_element_type(real, dtype)]
        if name == "conj":
            parts = self.parts(first)
            return [Parts(parts.re, None if parts.im is None else lax.neg(parts.im))]
        if name in ("mul", "div"):
            return self.scaled(eqn)
        return self.multiplied(eqn) if name in PRODUCTS else None

    def linear(self, eqn: JaxprEqn) -> list[Value]:
        """An equation that is done to the real parts of its operands, and to the imaginary ones."""
        is_number = [jaxprs.is_complex(atom) for atom in eqn.invars]
        numbers = [self.parts(a) if n else None for a, n in zip(eqn.invars, is_number, strict=True)]

        def applied(imaginary: bool) -> list[Value] | None:
            parts = [n and (n.im if imaginary else n.re) for n in numbers]
            if all(part is None for part in parts):
                return None
            operands = [
                self.read(atom) if number is None else number.part(imaginary=imaginary)
                for atom, number in zip(eqn.invars, numbers, strict=True)
            ]
            if eqn.primitive.name == "scatter-add":
                names = "dimension_numbers", "indices_are_sorted", "unique_indices", "mode"
                return [lax.scatter_add(*operands, **{name: eqn.params[name] for name in names})]
            outputs = eqn.primitive.bind(*operands, **eqn.params)
            return list(outputs) if eqn.primitive.multiple_results else [outputs]

        re, im = applied(imaginary=False), applied(imaginary=True)
        none = [None] * len(eqn.outvars)
        return [Parts(*pair) for pair in zip(re or none, im or none, strict=True)]

    def scaled(self, eqn: JaxprEqn) -> list[Value] | None:
        """A product entry by entry, or a quotient by a real number; None if it is one of data."""
        if min(map(self.origin, eqn.invars)) == Origin.DATA:
            return None
        one, other = map(self.parts, eqn.invars)
        if eqn.primitive.name == "mul":
            return [one.times(other, lambda a, b: a if is_one(b) else b if is_one(a) else a * b)]
        return [one.map(lambda x: x / other.re)] if other.im is None else None

    def multiplied(self, eqn: JaxprEqn) -> list[Value] | None:
        """A product with a weight, made of parameters alone; None if no operand is one."""
        if not jaxprs.is_complex(eqn.outvars[0]):
            return None
        weights = [
            k for k, atom in enumerate(eqn.invars)
            if self.origin(atom) == Origin.PARAMETERS
            and (isinstance(self.read(atom), Parts) or not jaxprs.is_complex(atom))
        ]  # fmt: skip
        if not weights:
            return None
        product = ComplexProduct.of(eqn, weights[0])
        x, w = self.parts(eqn.invars[1 - product.weight]), self.parts(eqn.invars[product.weight])
        return [product(x, w) if len(weights) == 1 else x.times(w, product.of_reals)]

    # -- equations with others inside --------------------------------------------------------------

    def nested(self, eqn: JaxprEqn, values: list[Value], origins: list[Origin]) -> list[Value]:
        """The outputs of an equation whose body makes complex numbers, or gets some in parts."""
        if eqn.primitive.name == "scan":
            return self.scan(eqn, values, origins)
        if eqn.primitive.name == "cond":
            number = len(eqn.outvars)
            branches = [_evaluated(*b, origins, number) for b in jaxprs.cond_branches(eqn)]
            return lax.switch(values[0], branches, values[1:])
        called = jaxprs.called_jaxpr(eqn)
        assert called is not None
        call = _evaluated(*called, origins)
        if eqn.primitive.name in jaxprs.REMAT:
            options = {k: eqn.params[k] for k in ("policy", "prevent_cse") if k in eqn.params}
            return jax.checkpoint(call, **options)(values)
        return call(values)

    def scan(self, eqn: JaxprEqn, values: list[Value], origins: list[Origin]) -> list[Value]:
        """A scan; its carries are whole numbers, for these have a type."""
        parts = jaxprs.scan_parts(eqn)
        first, last = parts.num_consts, parts.num_consts + parts.num_carry
        body = _evaluated(parts.body, parts.consts, origins, parts.num_carry)
        carries = zip(values[first:last], eqn.invars[first:last], strict=True)

        def step(carry: list[Value], xs: list[Value]) -> tuple[list[Value], list[Value]]:
            outs = body([*values[:first], *carry, *xs])
            return outs[: parts.num_carry], outs[parts.num_carry :]

        carry, ys = lax.scan(
            step, [whole(*pair) for pair in carries], values[last:],
            length=parts.length, reverse=parts.reverse, unroll=eqn.params.get("unroll", 1),
        )  # fmt: skip
        return [*carry, *ys]


def _evaluated(
    body: Jaxpr, consts: Sequence[ArrayLike], origins: Sequence[Origin], num_whole: int = 0
) -> Callable[[list[Value]], list[Value]]:
    """A body as a function of its operands, whose first outputs are whole numbers."""
    jaxpr = jaxprs.with_consts(body)
    everything = [*[Origin.CONSTANTS] * len(consts), *origins]

    def function(values: list[Value]) -> list[Value]:
        outputs = _Evaluation(jaxpr).run([*consts, *values], everything)
        pairs = list(zip(outputs, jaxpr.outvars, strict=True))
        return [whole(*pair) for pair in pairs[:num_whole]] + outputs[num_whole:]

    return function


def is_one(value: Value) -> bool:
    """Whether a factor is the number 1, and known to be."""
    return isinstance(value, np.ndarray | np.generic) and value.ndim == 0 and bool(value == 1)
