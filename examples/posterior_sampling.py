"""Functions drawn from the posterior: certain where there are data, uncertain where there are none.

Fits a small network to one feature of scikit-learn's diabetes data, tunes prior precision and noise
by the evidence, and draws networks from the posterior. Prints their spread where the data are and
where they are not, against the closed form, and how many held-out targets fall into the 95 %
interval. Draws docs/assets/posterior_sampling.png.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import laplax_kfac

# The body mass index against the progression of the disease, both of unit variance.
x, y = load_diabetes(return_X_y=True)
x, y = (x[:, [2]] / x[:, 2].std()).astype("float32"), y[:, None].astype("float32")
y = (y - y.mean()) / y.std()
train, test = (x[::2], y[::2]), (x[1::2], y[1::2])

random = np.random.default_rng(0)
params = {
    "hidden": {"w": jnp.asarray(random.normal(size=(1, 30)), jnp.float32), "b": jnp.zeros(30)},
    "out": {"w": jnp.asarray(random.normal(size=(30, 1)) / 6, jnp.float32), "b": jnp.zeros(1)},
}


def model_fn(input, params):
    hidden = jnp.tanh(input @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


found = laplax_kfac.marglik_training(
    model_fn, params, train, loss_fn="mse", optimizer=optax.adam(1e-2), epochs=400, every=10,
    prior_prec=1.0, noise_variance=0.5,
)  # fmt: skip
noise = found.noise_variance
assert noise is not None
print(f"tuned: prior precision {found.prior_prec:.3g}, noise variance {noise:.3g}")

# What was found goes into every call whole: the prior precision, and the noise that belongs to it.
posterior = laplax_kfac.make_posterior(found.curvature, found, params=found.params)
networks = posterior.sample(jax.random.key(0), 500)

grid = jnp.linspace(-6, 8, 200)[:, None]
inside = (grid[:, 0] > train[0].min()) & (grid[:, 0] < train[0].max())


def outputs(params, inputs):
    return jax.vmap(lambda x: model_fn(x, params))(inputs)[:, 0]


def linearised(params, inputs):
    """The network linearised at the trained parameters: what the posterior is exact for."""
    step = jax.tree.map(jnp.subtract, params, found.params)
    return sum(jax.jvp(lambda p: outputs(p, inputs), (found.params,), (step,)))


drawn = jax.jit(jax.vmap(lambda p: linearised(p, grid)))(networks)
plain = jax.jit(jax.vmap(lambda p: outputs(p, grid)))(networks)
closed = laplax_kfac.predictive_covariance(
    found.curvature, model_fn, found.params, grid, prior_prec=found
)
deviation = jnp.sqrt(closed.variance[:, 0])
print(f"{'mean standard deviation':32}{'among data':>12}{'outside':>10}")
for name, spread in {
    "closed form": deviation,
    "500 networks, linearised": drawn.std(axis=0),
    "500 networks as they are": plain.std(axis=0),
}.items():
    print(f"{name:32}{spread[inside].mean():12.3f}{spread[~inside].mean():10.3f}")

held_out = laplax_kfac.predictive_covariance(
    found.curvature, model_fn, found.params, test[0], prior_prec=found
)
width = 1.96 * jnp.sqrt(held_out.variance + noise)
covered = (jnp.abs(test[1] - held_out.mean) < width).mean()
print(f"{len(test[0])} held-out targets: {covered:.1%} within the 95 % interval")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(grid, drawn[:30].T, color="C0", alpha=0.25, linewidth=1)
low, high = (closed.mean[:, 0] + sign * 1.96 * deviation for sign in (-1, 1))
axes.fill_between(grid[:, 0], low, high, color="C0", alpha=0.15)
axes.plot(grid, closed.mean, color="C0", label="trained network")
axes.plot(*train, ".", color="black", markersize=3, label="data")
axes.set(xlabel="body mass index", ylabel="progression", ylim=(-4, 6))
axes.legend()
figure.savefig(Path(__file__).parents[1] / "docs/assets/posterior_sampling.png", dpi=120)
