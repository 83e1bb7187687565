"""Regression: tables of a few hundred rows, and how likely held-out targets are."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize_scalar

import laplax_kfac as lk
from study import data as sources
from study import metrics
from study.approximations import APPROXIMATIONS, PRIORS, Fitted, fitted, hyperparameters
from study.classification import MEMBERS
from study.data import COLUMNS, Data, Split
from study.networks import Network
from study.results import Record, Results
from study.training import Recipe, key_of, train_all

NETWORK = Network((COLUMNS, 50, 1))
RECIPE = Recipe("mse", epochs=200, batch_size=39, learning_rate=1e-2)
METHODS = ("last_full", "diagonal", "kfac", "kfac_mc", "kfac_empirical", "ekfac", "kfoc", "full")


@dataclass(frozen=True)
class Regression:
    """A task: a table and a network; see `classification.Classification`."""

    name: str
    title: str
    source: Callable[[], Split]
    network: Network = NETWORK
    recipe: Recipe = RECIPE
    approximations: Sequence[str] = METHODS
    validated: Sequence[str] = ("last_full", "diagonal", "kfac")

    def priors(self, name: str) -> list[str]:
        """How the prior of an approximation is chosen."""
        priors = APPROXIMATIONS[name].priors
        return [p for p in priors if p != "validation" or name in self.validated]


TASKS = [Regression(name, name, sources.TABLES[name]) for name in ("autompg", "boston", "diabetes")]


def run(task: Regression, seeds: Sequence[int], results: Results) -> Iterator[str]:
    """Run what is missing; gives the names of the cells as they are finished."""
    names = [name for name, _ in methods_of(task)]
    if all((task.name, name, seed) in results for name in names for seed in seeds):
        return
    source = task.source()
    data = [sources.table(source, seed) for seed in seeds]
    x, y = (jnp.stack([getattr(d.train, k) for d in data]) for k in ("x", "y"))
    start = time.process_time()
    networks = jax.block_until_ready(train_all(task.network, task.recipe, x, y, MEMBERS))
    train_seconds = (time.process_time() - start) / (len(seeds) * MEMBERS)
    forward = jax.jit(jax.vmap(task.network, (0, None)))
    for place, seed in enumerate(seeds):
        members = [jax.tree.map(lambda leaf: leaf[place, m], networks) for m in range(MEMBERS)]  # noqa: B023
        for method, chosen in (("map", members[:1]), ("ensemble", members)):
            if (task.name, method, seed) not in results:
                numbers = of_mixture(lambda x: [forward(x, p) for p in chosen], data[place])  # noqa: B023
                numbers["train_seconds"] = len(chosen) * train_seconds
                results.add(task.name, method, seed, numbers)
                yield f"{task.name} {method} {seed}"
    for name in task.approximations:
        approximation = APPROXIMATIONS[name]
        for place, seed in enumerate(seeds):
            model = None
            for prior in task.priors(name):
                cell = (task.name, f"{name}/{prior}", seed)
                if cell in results:
                    continue
                params = jax.tree.map(lambda leaf: leaf[place, 0], networks)  # noqa: B023
                model = model or fitted(
                    approximation, task.network, params, data[place], task.recipe.loss
                )
                start = time.process_time()
                tuned = jax.block_until_ready(model.tuned(prior, data[place].validation))
                seconds = {
                    "fit_seconds": model.seconds,
                    "tune_seconds": time.process_time() - start,
                }
                results.add(*cell, of_laplace(model, tuned, data[place].test) | seconds)
                yield " ".join(map(str, cell))
    for place, seed in enumerate(seeds):
        if (task.name, "marglik", seed) not in results:
            results.add(task.name, "marglik", seed, marglik(task, seed, data[place]))
            yield f"{task.name} marglik {seed}"


def of_mixture(outputs: Callable[[Any], list[jax.Array]], data: Data) -> Record:
    """One network, or several as a Gaussian with their mean and variance; noise by validation."""

    def moments(x: Any) -> tuple[np.ndarray, np.ndarray]:
        each = np.asarray(outputs(x), "float64")
        return each.mean(axis=0), each.var(axis=0)

    mean, variance = moments(data.validation.x)

    def nll(log_noise: float) -> float:
        noisy = variance + np.exp(log_noise)
        return metrics.of_gaussians(mean, noisy, data.validation.y)["nll"]

    noise = float(np.exp(minimize_scalar(nll, bounds=(-8.0, 3.0), method="bounded").x))
    mean, variance = moments(data.test.x)
    scores = metrics.of_gaussians(mean, variance + noise, data.test.y)
    return {**scores, "noise_variance": noise}


def of_laplace(model: Fitted, tuned: Any, test: Split) -> Record:
    """Scores of the predictive with its noise."""
    start = time.process_time()
    predictive = jax.block_until_ready(model.predictive(jnp.asarray(test.x), tuned))
    seconds = time.process_time() - start
    noisy = predictive.with_noise(tuned.noise_variance)
    mean, variance = (np.asarray(a, "float64") for a in (noisy.mean, noisy.variance))
    return {
        **metrics.of_gaussians(mean, variance, test.y), **hyperparameters(tuned),
        "predict_seconds": 1000 * seconds / len(test.x),
    }  # fmt: skip


def marglik(task: Regression, seed: int, data: Data) -> Record:
    """Trained by the evidence, with its noise (Immer et al. 2021)."""
    recipe, train = task.recipe, (data.train.x, data.train.y)
    start = time.process_time()
    steps = recipe.steps(len(train[0]))
    found = lk.marglik_training(
        task.network, task.network.init(key_of(seed, 0)), train,
        loss_fn=recipe.loss, epochs=recipe.epochs, every=min(10, recipe.epochs),
        batch_size=recipe.batch_size, noise_variance=0.5,
        optimizer=optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, steps)),
    )  # fmt: skip
    seconds = time.process_time() - start
    fit = lk.data_fit(task.network, found.params, train, loss_fn=recipe.loss)
    model = Fitted(task.network, found.params, found.curvature, fit, recipe.loss, seconds)
    return of_laplace(model, found, data.test) | {"train_seconds": seconds}


def methods_of(task: Regression) -> list[tuple[str, str]]:
    """Names and titles of a task's methods, in the order of tables."""
    rows = [("map", "MAP, noise by validation"), ("ensemble", "ensemble of five")]
    for name in task.approximations:
        approximation = APPROXIMATIONS[name]
        rows += [
            (f"{name}/{prior}", f"{approximation.title}; {PRIORS[prior]}")
            for prior in task.priors(name)
        ]
    return [*rows, ("marglik", "KFAC; trained by evidence")]
