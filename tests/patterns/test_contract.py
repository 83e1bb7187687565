"""The contract is checked; users can add patterns."""

import inspect
import math
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from support import oracles
from support.models import normal
from support.patterns import ATOL, pattern_of
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import patterns
from laplax_kfac.patterns import contract

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def registry(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(contract, "_REGISTRY", dict(contract._REGISTRY))


def test_check_finds_a_violation(registry):
    del registry
    dense = pattern_of(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns[0])
    operands = normal((5, 3)), normal((3, 4), seed=1)
    assert patterns.check(jnp.dot, 1, *operands) < ATOL
    doubled = replace(dense, inputs=lambda eqn, k, others: 2.0 * dense.inputs(eqn, k, others))
    patterns.register("dot_general", doubled)
    expected = float(jnp.max(jnp.abs(operands[0] @ operands[1])))
    np.testing.assert_allclose(patterns.check(jnp.dot, 1, *operands), expected)


@pytest.mark.parametrize(
    ("function", "found"),
    [(lambda x, w: jnp.sin(x) @ w, r"\['sin', 'dot_general'\]"), (jnp.add, r"\['add'\]"),
     (lambda x, _: x, r"\[\]")],
    ids=["two_equations", "not_registered", "no_equation"],
)  # fmt: skip
def test_check_names_what_it_found(function, found):
    x = jnp.ones((3, 3))
    with pytest.raises(ValueError, match=f"found the equations {found}; registered are .*dot_gen"):
        patterns.check(function, 1, x, x)


def test_register_wants_a_name_and_a_pattern(registry):
    del registry
    dense = contract._REGISTRY["dot_general"]
    with pytest.raises(TypeError, match="must be the primitive's name as a string, got Primitive"):
        patterns.register(Primitive("scaled_matmul"), dense)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a laplax_kfac\.patterns\.Pattern, got dict"):
        patterns.register("scaled_matmul", {})  # type: ignore[arg-type]


def make_scaled_matmul():
    """A primitive of a user: ``scale * x @ w``, with all its rules, by public JAX alone."""
    primitive = Primitive("scaled_matmul")

    def compute(x, w, *, scale):
        return scale * jnp.matmul(x, w)

    def batch(args, axes, *, scale):
        (x, w), (x_axis, w_axis) = args, axes
        assert w_axis is None, "the weights of a batch are the same"
        x = jnp.moveaxis(x, x_axis, 0)
        y = primitive.bind(x.reshape(-1, x.shape[-1]), w, scale=scale)
        return y.reshape(*x.shape[:-1], -1), 0

    primitive.def_impl(compute)
    primitive.def_abstract_eval(
        lambda x, w, **_: jax.core.ShapedArray((*x.shape[:-1], w.shape[1]), x.dtype)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    ad.defbilinear(
        primitive,
        lambda g, _, w, *, scale: scale * g @ w.T,
        lambda g, x, _, *, scale: scale * x.T @ g,
    )
    return primitive


def documented_example():
    """The lines of the module's docstring that register a pattern."""
    _, _, example = inspect.cleandoc(patterns.__doc__).partition("\n\n    register(")
    return textwrap.dedent("    register(" + example)


def test_a_users_pattern(registry):
    """The ten lines of the documentation make layers of a primitive that JAX does not know."""
    del registry
    primitive = make_scaled_matmul()

    def product(x, w):
        return primitive.bind(x, w, scale=3.0)

    def model_fn(input, params):
        h = jnp.tanh(product(input, params["user"]["w"]) + params["user"]["b"])
        return h @ params["head"]

    params = normal({"user": {"w": (4, 3), "b": (3,)}, "head": (3, 2)})
    inputs, cotangents = normal((6, 5, 4), seed=1), normal((6, 1, 5, 2), seed=2)
    before = laplax_kfac.find_layers(model_fn, params, inputs[0])
    assert "used by `scaled_matmul`, which no pattern covers" in before["user/w"].reason
    with pytest.raises(ValueError, match=r"found the equations \['scaled_matmul'\]"):
        patterns.check(product, 1, inputs[0], params["user"]["w"])

    exec(documented_example(), vars(patterns).copy())

    assert patterns.check(product, 1, inputs[0], params["user"]["w"]) < ATOL
    layer = laplax_kfac.find_layers(model_fn, params, inputs[0])["user"]
    assert (layer.pattern, layer.block, layer.bias) == ("scaled_matmul", "kronecker", True)
    assert (layer.in_features, layer.out_features, layer.positions) == (4, 3, 5)

    def loss(f, y):
        return jnp.sum(f * y)

    @jax.jit
    def records(params):
        return laplax_kfac.intermediates_and_gradients(
            model_fn, params, (inputs, cotangents[:, 0]), loss_fn=loss
        )

    found = records(params)["user"]
    exact = oracles.per_example_gradients(
        lambda p, x: model_fn(x, p), params, inputs, cotangents
    )["user"]  # fmt: skip
    products = jnp.einsum("nsi,nso->nio", found.inputs, found.gradients)
    np.testing.assert_allclose(products, exact["w"][:, 0], **tolerance(jnp.float64))
    sums = jnp.sum(found.gradients, axis=1)
    np.testing.assert_allclose(sums, exact["b"][:, 0], **tolerance(jnp.float64))
    assert math.prod(found.inputs.shape) == 6 * 5 * 4


def test_the_last_registration_wins(registry):
    del registry
    dense = contract._REGISTRY["dot_general"]
    patterns.register("dot_general", replace(dense, name="mine"))
    params = {"w": jnp.ones((3, 2))}
    layers = laplax_kfac.find_layers(lambda input, params: input @ params["w"], params, jnp.ones(3))
    assert layers["w"].pattern == "mine"
