"""Continual learning: digits with permuted pixels, a posterior being the prior of the next task."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import laplax_kfac as lk
from study import data as sources
from study.approximations import APPROXIMATIONS
from study.networks import Network
from study.results import Results
from study.training import LOSSES

METHODS = {"plain": "none", "diagonal": "diagonal", "kfac": "KFAC", "ekfac": "EKFAC"}
NETWORK = Network((64, 100, 10), jax.nn.relu)


@dataclass(frozen=True)
class Continual:
    """A task of tasks: how many, and how long each is trained on."""

    name: str = "continual"
    title: str = "permuted digits"
    tasks: int = 5
    steps: int = 600
    batch_size: int = 100
    prior_prec: float = 1.0
    network: Network = NETWORK


TASKS = [Continual()]


def run(task: Continual, seeds: Sequence[int], results: Results) -> Iterator[str]:
    """Run what is missing, a method and a seed at a time."""
    source = sources.digits8()
    images, labels = source.x.reshape(-1, 64), source.y
    for method in METHODS:
        for seed in seeds:
            if (task.name, method, seed) in results:
                continue
            random = np.random.default_rng(seed)
            rows = random.permutation(len(labels))
            train, test = rows[:1300], rows[1300:]
            orders = [random.permutation(64) for _ in range(task.tasks)]
            params = task.network.init(jax.random.fold_in(jax.random.key(2), seed))
            posterior: Any = None
            total: Any = None
            mean = params
            for number, order in enumerate(orders):
                x, y = images[train][:, order], labels[train]
                indices = random.integers(len(train), size=(task.steps, task.batch_size))
                params = trained(task, params, (x, y), indices, posterior, mean)
                if method == "plain":
                    continue
                approximation = APPROXIMATIONS[method]
                new = approximation.fit(
                    task.network, params, (x, y), loss_fn="cross_entropy", **approximation.options
                )
                total = new if number == 0 else lk.merge(total, new)
                posterior, mean = lk.make_posterior(total, task.prior_prec), params
            correct = [
                float(np.mean(np.argmax(_outputs(task.network, images[test][:, o], params), 1)
                              == labels[test]))
                for o in orders
            ]  # fmt: skip
            results.add(
                task.name, method, seed,
                {"accuracy": float(np.mean(correct)), "first": correct[0], "last": correct[-1]},
            )  # fmt: skip
            yield f"{task.name} {method} {seed}"


@functools.partial(jax.jit, static_argnames="task")
def trained(
    task: Continual, params: PyTree, data: Any, indices: Array, posterior: Any, mean: PyTree
) -> PyTree:
    """Adam on minus the log joint density, the posterior of the tasks before being the prior."""
    x, y = data
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, task.steps))

    def objective(params: PyTree, at: Array) -> Array:
        losses = LOSSES["cross_entropy"](_outputs(task.network, x[at], params), y[at])
        if posterior is None:
            penalty = 0.5 * task.prior_prec * optax.tree.norm(params, squared=True)
        else:
            penalty = posterior.penalty(params, mean)
        return jnp.mean(losses) + penalty / len(x)

    def step(state: Any, at: Array) -> tuple[Any, None]:
        updates, inner = optimizer.update(jax.grad(objective)(state[0], at), state[1])
        return (optax.apply_updates(state[0], updates), inner), None

    return jax.lax.scan(step, (params, optimizer.init(params)), indices)[0][0]


def _outputs(network: Network, x: Any, params: PyTree) -> Array:
    return jax.vmap(network, (0, None))(x, params)
