"""What is computed on eight devices, and how far it is from one; run in a process of its own.

Prints, for every layout of the arrays and everything that is computed, the largest relative error
against the same on one device, as JSON.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import laplax_kfac as lk

VOCABULARY, WIDTH, CLASSES = 16, 8, 3


def model(input: jax.Array, params: dict[str, Any]) -> jax.Array:
    """An embedding, a stack under scan, a scale without Kronecker form, a head with a bias."""
    x = params["embedding"][input]

    def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ layer["w"] + layer["b"]), None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    x = jnp.mean(x * params["scale"], axis=0)
    return x @ params["head"] + params["bias"]


def params_of(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, 6)
    draw = lambda k, *shape: jax.random.normal(k, shape) / np.sqrt(shape[-2] if shape[1:] else 1)  # noqa: E731
    return {
        "embedding": draw(keys[0], VOCABULARY, WIDTH),
        "blocks": {"w": draw(keys[1], 2, WIDTH, WIDTH), "b": draw(keys[2], 2, WIDTH)},
        "scale": 1 + 0.1 * draw(keys[3], WIDTH),
        "head": draw(keys[4], WIDTH, CLASSES),
        "bias": draw(keys[5], CLASSES),
    }


def batch_of(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    x = jax.random.randint(key, (size, 5), 0, VOCABULARY)
    return x, jax.random.randint(key, (size,), 0, CLASSES)


# -- layouts -----------------------------------------------------------------------------------


def mesh_of(kind: AxisType, *sizes: int) -> Mesh:
    names = ("data", "other")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def put(tree: Any, mesh: Mesh, spec: Callable[[jax.Array], P]) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)


def along(name: str, size: int, *, last: bool) -> Callable[[jax.Array], P]:
    """Shard the first or last axis that the devices divide."""

    def spec(x: jax.Array) -> P:
        fitting = [k for k, n in enumerate(x.shape) if n % size == 0]
        if not fitting:
            return P()
        axis = fitting[-1 if last else 0]
        return P(*[None] * axis, name)

    return spec


Layout = Callable[[Any, Any], tuple[AbstractContextManager[Any], Any, Any]]
"""(params, data) -> the context to work in, the params, the data."""


def plain(params: Any, data: Any) -> tuple[AbstractContextManager[Any], Any, Any]:
    return nullcontext(), params, data


def replicated(kind: AxisType, *, set_it: bool) -> Layout:
    def layout(params: Any, data: Any) -> Any:
        mesh = mesh_of(kind, 8)
        context = jax.set_mesh(mesh) if set_it else nullcontext()
        return context, put(params, mesh, lambda _: P()), put(data, mesh, lambda _: P("data"))

    return layout


def sharded_parameters(kind: AxisType, *, last: bool) -> Layout:
    def layout(params: Any, data: Any) -> Any:
        mesh = mesh_of(kind, 8)
        spec = along("data", 8, last=last)
        return nullcontext(), put(params, mesh, spec), put(data, mesh, lambda _: P("data"))

    return layout


def two_axes(kind: AxisType, *, both: bool) -> Layout:
    """The batch along both axes of a mesh, or along one, with parameters along the other."""

    def layout(params: Any, data: Any) -> Any:
        mesh = mesh_of(kind, 4, 2)
        spec = (lambda _: P()) if both else along("other", 2, last=True)
        batch = P(("data", "other")) if both else P("data")
        return nullcontext(), put(params, mesh, spec), put(data, mesh, lambda _: batch)

    return layout


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
LAYOUTS: dict[str, Layout] = {
    "explicit": replicated(EXPLICIT, set_it=False),
    "explicit_set": replicated(EXPLICIT, set_it=True),
    "automatic": replicated(AUTO, set_it=False),
    "automatic_set": replicated(AUTO, set_it=True),
    "fsdp_first_explicit": sharded_parameters(EXPLICIT, last=False),
    "fsdp_last_explicit": sharded_parameters(EXPLICIT, last=True),
    "fsdp_first_automatic": sharded_parameters(AUTO, last=False),
    "two_data_axes_explicit": two_axes(EXPLICIT, both=True),
    "two_data_axes_automatic": two_axes(AUTO, both=True),
    "tensor_explicit": two_axes(EXPLICIT, both=False),
    "tensor_automatic": two_axes(AUTO, both=False),
}


# -- what is computed ----------------------------------------------------------------------------

LOSS = "cross_entropy"


@jax.jit
def dense_on_one(curvature: lk.Curvature) -> jax.Array:
    return curvature.to_dense()


def dense(curvature: lk.Curvature) -> jax.Array:
    """The matrix, from the blocks brought to one device: eigenvectors may differ in signs."""
    return dense_on_one(jax.tree.map(np.asarray, curvature))


def fitted(params: Any, data: Any, **keywords: Any) -> jax.Array:
    return dense(lk.kfac(model, params, data, loss_fn=LOSS, **keywords))


def streamed(params: Any, data: Any) -> jax.Array:
    acc = lk.accumulator(model, params, loss_fn=LOSS)
    first, second = acc.update(acc.init(), data[0]), acc.init()
    for batch in data[1:]:
        second = acc.update(second, batch)
    return dense(acc.finalize(acc.merge(first, second)))


def under_jit(params: Any, data: Any, **keywords: Any) -> jax.Array:
    fit = jax.jit(lambda p, d: lk.kfac(model, p, d, loss_fn=LOSS, **keywords))
    return dense(fit(params, list(data)))


def of_curvature(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def compute(params: Any, data: Any) -> Any:
        curvature = lk.kfac(model, params, data, loss_fn=LOSS)
        return function(curvature, params, data)

    return compute


def of_same_curvature(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """For what depends on the signs of eigenvectors, which rounding decides."""

    def compute(params: Any, data: Any) -> Any:
        on_one = jax.tree.map(np.asarray, (params, data))
        curvature = lk.kfac(model, *on_one, loss_fn=LOSS)
        place = params["bias"].sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, P())
            curvature = jax.tree.map(lambda x: jax.device_put(np.asarray(x), place), curvature)
        return function(curvature, params, data)

    return compute


def predictives(curvature: lk.Curvature, params: Any, data: Any) -> Any:
    x = data[0][0]
    found = lk.predictive_covariance(curvature, model, params, x, prior_prec=2.0)
    marginal = lk.predictive_variance(curvature, model, params, x, prior_prec=2.0)
    joint = lk.joint_covariance(curvature, model, params, x, prior_prec=2.0)
    return found.mean, found.covariance, marginal.variance, joint


def sampled_functions(curvature: lk.Curvature, params: Any, data: Any) -> Any:
    key = jax.random.key(3)
    return lk.predictive_samples(curvature, model, params, data[0][0], key, 4, prior_prec=2.0)


def samples(curvature: lk.Curvature, params: Any, data: Any) -> Any:
    del data
    posterior = lk.make_posterior(curvature, 2.0)
    drawn = posterior.sample(jax.random.key(3), 4, params)
    moved = jax.tree.map(lambda s, p: s - p, drawn, params)  # with the user's own arrays
    return moved, posterior.covariance_mv(params), curvature.mv(params), curvature.trace()


def evidence(curvature: lk.Curvature, params: Any, data: Any) -> Any:
    fit = lk.data_fit(model, params, data, loss_fn=LOSS)
    found = lk.log_marginal_likelihood(curvature, params, log_likelihood=fit, prior_prec=2.0)
    tuned = lk.tune(curvature, params, log_likelihood=fit)
    return fit.loss, found, tuned.prior_prec


def error(curvature: lk.Curvature, params: Any, data: Any) -> Any:
    found = lk.relative_error(curvature, model, params, data, loss_fn=LOSS, key=jax.random.key(5))
    return jax.tree.leaves(found)


COMPUTED: dict[str, Callable[[Any, Any], Any]] = {
    "kfac": fitted,
    "ekfac": functools.partial(fitted, eigenvalue_correction=True),
    "kfoc": functools.partial(fitted, optimal_factors=True, iterations=100),
    "mc": functools.partial(fitted, fisher_type="mc", mc_samples=2),
    "diagonal": functools.partial(fitted, curvature="diagonal"),
    "accumulator": streamed,
    "kfac_under_jit": under_jit,
    "ekfac_under_jit": functools.partial(under_jit, eigenvalue_correction=True),
    "predictives": of_curvature(predictives),
    "sampled_functions": of_same_curvature(sampled_functions),
    "samples": of_same_curvature(samples),
    "evidence": of_curvature(evidence),
    "relative_error": of_curvature(error),
}


def numbers(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def rows(names: list[str], layouts: list[str]) -> Iterator[tuple[str, str, Any]]:
    params = params_of(jax.random.key(0))
    data = [batch_of(jax.random.key(k), n) for k, n in enumerate((24, 24, 16))]
    for name in names:
        compute = COMPUTED[name]
        wanted = numbers(compute(params, data))
        for layout in layouts:
            try:
                context, some_params, some_data = LAYOUTS[layout](params, data)
                with context:
                    found = numbers(compute(some_params, some_data))
                yield name, layout, float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
            except Exception as e:
                yield name, layout, f"{type(e).__name__}: {e}"[:600]


def main(bits: str, names: str = "", layouts: str = "") -> None:
    jax.config.update("jax_enable_x64", bits == "64")
    chosen = names.split(",") if names else list(COMPUTED)
    wanted = layouts.split(",") if layouts else list(LAYOUTS)
    for row in rows(chosen, wanted):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
