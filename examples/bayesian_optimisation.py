"""Where shall be measured next? The predictive says so, and its gradients lead there.

Looks for the maximum of a function that is measured with noise, at one place after another: a
small network is fitted to all measurements, its Laplace approximation (one dense block, for it is
small) says how sure it is, and gradients of the expected improvement in the *input* lead to the
next place. Draws some of the steps, and prints the best value found.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax

import laplax_kfac

mpl.use("agg")
import matplotlib.pyplot as plt

MOST, NOISE = 14, 0.05
random = np.random.default_rng(0)


def measured(x):
    """The function: two maxima, the right one the higher."""
    value = np.sin(3 * x) + 0.6 * np.exp(-4 * (x - 0.5) ** 2)
    return value + NOISE * random.normal(size=np.shape(x))


def model_fn(input, params):
    return jnp.tanh(input @ params["w"] + params["b"]) @ params["out"]


first = {
    "w": jnp.asarray(random.normal(size=(1, 24)), jnp.float32) * 2,
    "b": jnp.asarray(random.normal(size=24), jnp.float32) * 2,
    "out": jnp.zeros((24, 1)),
}


@jax.jit
def trained(params, batch):
    """The network after training on what was measured; weights of 0 stand for what was not yet."""

    def loss(params):
        squares = (model_fn(batch["input"], params) - batch["target"])[:, 0] ** 2
        prior = 0.1 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return jnp.sum(batch["weight"] * squares) / (2 * NOISE**2) + 0.5 * prior

    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 1500))

    def step(state, _):
        params, inner = state
        updates, inner = optimizer.update(jax.grad(loss)(params), inner)
        return (optax.apply_updates(params, updates), inner), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=1500)[0][0]


@jax.jit
def predicted(curvature, params, x):
    """Mean and standard deviation at some places."""
    found = laplax_kfac.predictive_variance(
        curvature, model_fn, params, x[:, None], prior_prec=0.1, noise_variance=NOISE**2
    )
    return found.mean[:, 0], jnp.sqrt(found.variance[:, 0])


@jax.jit
def improvement(curvature, params, x, best):
    """By how much a place is expected to be better than the best so far."""
    mean, deviation = predicted(curvature, params, x)
    z = (mean - best) / deviation
    return deviation * (z * jax.scipy.stats.norm.cdf(z) + jax.scipy.stats.norm.pdf(z))


@jax.jit
def best_place(curvature, params, best):
    """From the best of a coarse grid, up the gradient of the logarithm of the improvement."""

    def value(x):
        return jnp.log(improvement(curvature, params, x[None], best)[0] + 1e-12)

    grid = jnp.linspace(-2, 2, 17)
    start = grid[jnp.argmax(improvement(curvature, params, grid, best))]
    step = lambda x, _: (jnp.clip(x + 0.01 * jnp.clip(jax.grad(value)(x), -5, 5), -2, 2), None)  # noqa: E731
    return jax.lax.scan(step, start, length=50)[0]


batch = {"input": np.zeros((MOST, 1)), "target": np.zeros((MOST, 1)), "weight": np.zeros(MOST)}
for count, x in enumerate([-1.9, -0.9, 1.8]):
    batch["input"][count], batch["target"][count], batch["weight"][count] = x, measured(x), 1.0
accumulate = laplax_kfac.accumulator(model_fn, first, loss_fn="mse", curvature="full")
_, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, constrained_layout=True)
for count in range(3, MOST):
    params = trained(first, batch)
    here = accumulate.at(params)
    curvature = here.finalize(here.update(here.init(), batch))
    best = batch["target"][:count].max()
    x = float(best_place(curvature, params, best))
    if count in (3, 6, MOST - 1):
        ax = axes[(3, 6, MOST - 1).index(count)]
        places = np.linspace(-2, 2, 200)
        mean, deviation = predicted(curvature, params, places)
        ax.fill_between(places, mean - 2 * deviation, mean + 2 * deviation, alpha=0.3)
        ax.plot(places, mean)
        ax.plot(batch["input"][:count], batch["target"][:count], "k.")
        ax.axvline(x, color="tab:orange", linestyle="--")
        ax.set(title=f"{count} measurements", xlabel="input", ylim=(-3, 3))
    batch["input"][count], batch["target"][count], batch["weight"][count] = x, measured(x), 1.0
axes[0].set_ylabel("value; two standard deviations")
plt.savefig(Path(__file__).parent.parent / "docs/assets/bayesian_optimisation.png", dpi=110)
places = np.linspace(-2, 2, 4001)
highest = (np.sin(3 * places) + 0.6 * np.exp(-4 * (places - 0.5) ** 2)).max()
winner = batch["input"][np.argmax(batch["target"]), 0]
print(f"measured {MOST} times; best at {winner:.2f}, {batch['target'].max():.2f} of {highest:.2f}")
