"""How large should a network be? The evidence says so, with no data held out.

Trains networks of several depths and widths to predict how far cars go on a gallon, each with its
own prior precisions and noise variance by the evidence (Immer et al. 2021), on two thirds of the
data. Prints the evidence of each, and the likelihood of the last third, which it never saw.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import autompg_data

import laplax_kfac

x, y = autompg_data()
x = x[:, :7]  # without the names
x, y = ((a - a.mean(axis=0)) / a.std(axis=0) for a in (x.astype("float32"), y.astype("float32")))
order = np.random.default_rng(0).permutation(len(x))
x, y = x[order], y[order, None]
train, test = (x[:261], y[:261]), (x[261:], y[261:])


def model_fn(input, params):
    *hidden, last = params
    for layer in hidden:
        input = jnp.tanh(input @ layer["w"] + layer["b"])
    return input @ last["w"] + last["b"]


def network(depth, width, seed=0):
    """Parameters of a network with so many hidden layers."""
    random = np.random.default_rng(seed)
    sizes = [x.shape[1], *[width] * depth, 1]
    return [
        {
            "w": jnp.asarray(random.normal(size=(m, n)) / np.sqrt(m), jnp.float32),
            "b": jnp.zeros(n),
        }
        for m, n in pairwise(sizes)
    ]


results = {}
print(f"{'network':>10}{'evidence / N':>15}{'held-out log-likelihood / N':>30}")
for depth, width in [(0, 0), (1, 1), (1, 3), (1, 10), (1, 30), (2, 10)]:
    found = laplax_kfac.marglik_training(
        model_fn, network(depth, width), train, loss_fn="mse",
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-2, 2000)), epochs=400, every=10,
        prior_prec=jnp.ones(depth + 1), noise_variance=0.5, batch_size=64,
    )  # fmt: skip
    held_out = laplax_kfac.data_fit(model_fn, found.params, test, loss_fn="mse")
    evidence = float(found.evidence.value) / len(train[0])
    score = float(held_out.log_likelihood(found.noise_variance)) / len(test[0])
    name = f"{depth} x {width}" if depth else "linear"
    results[name] = evidence, score
    print(f"{name:>10}{evidence:15.3f}{score:30.3f}")
by_evidence = max(results, key=lambda name: results[name][0])
by_score = max(results, key=lambda name: results[name][1])
gained = results[by_evidence][1] - results["linear"][1]
lost = results[by_score][1] - results[by_evidence][1]
print(f"The evidence chooses {by_evidence}: held-out {gained:.3f} better than linear,")
print(f"and {lost:.3f} worse than {by_score}, which the held-out data themselves choose.")
