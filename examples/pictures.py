"""Pictures of what the package computes: draws docs/assets/pictures-*.png for docs/pictures.md.

A network on handwritten digits of 4 x 4 pixels, small enough for the exact curvature to stand
beside the Kronecker-factored one; and a regression in one dimension with a gap in its data.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import laplax
import matplotlib.pyplot as plt
import numpy as np
import optax
from loguru import logger
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import train_test_split

import laplax_kfac
from laplax_kfac import plotting

logger.remove()  # laplax logs every step
ASSETS = Path(__file__).parents[1] / "docs/assets"


def mlp(widths, key):
    """Parameters of a network, and the network."""
    keys = jax.random.split(key, len(widths) - 1)
    params = {
        f"layer{k}": {"w": jax.random.normal(key, (i, o)) / jnp.sqrt(i), "b": jnp.zeros(o)}
        for k, (key, i, o) in enumerate(zip(keys, widths[:-1], widths[1:], strict=True))
    }

    def model_fn(input, params):
        for k in range(len(widths) - 1):
            layer = params[f"layer{k}"]
            input = (jnp.tanh(input) if k else input) @ layer["w"] + layer["b"]
        return input

    return model_fn, params


def train(log_likelihood, params, steps, prior_prec):
    """The most probable parameters under a Gaussian prior."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def loss(params):
        return 0.5 * prior_prec * optax.tree.norm(params, squared=True) - log_likelihood(params)

    def step(state, _):
        params, inner = state
        updates, inner = optimizer.update(jax.grad(loss)(params), inner)
        return (optax.apply_updates(params, updates), inner), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=steps)[0][0])(params)


def save(figure, name):
    figure.savefig(ASSETS / f"pictures-{name}.png", dpi=90)
    print(f"docs/assets/pictures-{name}.png")


# -- classification ------------------------------------------------------------------------------

digits = load_digits()
x = digits.images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16).astype("float32") / 16
x, x_test, y, y_test = train_test_split(x, digits.target, test_size=0.8, random_state=0)
model_fn, params = mlp((16, 6, 10), jax.random.key(0))


def classes_given_digits(params):
    logits = jax.vmap(lambda x: model_fn(x, params))(x)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()


params = train(classes_given_digits, params, 3000, prior_prec=0.01)
curv = laplax_kfac.ekfac(model_fn, params, (x, y), loss_fn="cross_entropy")
_, exact = laplax.laplace(
    model_fn, params, (jnp.asarray(x), jnp.asarray(y)), loss_fn="cross_entropy", curv_type="full"
)

save(plotting.plot_factors(curv, "layer0")[0].figure, "factors")
save(plotting.plot_against_exact(curv, exact, "layer0")[0].figure, "exact")
save(plotting.plot_spectrum(curv).figure, "spectrum")

fit = laplax_kfac.data_fit(model_fn, params, (x, y), loss_fn="cross_entropy")
tuned = laplax_kfac.tune(curv, params, log_likelihood=fit)

predictive = laplax_kfac.predictive_covariance(curv, model_fn, params, x_test, prior_prec=tuned)
noise = np.random.default_rng(0).uniform(size=x_test.shape).astype("float32")  # no digits at all
strange = laplax_kfac.predictive_covariance(curv, model_fn, params, noise, prior_prec=tuned)
known = {"MAP": jax.nn.softmax(predictive.mean)}
unknown = {"MAP": jax.nn.softmax(strange.mean)}
for link in ("probit", "mean_field_2"):
    known[link] = laplax_kfac.class_probabilities(predictive, link)
    unknown[link] = laplax_kfac.class_probabilities(strange, link)

print(f"\n{'':14}accuracy    NLL  Brier  AUROC (noise)    prior precision {tuned.prior_prec:.3g}")
_, axes = plt.subplots(layout="constrained")
for name, probabilities in known.items():
    p = np.asarray(probabilities)
    accuracy = (p.argmax(axis=1) == y_test).mean()
    brier = ((p - np.eye(10)[y_test]) ** 2).sum(axis=1).mean()
    scores = np.concatenate([p.max(axis=1), unknown[name].max(axis=1)])
    auroc = roc_auc_score(np.repeat([1, 0], len(p)), scores)
    print(f"{name:14}{accuracy:8.1%}{log_loss(y_test, p):7.3f}{brier:7.3f}{auroc:7.3f}")
    plotting.plot_reliability(p, y_test, name=name, axes=axes)
save(axes.figure, "reliability")

# -- regression ----------------------------------------------------------------------------------

keys = jax.random.split(jax.random.key(1), 3)
x = jax.random.uniform(keys[0], (120, 1), minval=-3, maxval=3)
x = x[jnp.abs(x[:, 0] - 0.5) > 1]  # a gap
y = jnp.sin(2 * x) + 0.2 * jax.random.normal(keys[1], x.shape)
model_fn, params = mlp((1, 16, 16, 1), keys[2])


def targets_given_inputs(params):
    residuals = jax.vmap(lambda x: model_fn(x, params))(x) - y
    return -0.5 * jnp.sum(residuals**2) / 0.2**2


params = train(targets_given_inputs, params, 3000, prior_prec=1.0)
curv = laplax_kfac.ekfac(model_fn, params, (x, y), loss_fn="mse")
fit = laplax_kfac.data_fit(model_fn, params, (x, y), loss_fn="mse")
tuned = laplax_kfac.tune(curv, params, log_likelihood=fit, noise_variance=0.04)
assert tuned.noise_variance is not None

grid = jnp.linspace(-4.5, 4.5, 200)[:, None]
marginals = laplax_kfac.predictive_variance(curv, model_fn, params, grid, prior_prec=tuned)
functions = laplax_kfac.predictive_samples(
    curv, model_fn, params, grid, jax.random.key(2), 6, prior_prec=tuned
)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
plotting.plot_band(grid, marginals, noise_variance=tuned.noise_variance, axes=axes[0])
axes[1].plot(grid[:, 0], functions[:, :, 0].T, linewidth=1)
for ax, title in zip(axes, ("predictive", "functions drawn from it"), strict=True):
    ax.plot(x[:, 0], y[:, 0], ".", color="black", markersize=3)
    ax.set(title=title, ylim=(-3, 4.5))
save(figure, "regression")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
plotting.plot_evidence_over_prior(
    curv, params, log_likelihood=fit, prior_precs=np.geomspace(1e-3, 30, 61),
    noise_variance=tuned.noise_variance, axes=left,
)  # fmt: skip
plotting.plot_evidence(tuned, axes=right)
save(figure, "evidence")
