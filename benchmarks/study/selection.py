"""Model selection: does the evidence rank architectures as data that were held out do?"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from scipy.optimize import minimize
from scipy.special import gammaln

from study import data as sources
from study import metrics
from study.approximations import APPROXIMATIONS, fitted
from study.data import COLUMNS, Data, Floats, Split
from study.networks import Network, num_params
from study.regression import of_laplace
from study.results import Record, Results
from study.training import Recipe, train

HIDDEN = ((), (1,), (3,), (10,), (30,), (100,), (10, 10), (30, 30))
RECIPE = Recipe("mse", epochs=150, batch_size=39, learning_rate=1e-2)


@dataclass(frozen=True)
class Selection:
    """A task: a table, and networks of these hidden sizes.

    Each is trained, its prior precision and noise are tuned by the evidence under KFAC, and it is
    trained anew with them, ``rounds`` times. For the last network KFAC and the full generalised
    Gauss-Newton matrix then tune their own.
    """

    name: str
    title: str
    source: Callable[[], Split]
    hidden: Sequence[tuple[int, ...]] = HIDDEN
    recipe: Recipe = RECIPE
    rounds: int = 2


TASKS = [
    Selection(f"select_{name}", name, sources.TABLES[name])
    for name in ("autompg", "boston", "diabetes", "teacher")
]


def architecture(hidden: tuple[int, ...]) -> str:
    return "-".join(map(str, hidden)) or "linear"


def symmetries(hidden: tuple[int, ...]) -> float:
    """Logarithm of how many orders and signs of hidden tanh units are one function."""
    units = np.asarray(hidden, "float64")
    return float(np.sum(gammaln(units + 1) + units * np.log(2)))


@functools.partial(jax.jit, static_argnames=("network", "recipe"))
def trained(
    network: Network, recipe: Recipe, keys: Array, x: Array, y: Array, prior: Array, noise: Array
) -> PyTree:
    """The networks of all seeds, each with its own prior precision and noise variance."""
    one = functools.partial(train, network, recipe)
    return jax.vmap(one)(keys, x, y, prior, noise)


def run(task: Selection, seeds: Sequence[int], results: Results) -> Iterator[str]:
    """Run what is missing, an architecture at a time."""
    data = [sources.table(task.source(), seed) for seed in seeds]
    x, y = (jnp.stack([getattr(d.train, k) for d in data]) for k in ("x", "y"))
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(1), seed))(jnp.asarray(seeds))
    for hidden in task.hidden:
        name = architecture(hidden)
        if all((task.name, name, seed) in results for seed in seeds):
            continue
        network = Network((COLUMNS, *hidden, 1))
        prior, noise = jnp.ones(len(seeds)), jnp.full(len(seeds), 0.5)
        for _ in range(task.rounds):
            networks = trained(network, task.recipe, keys, x, y, prior, noise)
            models = [
                fitted(APPROXIMATIONS["kfac"], network, _at(networks, k), d, "mse")
                for k, d in enumerate(data)
            ]
            tuned = [m.tuned("evidence", d.validation) for m, d in zip(models, data, strict=True)]
            prior = jnp.stack([t.prior_prec for t in tuned])
            noise = jnp.stack([jnp.asarray(t.noise_variance) for t in tuned])
        for place, seed in enumerate(seeds):
            if (task.name, name, seed) in results:
                continue
            scores: Record = {"num_params": num_params(_at(networks, place))}
            scores["symmetries"] = symmetries(hidden)
            params, of_seed = _at(networks, place), data[place]
            model = fitted(APPROXIMATIONS["kfac"], network, params, of_seed, "mse")
            chosen = model.tuned("evidence", of_seed.validation)
            scores["kfac"] = of_laplace(model, chosen, of_seed.test)
            scores["full"] = dense(network, params, of_seed)
            results.add(task.name, name, seed, scores)
            yield f"{task.name} {name} {seed}"


@functools.partial(jax.jit, static_argnames="network")
def _linearised(network: Network, params: PyTree, x: Array) -> tuple[Array, Array]:
    """Outputs, and their Jacobians with respect to the raveled parameters."""
    theta, unravel = jax.flatten_util.ravel_pytree(params)
    rows = jax.vmap(jax.jacrev(lambda theta, x: network(x, unravel(theta))[0]), (None, 0))
    return jax.vmap(network, (0, None))(x, params), rows(theta, x)


def dense(network: Network, params: PyTree, data: Data) -> Record:
    """Evidence and predictive of one output under the full matrix, from their formulas.

    Its eigenvalues are those of ``J^T J / noise``, with as many of them positive as there are data.
    """
    x, y = (np.asarray(a, "float64") for a in (data.train.x, data.train.y))
    outputs, jacobian = (np.asarray(a, "float64") for a in _linearised(network, params, x))
    _, values, vectors = np.linalg.svd(jacobian, full_matrices=False)
    squares = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(params))
    loss, count = float(np.sum((outputs - y) ** 2)), len(y)

    def minus_evidence(logs: Floats) -> float:
        prior, noise = np.exp(logs)
        fit = -loss / (2 * noise) - 0.5 * count * np.log(2 * np.pi * noise)
        growth = np.sum(np.log1p(values**2 / (noise * prior)))
        return float(-fit + 0.5 * (prior * squares + growth))

    best = minimize(minus_evidence, np.log([1.0, 0.5]), method="Nelder-Mead")
    prior, noise = np.exp(best.x)
    mean, rows = (np.asarray(a, "float64") for a in _linearised(network, params, data.test.x))
    inside = rows @ vectors.T
    certain = values**2 / (values**2 + noise * prior)
    variance = (np.sum(rows**2, axis=1) - np.sum(certain * inside**2, axis=1)) / prior
    scores = metrics.of_gaussians(mean, variance[:, None] + noise, data.test.y)
    return {**scores, "evidence": -float(best.fun), "prior_prec": prior, "noise_variance": noise}


def _at(networks: PyTree, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], networks)
