"""Products that carry their problem, and are laplax's own as soon as one multiplies with them."""

from typing import Any

import jax
import jax.numpy as jnp
import laplax
import laplax.api
import numpy as np
import pytest
from laplax.curv.cov import estimate_curvature
from laplax.util.loader import DataLoaderMV
from laplax.util.mv import diagonal, to_dense
from support.linear_models import REGRESSION, TRAINED, Loader, fit, linear

from laplax_kfac.laplax_adapter.problem import LazyProduct, problem_of
from laplax_kfac.laplax_adapter.rebinding import Rebound, original_of

pytestmark = pytest.mark.usefixtures("x64")


def never(**given):
    msg = f"the model was evaluated at {sorted(given)}"
    raise AssertionError(msg)


def products(data: Any, **options: Any) -> tuple[Any, Any]:
    """The product that laplax's name makes now, and laplax's own."""
    return (
        laplax.api.GGN(linear, TRAINED, data, "mse", **options),
        original_of(laplax.api.GGN)(linear, TRAINED, data, loss_fn="mse", **options),
    )


def test_nothing_is_computed_before_somebody_multiplies():
    loader = Loader(*REGRESSION.data)
    product = laplax.api.GGN(never, TRAINED, loader, loss_fn="mse", factor=2)
    assert isinstance(product, LazyProduct)
    assert (product.problem.model_fn, product.problem.factor) == (never, 2)
    assert product.problem.data is loader
    assert loader.passes == 0
    with pytest.raises(AssertionError, match="the model was evaluated"):
        product(TRAINED)
    assert laplax.api.GGN.__name__ == "GGN"


@pytest.mark.parametrize("curv_mv_jit", [False, True])
def test_kfac_reads_the_problem_and_not_the_product(curv_mv_jit, monkeypatch):
    monkeypatch.setattr(LazyProduct, "product", property(lambda _: pytest.fail("multiplied")))
    found = laplax.laplace(
        linear, TRAINED, REGRESSION.data, loss_fn="mse", curv_type="kfac", curv_mv_jit=curv_mv_jit
    )[1]
    np.testing.assert_array_equal(found.to_dense(), fit(REGRESSION, "kfac")[1].to_dense())


@pytest.mark.parametrize("loader", [False, True], ids=["batch", "loader"])
def test_it_multiplies_as_laplax_own_does(loader):
    found, expected = products(Loader(*REGRESSION.data) if loader else REGRESSION.data, factor=0.5)
    for function in (
        lambda mv: mv(TRAINED),
        lambda mv: jax.jit(mv)(TRAINED),
        lambda mv: diagonal(mv, layout=TRAINED),
        lambda mv: to_dense(mv, layout=TRAINED),
    ):
        jax.tree.map(np.testing.assert_array_equal, function(found), function(expected))
    # Attributes, such as a loader, are those of laplax's own as well.
    if loader:
        assert isinstance(expected, DataLoaderMV)
        assert isinstance(found.loader, Loader)
    else:
        assert found.keywords.keys() == expected.keywords.keys() == {"data"}
    with pytest.raises(AttributeError, match="_other"):
        found._other  # noqa: B018
    with pytest.raises(AttributeError, match="other"):
        found.other  # noqa: B018


def test_a_product_of_laplax_is_enough_for_estimate_curvature():
    data = {"input": REGRESSION.data[0], "target": REGRESSION.data[1]}
    product = laplax.api.GGN(
        linear, TRAINED, REGRESSION.data, "mse", factor=0.5, transform=lambda d: d,
        verbose_logging=False,
    )  # fmt: skip
    found = estimate_curvature("KFAC", mv=product, layout=TRAINED)
    expected = 0.5 * fit(REGRESSION, "kfac")[1].to_dense()
    np.testing.assert_allclose(found.to_dense(), expected, rtol=1e-12)
    # What is given besides takes its place.
    product = laplax.api.GGN(linear, TRAINED, data, "mse")
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), data)
    found = estimate_curvature("kfac", mv=product, layout=TRAINED, data=twice)
    np.testing.assert_allclose(found.to_dense(), 4 * expected, rtol=1e-12)


def test_other_products_carry_no_problem():
    assert problem_of(lambda v: v) is None
    assert problem_of(None) is None
    assert problem_of(jax.jit(lambda v: v)) is None


def test_errors_of_laplax_come_when_one_multiplies():
    product = laplax.api.GGN(linear, TRAINED, REGRESSION.data, loss_fn="l1")
    with pytest.raises(ValueError, match="unsupported loss function provided"):
        product(TRAINED)


@pytest.mark.parametrize("curv_type", ["full", "diagonal"])
@pytest.mark.parametrize("loader", [False, True], ids=["batch", "loader"])
@pytest.mark.parametrize("curv_mv_jit", [False, True], ids=["", "jit"])
def test_the_product_of_laplax_is_what_other_types_get(curv_type, loader, curv_mv_jit, monkeypatch):
    # A product over a loader has methods of its own in laplax.
    data = Loader(*REGRESSION.data) if loader else REGRESSION.data
    options: Any = {"loss_fn": "mse", "curv_type": curv_type, "curv_mv_jit": curv_mv_jit}
    found = laplax.laplace(linear, TRAINED, data, **options)
    monkeypatch.setattr(laplax.api, "GGN", original_of(laplax.api.GGN))
    assert not isinstance(laplax.api.GGN, Rebound)
    expected = laplax.laplace(linear, TRAINED, data, **options)
    np.testing.assert_array_equal(found[1], expected[1])
