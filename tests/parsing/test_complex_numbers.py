"""Complex numbers in parts: sums and products, of weights too, against complex arithmetic."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.models import normal
from support.tolerances import tolerance

from laplax_kfac.parsing.complex_numbers import ComplexProduct, Parts

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
FORMS = ["real", "imaginary", "both"]
PAIRS = list(itertools.product(FORMS, FORMS))


def number(form, *shape, seed=0):
    """A number in parts, of which some may be missing; and the complex array."""
    re, im = (normal(shape, seed=seed + k) for k in (0, 1))
    parts = Parts(None if form == "imaginary" else re, None if form == "real" else im)
    return parts, np.asarray(parts.whole(jnp.complex128))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_sums_and_products_are_those_of_complex_numbers(one, other):
    (x, whole_x), (y, whole_y) = number(one, 3), number(other, 3, seed=2)
    np.testing.assert_allclose(x.plus(y).whole(complex), whole_x + whole_y, **CLOSE)
    np.testing.assert_allclose(x.times(y, jnp.multiply).whole(complex), whole_x * whole_y, **CLOSE)
    np.testing.assert_allclose(x.part(imaginary=True), whole_x.imag)
    np.testing.assert_allclose(x.part(imaginary=False), whole_x.real)


@pytest.mark.parametrize(
    ("value", "missing"), [(2.0, "im"), (2j, "re"), (1 + 2j, None), (np.ones(2) * 1j, "re")]
)
def test_parts_of_known_numbers_are_left_out_where_they_are_zero(value, missing):
    parts = Parts.of(np.asarray(value, complex))
    assert [name for name in ("re", "im") if getattr(parts, name) is None] == [missing] * bool(
        missing
    )
    np.testing.assert_array_equal(parts.whole(complex), value)


def einsum(spec):
    return lambda x, w: jnp.einsum(spec, x, w)


def conv(x, w, **options):
    return lax.conv_general_dilated(x, w, (1,), "SAME", **options)


PRODUCTS = {
    "plain": (einsum("ti,io->to"), (5, 3), (3, 2)),
    "modes": (einsum("mi,mio->mo"), (4, 3), (4, 3, 2)),
    "modes last": (einsum("bim,iom->bom"), (2, 3, 4), (3, 2, 4)),
    "two axes in": (einsum("tij,ijo->to"), (5, 3, 2), (3, 2, 4)),
    "one output": (einsum("ti,i->t"), (5, 3), (3,)),
    "nothing contracted": (lambda x, w: lax.dot_general(x, w, (((), ()), ((0,), (0,)))),
                           (4, 3), (4, 2)),
    "convolution": (conv, (1, 3, 5), (2, 3, 3)),
    "channels last": (lambda x, w: conv(x, w, dimension_numbers=("NWC", "WIO", "NWC")),
                      (1, 5, 3), (3, 3, 2)),
    "groups": (lambda x, w: conv(x, w, feature_group_count=2), (1, 4, 5), (2, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("data", "weight"), PAIRS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_weights_are_those_of_complex_numbers(name, data, weight, swapped):
    function, *shapes = PRODUCTS[name]
    (x, whole_x), (w, whole_w) = number(data, *shapes[0]), number(weight, *shapes[1], seed=2)
    jaxpr = jax.make_jaxpr(function)(whole_x, whole_w)
    (eqn,) = (e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated"))
    exact = eqn.primitive.bind(whole_x, whole_w, **eqn.params)
    product = ComplexProduct.of(eqn, 0 if swapped else 1)
    found = product(w, x) if swapped else product(x, w)
    np.testing.assert_allclose(found.whole(complex), exact, **CLOSE)
