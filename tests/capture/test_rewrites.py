"""Rewritten equations have the value and the derivative that JAX gives them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from laplax_kfac import jaxprs
from laplax_kfac.capture.evaluator import run
from laplax_kfac.capture.plan import plan_of
from laplax_kfac.capture.rewrites import has_rewrite, rewrite
from laplax_kfac.parsing.program import parse

pytestmark = pytest.mark.usefixtures("x64")


def pool(x, size, strides, padding="VALID", **dilation):
    return lax.reduce_window(x, -jnp.inf, lax.max, size, strides, padding, **dilation)


def rewritten(function, x):
    """The function of one equation, evaluated the better way."""
    (eqn,) = jax.make_jaxpr(function)(x).eqns
    better = rewrite(eqn)
    assert better is not None
    return lambda x: better([x])[0]


POOLINGS = {
    "tiles": lambda x: pool(x, (2, 2, 1), (2, 2, 1)),
    "tiles that leave a rest": lambda x: pool(x, (3, 2, 1), (3, 2, 1)),
    "overlapping, with gaps": lambda x: pool(x, (3, 2, 1), (2, 3, 1)),
    "padded": lambda x: pool(x, (2, 3, 1), (2, 2, 1), "SAME"),
    "padded more than a window": lambda x: pool(x, (2, 2, 2), (2, 2, 1), [(3, 0), (0, 2), (1, 1)]),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_max_pooling_is_jaxs(name):
    """Also where several entries of a window are the maximum, or are minus infinity."""
    function = POOLINGS[name]
    x = jax.random.randint(jax.random.key(0), (8, 7, 2), -2, 2).astype(float)
    x = jnp.where(x == -2, -jnp.inf, x)

    @jax.jit
    def both(x):
        expected, pullback = jax.vjp(function, x)
        found, cheaper = jax.vjp(rewritten(function, x), x)
        cotangents = jax.random.normal(jax.random.key(1), (3, *expected.shape))
        moved = lax.map(pullback, cotangents)  # one by one: nothing of it is shared
        return expected, found, moved, jax.vmap(cheaper)(cotangents)

    expected, found, moved, cheaply_moved = both(x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(cheaply_moved, moved, atol=1e-14)


def test_max_pooling_has_a_second_derivative_and_nan():
    function = POOLINGS["tiles"]
    x = jax.random.normal(jax.random.key(0), (4, 4, 1))
    better = rewritten(function, x)
    second = lambda f: jax.jit(jax.hessian(lambda x: jnp.sum(f(x) ** 3)))(x)  # noqa: E731
    np.testing.assert_allclose(second(better), second(function), atol=1e-12)
    x = x.at[0, 1].set(jnp.nan)
    values, _ = jax.vjp(better, x)
    np.testing.assert_array_equal(values, function(x))


def test_dilated_max_pooling_which_jax_cannot_pull_back():
    x = jax.random.normal(jax.random.key(0), (8,))
    function = lambda x: pool(x, (3,), (1,), window_dilation=(2,))  # noqa: E731
    indexed = lambda x: jnp.max(x[jnp.arange(4)[:, None] + 2 * jnp.arange(3)], axis=1)  # noqa: E731
    found, expected = (jax.jacrev(f)(x) for f in (rewritten(function, x), indexed))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: pool(x, (9, 9, 1), (1, 1, 1), "SAME"),
        lambda x: pool(x, (2, 2, 1), (1, 1, 1), base_dilation=(2, 1, 1)),
        lambda x: pool(x, (2, 2, 1), (1, 1, 1), [(-1, 0), (0, 0), (0, 0)]),
        lambda x: lax.reduce_window(x, jnp.inf, lax.min, (2, 2, 1), (2, 2, 1), "VALID"),
    ],
)
def test_what_has_no_better_way_is_left_alone(function):
    (eqn,) = jax.make_jaxpr(function)(jnp.zeros((8, 7, 2))).eqns
    assert rewrite(eqn) is None


def test_integers_are_left_alone():
    function = lambda x: lax.reduce_window(x, -9, lax.max, (2,), (2,), "VALID")  # noqa: E731
    assert not has_rewrite(jax.make_jaxpr(function)(jnp.arange(4)).jaxpr)


def halve(x):
    return pool(x, (2, 1), (2, 1))


def in_a_scan(x):
    return lax.scan(lambda c, row: (c, halve(row)), 0.0, x[None])[1][0]


def in_a_cond(x):
    return lax.cond(x[0, 0] > 0, halve, lambda x: x[:4], x)


@pytest.mark.parametrize(
    "inner", [jax.jit(halve), jax.checkpoint(halve), jax.jit(jax.jit(halve)), in_a_scan, in_a_cond]
)
def test_bodies_without_a_layer_are_entered(inner):
    """No search for maxima is left, and the pullback is JAX's."""

    def model_fn(input, params):
        return inner(jnp.tanh(input @ params)).sum(0)

    x = jax.random.normal(jax.random.key(0), (8, 3))
    w = jax.random.normal(jax.random.key(1), (3, 2))
    program = parse(model_fn, w, x)

    def evaluate(w):
        return run(program.jaxpr, [w, x], plan_of(program), {0: jnp.zeros((8, 2))})[0][0]

    gradient = lambda f: jax.jit(jax.grad(lambda w: jnp.sum(f(w) ** 2)))  # noqa: E731
    own = gradient(lambda w: model_fn(x, w))
    assert "select_and_scatter" in own.lower(w).as_text()
    assert "select_and_scatter" not in gradient(evaluate).lower(w).as_text()
    np.testing.assert_allclose(gradient(evaluate)(w), own(w), rtol=1e-12)


def test_bodies_are_those_that_a_walk_enters():
    jaxpr = jax.make_jaxpr(lambda x: (in_a_scan(x), in_a_cond(x), jnp.sin(x)))(jnp.zeros((8, 2)))
    counts = {eqn.primitive.name: len(jaxprs.bodies(eqn)) for eqn in jaxpr.eqns}
    assert counts["scan"] == 1
    assert counts["cond"] == 2
    assert counts["sin"] == 0


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "padded": dict(window_strides=(1, 1), padding=((2, 1), (1, 2))),
    "strided": dict(window_strides=(2, 3), padding="VALID"),
    "dilated": dict(window_strides=(1, 2), padding="SAME", rhs_dilation=(2, 2)),
    "channels first": dict(
        window_strides=(1, 1), padding="SAME", dimension_numbers=("NCHW", "OIHW", "NHWC")
    ),
}


on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA does these well")


@on_a_cpu
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_few_channels_are_jaxs(name):
    options: dict[str, Any] = {
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        **CONVOLUTIONS[name],
    }
    first = "first" in name
    x = jax.random.normal(jax.random.key(0), (2, 1, 9, 8) if first else (2, 9, 8, 1))
    kernel = jax.random.normal(jax.random.key(1), (6, 1, 4, 3) if first else (4, 3, 1, 6))
    function = lambda x, kernel: lax.conv_general_dilated(x, kernel, **options)  # noqa: E731
    (eqn,) = jax.make_jaxpr(function)(x, kernel).eqns
    better = rewrite(eqn, layer=True)

    @jax.jit
    def both(x, kernel):
        expected, pullback = jax.vjp(function, x, kernel)
        assert better is not None
        found, cheaper = jax.vjp(lambda *operands: better(operands)[0], x, kernel)
        return (expected, *pullback(expected)), (found, *cheaper(expected))

    for found, expected in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)


OTHERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "line": ((2, 9, 3), (4, 3, 5), dict(window_strides=(2,), padding="SAME")),
    "cube": ((2, 4, 3, 5, 2), (2, 1, 3, 2, 3), dict(window_strides=(1, 1, 2), padding="VALID")),
    "spread": (
        (2, 4, 3, 2), (3, 2, 2, 3),
        dict(window_strides=(1, 2), padding=((2, 1), (0, 2)), lhs_dilation=(2, 3)),
    ),
    "steps beyond the window": (
        (2, 8, 7, 2), (2, 3, 2, 3),
        dict(window_strides=(3, 1), padding=((1, 0), (1, 1))),
    ),
    "cropped, with steps": (
        (2, 9, 10, 2), (3, 4, 2, 3),
        dict(window_strides=(2, 3), padding=((-1, 2), (0, -2))),
    ),
    "cropped": (
        (2, 6, 5, 2), (2, 2, 2, 3),
        dict(window_strides=(1, 1), padding=((-1, 2), (0, -1))),
    ),
    "channels first": (
        (2, 3, 5, 4), (6, 3, 2, 2),
        dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NCHW", "OIHW", "CHWN")),
    ),
}  # fmt: skip


@on_a_cpu
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("layer", [True, False])
def test_other_convolutions_are_jaxs(name, layer):
    """Their pullbacks convolve with a kernel in the layout (*window, in, out)."""
    image, window, options = OTHERS[name]
    numbers = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}
    options = {"dimension_numbers": numbers.get(len(image), ("NDHWC", "DHWIO", "NDHWC"))} | options
    x = jax.random.normal(jax.random.key(0), image)
    kernel = jax.random.normal(jax.random.key(1), window)
    function = lambda x, kernel: lax.conv_general_dilated(x, kernel, **options)  # noqa: E731
    (eqn,) = jax.make_jaxpr(function)(x, kernel).eqns
    better = rewrite(eqn, layer=layer)
    assert better is not None
    cheaper = lambda *operands: better(operands)[0]  # noqa: E731

    @jax.jit
    def both(x, kernel):
        expected, pullback = jax.vjp(function, x, kernel)
        found, own = jax.vjp(cheaper, x, kernel)
        forward = [jax.jvp(f, (x, kernel), (x, kernel))[1] for f in (function, cheaper)]
        return (expected, *pullback(expected), forward[0]), (found, *own(expected), forward[1])

    for expected, found in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def pull(x):
        y, pullback = jax.vjp(lambda x: cheaper(x, kernel), x)
        return pullback(y)

    name = eqn.primitive.name
    *_, pulled = [e for e in jax.make_jaxpr(pull)(x).eqns if e.primitive.name == name]
    images, kernels, _ = pulled.params["dimension_numbers"]
    last = len(images) - 1
    assert images == (0, last, *range(1, last))
    assert kernels == (last, last - 1, *range(last - 1))


@on_a_cpu
def test_convolutions_along_rows_are_those_of_layers_of_few_channels():
    """Without a layer, the weight may differ between examples."""

    def over_images(inputs, outputs, *, layer):
        x, kernel = jnp.zeros((1, 8, 8, inputs)), jnp.zeros((5, 5, inputs, outputs))
        function = lambda x, kernel: lax.conv_general_dilated(  # noqa: E731
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        (eqn,) = jax.make_jaxpr(function)(x, kernel).eqns
        better = rewrite(eqn, layer=layer)
        assert better is not None
        found = jax.make_jaxpr(lambda *operands: better(operands)[0])(x, kernel)
        return "window_strides=(1, 1)" in str(found)

    assert over_images(32, 32, layer=True)
    assert not over_images(1, 6, layer=True)
    assert over_images(1, 6, layer=False)


def test_convolutions_in_groups_are_left_alone():
    x, kernel = jnp.zeros((1, 4, 4)), jnp.zeros((2, 2, 4))
    function = lambda x, kernel: lax.conv_general_dilated(  # noqa: E731
        x, kernel, (1,), "SAME", feature_group_count=2, dimension_numbers=("NWC", "WIO", "NWC")
    )
    (eqn,) = jax.make_jaxpr(function)(x, kernel).eqns
    assert rewrite(eqn, layer=True) is None
