"""One of several processes, each with its own part of the data; prints the curvature's trace."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

if len(sys.argv) > 1 and sys.argv[3] != "1":  # before anything that looks for devices
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", int(sys.argv[3]), int(sys.argv[2]))

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import laplax_kfac as lk


def model(input: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    return jnp.tanh(input @ params["w"] + params["b"]) @ params["v"]


PARAMS = {
    "w": np.linspace(-1, 1, 12).reshape(4, 3),
    "b": np.ones(3),
    "v": np.linspace(-1, 2, 6).reshape(3, 2),
}
X = np.sin(np.arange(64.0)).reshape(16, 4)
Y = np.zeros((16, 2))


def fitted(params: dict[str, jax.Array], data: list[tuple[jax.Array, jax.Array]]) -> np.ndarray:
    curvature = lk.ekfac(model, params, data, loss_fn="mse")
    posterior = lk.make_posterior(curvature, 1.0)
    fit = lk.data_fit(model, params, data, loss_fn="mse")
    found = jax.tree.leaves((curvature.diagonal(), posterior.covariance_diagonal(), fit.loss))
    return np.concatenate([np.ravel(np.asarray(x)) for x in found])


def main(count: str) -> None:
    jax.config.update("jax_enable_x64", True)
    if int(count) == 1:
        print(*fitted(jax.tree.map(jnp.asarray, PARAMS), [(jnp.asarray(X), jnp.asarray(Y))]))
        return
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spread, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = jax.tree.map(lambda x: jax.device_put(x, everywhere), PARAMS)
    mine = slice(jax.process_index() * 4, jax.process_index() * 4 + 4)  # of each batch of 8
    data = [
        tuple(jax.make_array_from_process_local_data(spread, x[k : k + 8][mine]) for x in (X, Y))
        for k in (0, 8)
    ]
    print(*fitted(params, data))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[3])
