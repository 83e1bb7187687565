"""Explicit axes: a mesh of one device types arrays as one of many does."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import laplax_kfac as lk
from laplax_kfac import meshes


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))


@pytest.fixture(params=["set", "unset"])
def maybe_set(request: pytest.FixtureRequest, mesh: Mesh) -> Iterator[Mesh]:
    if request.param == "set":
        with jax.set_mesh(mesh):
            yield mesh
    else:
        yield mesh


def put(mesh: Mesh, x: Any, *spec: str | None) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def model(input: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    return jnp.tanh(input @ params["w"] + params["b"])


PARAMS = {"w": np.linspace(-1, 1, 12).reshape(4, 3), "b": np.ones(3)}
X, Y = np.sin(np.arange(24.0)).reshape(6, 4), np.zeros((6, 3))


def test_results_have_the_axes_that_the_arguments_had(maybe_set: Mesh) -> None:
    params = {"w": put(maybe_set, PARAMS["w"], None, "d"), "b": put(maybe_set, PARAMS["b"])}
    data = (put(maybe_set, X, "d"), put(maybe_set, Y, "d"))
    curvature = lk.ekfac(model, params, data, loss_fn="mse")
    wanted = lk.ekfac(model, jax.tree.map(jnp.asarray, PARAMS), (X, Y), loss_fn="mse")
    np.testing.assert_allclose(curvature.trace(), wanted.trace(), rtol=1e-6)
    drawn = curvature.sample(jax.random.key(0), 2, params, prior_prec=1.0)
    moved = jax.jit(lambda s, p: s["w"] - p["w"])(drawn, params)  # fails for other axes
    assert jax.typeof(moved).sharding.mesh == maybe_set.abstract_mesh
    found = lk.predictive_variance(curvature, model, params, data[0], prior_prec=1.0)
    np.testing.assert_allclose(
        found.variance,
        lk.predictive_variance(wanted, model, PARAMS, X, prior_prec=1.0).variance,
        rtol=1e-5,
    )


def test_an_accumulator_keeps_the_axes_of_its_parameters(maybe_set: Mesh) -> None:
    params = {name: put(maybe_set, x) for name, x in PARAMS.items()}
    acc = lk.accumulator(model, params, loss_fn="mse")
    state = acc.update(acc.update(acc.init(), (X[:4], Y[:4])), (put(maybe_set, X[4:], "d"), Y[4:]))
    wanted = lk.kfac(model, jax.tree.map(jnp.asarray, PARAMS), (X, Y), loss_fn="mse")
    found = acc.finalize(state)
    np.testing.assert_allclose(found.trace(), wanted.trace(), rtol=1e-6)
    product = found.mv(params)
    assert jax.typeof(product["w"]) == jax.typeof(params["w"])


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    """Its rule is not its derivative, so that a test sees which of them is used."""
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * jnp.cos(x) * g,))


def named(input: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """Tensor parallel: the hidden features lie on an axis, and the model says so."""

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        h = jnp.einsum("i,ij->j", h, w, out_sharding=P("d"))
        return jax.sharding.reshard(doubled(jax.nn.relu(h)), P()), None

    h = jnp.einsum("i,ij->j", input, params["w1"], out_sharding=P("d")) + params["b1"]
    h = jax.nn.gelu(h)
    h, _ = jax.lax.scan(layer, jax.sharding.reshard(h, P()), params["stack"])
    return jnp.einsum("j,jk->k", h, params["w2"], out_sharding=P()) + params["b2"]


def unnamed(input: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    h = jax.nn.gelu(input @ params["w1"] + params["b1"])
    h, _ = jax.lax.scan(lambda h, w: (doubled(jax.nn.relu(h @ w)), None), h, params["stack"])
    return h @ params["w2"] + params["b2"]


@pytest.mark.parametrize("jitted", [False, True])
def test_a_model_may_name_the_axes_of_its_products(mesh: Mesh, jitted: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"w1": (4, 8), "b1": (8,), "stack": (2, 8, 8), "w2": (8, 3), "b2": (3,)}
    specs = {"w1": (None, "d"), "b1": ("d",), "stack": (None, None, "d"), "w2": ("d",), "b2": ()}
    plain = {n: jax.random.normal(k, s) / 2 for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    # Samples depend on the signs of eigenvectors: those of one curvature are compared.
    base = lk.kfac(unnamed, plain, (X, np.zeros((len(X), 3))), loss_fn="mse")

    def everything(f: Any, params: Any, x: Any) -> Any:
        curvature = lk.ekfac(f, params, (x, jnp.zeros((len(x), 3))), loss_fn="mse")
        fit = lk.data_fit(f, params, (x, jnp.zeros((len(x), 3))), loss_fn="mse")
        key = jax.random.key(1)
        drawn = lk.predictive_samples(base, f, params, x, key, 2, prior_prec=1.0)
        spread = lk.predictive_covariance(curvature, f, params, x, prior_prec=1.0)
        return curvature.diagonal(), fit.loss, drawn, spread.covariance

    wanted = everything(unnamed, plain, jnp.asarray(X))
    with jax.set_mesh(mesh):
        params = {n: put(mesh, plain[n], *specs[n]) for n in plain}
        compute = lambda p, x: everything(named, p, x)  # noqa: E731
        found = (jax.jit(compute) if jitted else compute)(params, put(mesh, X, "d"))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


def test_errors_of_a_model_are_its_own(mesh: Mesh) -> None:
    def broken(input: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        del input, params
        msg = "no such model"
        raise KeyError(msg)

    with jax.set_mesh(mesh), pytest.raises(TypeError, match="no such model"):
        lk.kfac(broken, PARAMS, (X, Y), loss_fn="mse")


def test_arrays_without_explicit_axes_stay_as_they_are(mesh: Mesh) -> None:
    plain = jnp.ones(3)
    moved = meshes.automatic(put(mesh, plain, "d"))
    assert meshes.automatic(plain) is plain
    assert meshes.automatic(moved) is moved
    assert jax.typeof(moved).sharding.mesh.axis_types == (AxisType.Auto,)
    assert isinstance(moved.sharding, NamedSharding)
    assert moved.sharding.spec == P("d")
