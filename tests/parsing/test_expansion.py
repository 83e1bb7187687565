"""What takes the place of an equation computes the same, with the same derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from support import models, oracles
from support.models import normal

import laplax_kfac
from laplax_kfac import jaxprs
from laplax_kfac.parsing.expansion import expanded
from laplax_kfac.parsing.program import parse

pytestmark = pytest.mark.usefixtures("x64")

PAIR = AbstractMesh((2,), ("t",), axis_types=(AxisType.Auto,))
GRID = AbstractMesh((2, 3), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
SHAPES = (2, 4), (4, 6), (6, 4)


def on_each(x, w1, w2):
    """Units are split, and summed at the end."""
    return lax.psum(jnp.tanh(x @ w1) @ w2, "t")


def numbered(x, w1, w2):
    """Devices scale their parts by their numbers, in a loop, and hand them to the next."""

    def step(h, _):
        return jnp.tanh(h) + lax.psum(h, "t") / 4, None

    h = (1.0 + lax.axis_index("t")) * (x @ w1)
    h, _ = lax.scan(step, h, None, length=2)
    h = lax.ppermute(h, "t", [(0, 1), (1, 0)])
    return lax.psum(h @ w2, "t")


def without_devices(x, w1, w2):
    """What `numbered` computes on two devices."""
    first, second = x @ w1[:, :3], 2.0 * (x @ w1[:, 3:])
    for _ in range(2):
        total = first + second
        first, second = jnp.tanh(first) + total / 4, jnp.tanh(second) + total / 4
    return second @ w2[:3] + first @ w2[3:]


def examples_and_units(x, w1, w2):
    """Rows are split along one axis, units along the other."""
    return on_each(x, w1, w2) + lax.psum(jnp.sum(x), "d")


def gathered(x, w1, w2):
    return jnp.tanh(x @ lax.all_gather(w1, "t", axis=1, tiled=True)) @ w2


UNITS = P(), P(None, "t"), P("t", None)
# A function of shares, the mesh, the shares that it takes and gives, and the same without devices.
SPLIT = {
    "one axis": (on_each, PAIR, UNITS, P(), lambda x, a, b: jnp.tanh(x @ a) @ b),
    "collectives": (numbered, PAIR, UNITS, P(), without_devices),
    "two axes": (
        examples_and_units,
        GRID,
        (P("d"), *UNITS[1:]),
        P("d"),
        lambda x, a, b: jnp.tanh(x @ a) @ b + jnp.sum(x),
    ),
    "one array over two axes": (
        lambda x, a, b: jnp.tanh(x @ a) @ b,
        GRID,
        (P(("d", "t")), P(), P()),
        P(("d", "t")),
        lambda x, a, b: jnp.tanh(x @ a) @ b,
    ),
    "all that is split is gathered": (
        gathered,
        PAIR,
        (P("t"), P(None, "t"), P()),
        P("t"),
        lambda x, a, b: jnp.tanh(x @ a) @ b,
    ),
}


def shapes_of(name):
    return ((12, 4), *SHAPES[1:]) if name == "one array over two axes" else SHAPES


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("checked", [True, False])
def test_a_shard_map_is_what_it_computes_without_devices(name, checked):
    part, mesh, into, out_of, plain = SPLIT[name]
    body = jax.shard_map(part, mesh=mesh, in_specs=into, out_specs=out_of, check_vma=checked)
    operands = [normal(shape, seed) for seed, shape in enumerate(shapes_of(name))]
    jaxpr, consts = expanded(*jaxprs.trace(body, *operands)[:2])
    assert "shard_map" not in {eqn.primitive.name for eqn in jaxpr.eqns}

    def function(*values):
        return jnp.asarray(jax.core.eval_jaxpr(jaxpr, [], *consts, *values)[0])

    np.testing.assert_allclose(function(*operands), plain(*operands), atol=1e-12)
    found, expected = (jax.jacrev(f, (0, 1, 2))(*operands) for f in (function, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_weights_of_a_shard_map_have_layers_and_exact_curvature():
    def model_fn(input, params):
        body = jax.shard_map(on_each, mesh=PAIR, in_specs=UNITS, out_specs=P())
        return body(input, params["w1"], params["w2"])

    params, x, y = normal({"w1": (4, 6), "w2": (6, 3)}), normal((3, 4), 1), jnp.zeros((3, 3))
    layers = laplax_kfac.find_layers(model_fn, params, x[0])
    assert [(m.block, m.stack, m.in_features) for m in layers] == [
        ("kronecker", 1, 4),
        ("kronecker", 2, 3),  # each device has its own rows
    ]
    found = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse", curvature="diagonal")
    plain = lambda input, params: jnp.tanh(input @ params["w1"]) @ params["w2"]  # noqa: E731
    exact = oracles.dense_ggn(plain, params, (x, y), "mse")
    np.testing.assert_allclose(found.trace(), jnp.trace(exact), rtol=1e-12)


def test_outputs_that_differ_between_devices_are_left_as_they_are():
    """Which of them is the output is up to the devices."""
    body = jax.shard_map(
        lambda w: w * (1.0 + lax.axis_index("t")),
        mesh=PAIR, in_specs=P(), out_specs=P(), check_vma=False,
    )  # fmt: skip
    jaxpr, _ = expanded(*jaxprs.trace(body, jnp.ones(3))[:2])
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["shard_map"]


def test_models_without_such_equations_are_left_alone():
    model_fn, params, inputs, _ = models.by_name("scan_over_layers").make()
    jaxpr, consts, _ = jaxprs.trace(lambda p, x: model_fn(input=x, params=p), params, inputs[0])
    assert expanded(jaxpr, consts)[0] is jaxpr


@pytest.mark.parametrize("device", ["cpu", None])
def test_the_branch_of_the_platform_is_taken(device):
    def model_fn(input, params):
        return lax.platform_dependent(
            input, params["w"], cpu=lambda x, w: x @ w, default=lambda x, w: x @ w * 2.0
        )

    with jax.default_device(device and jax.devices(device)[0]):
        program = parse(model_fn, normal({"w": (4, 3)}), normal((4,)))
    (layer,) = program.layers
    assert (layer.block, layer.uses) == ("kronecker", 1)
    assert [eqn.primitive.name for eqn in program.jaxpr.eqns] == ["dot_general"]
