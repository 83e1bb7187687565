"""Classification: digits, with five kinds of inputs that are none of those that were learned."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import laplax_kfac as lk
from study import data as sources
from study import metrics
from study.approximations import APPROXIMATIONS, PRIORS, Fitted, fitted, hyperparameters
from study.data import KNOWN, Data, Split
from study.networks import Network
from study.results import Record, Results
from study.training import Recipe, key_of, train_all

MEMBERS = 5
SAMPLES = 1000
LINKS = ("probit", "centred_probit", "mean_field_1", "mean_field_2", "laplace_bridge", "mc")
"""The first is the one of all tables but that of links."""


@dataclass(frozen=True)
class Classification:
    """A task: digits, a network, and what is tried on it.

    Attributes:
        name: In results.
        title: In tables.
        source: The digits.
        sizes: Numbers of digits to train on, to choose by, to judge by.
        network: The network.
        recipe: How it is trained.
        approximations: Names of `APPROXIMATIONS`.
        marglik_epochs: Epochs of training by the evidence.
    """

    name: str
    title: str
    source: Callable[[], Split]
    sizes: tuple[int, int, int]
    network: Network
    recipe: Recipe
    approximations: Sequence[str]
    marglik_epochs: int


EVERY = (
    "last_full", "last_kfac", "diagonal", "kfac", "kfac_mc", "kfac_empirical", "ekfac", "kfoc"
)  # fmt: skip
FEW = ("last_full", "diagonal", "kfac")
DIGITS = sources.digits8, (700, 230, 500)
MNIST = sources.mnist, (2000, 500, 1000)
TASKS = [
    Classification(
        "digits_mlp", "digits, MLP", *DIGITS, Network((64, 30, 30, KNOWN)),
        Recipe("cross_entropy", epochs=60, prior_prec=0.1),
        EVERY, marglik_epochs=60,
    ),
    Classification(
        "digits_small", "digits, small MLP", *DIGITS, Network((64, 16, KNOWN)),
        Recipe("cross_entropy", epochs=60, prior_prec=0.1),
        (*FEW, "full"), marglik_epochs=60,
    ),
    Classification(
        "mnist_mlp", "MNIST, MLP", *MNIST, Network((784, 100, 100, KNOWN), jax.nn.relu),
        Recipe("cross_entropy", epochs=40, prior_prec=0.01, learning_rate=1e-3),
        FEW, marglik_epochs=40,
    ),
    Classification(
        "mnist_cnn", "MNIST, CNN", *MNIST,
        Network((400, KNOWN), jax.nn.relu, convolutions=True),
        Recipe("cross_entropy", epochs=20, prior_prec=0.1),
        (*FEW, "kfac_reduce"), marglik_epochs=20,
    ),
]  # fmt: skip


def linked(predictive: lk.Predictive, link: Any) -> np.ndarray:
    """Probabilities of classes; a centred probit is that without what all logits share."""
    if link == "centred_probit":
        classes = predictive.covariance.shape[-1]
        projection = jnp.eye(classes) - 1.0 / classes
        mean = predictive.mean - jnp.mean(predictive.mean, axis=-1, keepdims=True)
        predictive = lk.Predictive(mean, projection @ predictive.covariance @ projection)
        link = "probit"
    key = jax.random.key(0) if link == "mc" else None
    return np.asarray(lk.class_probabilities(predictive, link, key=key, num_samples=SAMPLES))


def scored(probabilities: np.ndarray, data: Data) -> Record:
    """All scores of probabilities at the test inputs and then at the strange ones."""
    places = np.cumsum([len(data.test.x), *(len(x) for x in data.strange.values())])[:-1]
    known, *strange = np.split(probabilities, places)
    ood = {
        name: metrics.of_strangeness(known, p)
        for name, p in zip(data.strange, strange, strict=True)
    }
    means = {key: float(np.mean([s[key] for s in ood.values()])) for key in ("auroc", "fpr95")}
    return {**metrics.of_classes(known, data.test.y), **means, "ood": ood}


def of_laplace(model: Fitted, tuned: Any, data: Data, inputs: jax.Array) -> Record:
    """Scores under every link, with the distance to samples of the same Gaussian."""
    start = time.process_time()
    predictive = jax.block_until_ready(model.predictive(inputs, tuned))
    first = linked(predictive, LINKS[0])
    seconds = time.process_time() - start
    by_link = {link: linked(predictive, link) for link in LINKS[1:]} | {LINKS[0]: first}
    known = slice(0, len(data.test.x))
    links = {
        link: {
            **{k: v for k, v in scored(by_link[link], data).items() if k != "ood"},
            "distance": metrics.total_variation(by_link[link][known], by_link["mc"][known]),
        }
        for link in LINKS
    }
    return {
        **scored(first, data), "links": links, **hyperparameters(tuned),
        "predict_seconds": 1000 * seconds / len(inputs),
    }  # fmt: skip


def run(task: Classification, seeds: Sequence[int], results: Results) -> Iterator[str]:
    """Run what is missing; gives the names of the cells as they are finished."""
    methods = ["map", "temperature", "ensemble", "marglik"]
    methods += [f"{a}/{p}" for a in task.approximations for p in APPROXIMATIONS[a].priors]
    if all((task.name, method, seed) in results for method in methods for seed in seeds):
        return
    source = task.source()
    data = [sources.images(source, seed, task.sizes) for seed in seeds]
    x, y = (jnp.stack([getattr(d.train, k) for d in data]) for k in ("x", "y"))
    start = time.process_time()
    alone = all((task.name, method, seed) in results for method in methods[:3] for seed in seeds)
    members = 1 if alone else MEMBERS
    networks = jax.block_until_ready(train_all(task.network, task.recipe, x, y, members))
    train_seconds = (time.process_time() - start) / (len(seeds) * members)
    inputs = [jnp.concatenate([d.test.x, *d.strange.values()]) for d in data]

    def network(place: int, member: int = 0) -> Any:
        return jax.tree.map(lambda leaf: leaf[place, member], networks)

    forward = jax.jit(jax.vmap(task.network, (0, None)))
    for place, seed in enumerate(seeds):
        logits = [forward(inputs[place], network(place, m)) for m in range(members)]
        certain = jax.nn.softmax(logits[0])
        averaged = jnp.mean(jax.nn.softmax(jnp.stack(logits)), axis=0)
        held_out = data[place].validation
        heat = metrics.temperature(forward(held_out.x, network(place)), held_out.y)
        for method, probabilities, factor in (
            ("map", certain, 1),
            ("temperature", jax.nn.softmax(logits[0] / heat), 1),
            ("ensemble", averaged, MEMBERS),
        ):
            if (task.name, method, seed) not in results:
                numbers = scored(np.asarray(probabilities), data[place])
                numbers["train_seconds"] = factor * train_seconds
                results.add(task.name, method, seed, numbers)
                yield f"{task.name} {method} {seed}"
    for name in task.approximations:
        approximation = APPROXIMATIONS[name]
        for place, seed in enumerate(seeds):
            model = None
            for prior in approximation.priors:
                cell = (task.name, f"{name}/{prior}", seed)
                if cell in results:
                    continue
                model = model or fitted(
                    approximation, task.network, network(place), data[place], task.recipe.loss
                )
                start = time.process_time()
                tuned = jax.block_until_ready(model.tuned(prior, data[place].validation))
                seconds = {
                    "fit_seconds": model.seconds,
                    "tune_seconds": time.process_time() - start,
                }
                numbers = of_laplace(model, tuned, data[place], inputs[place])
                results.add(*cell, numbers | seconds)
                yield " ".join(map(str, cell))
    for place, seed in enumerate(seeds):
        if (task.name, "marglik", seed) not in results:
            numbers = marglik(task, seed, data[place], inputs[place])
            results.add(task.name, "marglik", seed, numbers)
            yield f"{task.name} marglik {seed}"


def marglik(task: Classification, seed: int, data: Data, inputs: jax.Array) -> Record:
    """Trained by the evidence, one prior precision for all (Immer et al. 2021)."""
    recipe, train = task.recipe, (data.train.x, data.train.y)
    start = time.process_time()
    steps = task.marglik_epochs * (len(train[0]) // recipe.batch_size)
    found = lk.marglik_training(
        task.network, task.network.init(key_of(seed, 0)), train,
        loss_fn=recipe.loss, epochs=task.marglik_epochs, every=min(5, task.marglik_epochs),
        batch_size=recipe.batch_size,
        optimizer=optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, steps)),
    )  # fmt: skip
    seconds = time.process_time() - start
    fit = lk.data_fit(task.network, found.params, train, loss_fn=recipe.loss)
    model = Fitted(task.network, found.params, found.curvature, fit, recipe.loss, seconds)
    return of_laplace(model, found, data, inputs) | {"train_seconds": seconds}


def methods_of(task: Classification) -> list[tuple[str, str]]:
    """Names and titles of a task's methods, in the order of tables."""
    rows = [
        ("map", "MAP"),
        ("temperature", "temperature scaling"),
        ("ensemble", "ensemble of five"),
    ]
    for name in task.approximations:
        approximation = APPROXIMATIONS[name]
        rows += [
            (f"{name}/{prior}", f"{approximation.title}; {PRIORS[prior]}")
            for prior in approximation.priors
        ]
    return [*rows, ("marglik", "KFAC; trained by evidence")]
