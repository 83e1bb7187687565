"""Training: all networks of a task, seeds and members of ensembles, side by side."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from study.networks import Network

LOSSES = {
    "cross_entropy": lambda f, y: optax.softmax_cross_entropy_with_integer_labels(f, y),
    "mse": lambda f, y: jnp.sum((f - y) ** 2, axis=-1),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam on minus the log joint density, over the number of data."""

    loss: str
    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    prior_prec: float = 1.0

    def steps(self, count: int) -> int:
        return self.epochs * (count // self.batch_size)


State = tuple[PyTree, PyTree]
"""Parameters, and the state of the optimizer."""


def stepper(
    network: Network,
    recipe: Recipe,
    x: Float[Array, "N *shape"],
    y: Array,
    prior_prec: PyTree,
    noise_variance: Float[Array, ""],
) -> tuple[Callable[[PyTree], State], Callable[[State, Array], State]]:
    """The state at the start, and a step on a batch; ``prior_prec`` is a prefix of the parameters.

    ``mse`` is the negative log-likelihood of noise of variance 1/2; other noise divides it.
    """
    count = len(x)
    factor = 1.0 if recipe.loss == "cross_entropy" else 1.0 / (2.0 * noise_variance)

    def objective(params: PyTree, indices: Array) -> Array:
        outputs = jax.vmap(network, (0, None))(x[indices], params)
        data = factor * jnp.mean(LOSSES[recipe.loss](outputs, y[indices]))
        prior = jax.tree.map(
            lambda t, part: jax.tree.map(lambda p: t * jnp.sum(p**2), part), prior_prec, params
        )
        return data + 0.5 * sum(jax.tree.leaves(prior)) / count

    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps(count)))

    def step(state: State, indices: Array) -> State:
        params, inner = state
        updates, inner = optimizer.update(jax.grad(objective)(params, indices), inner)
        return optax.apply_updates(params, updates), inner

    return lambda params: (params, optimizer.init(params)), step


def batches(recipe: Recipe, key: Key[Array, ""], count: int) -> Int[Array, "steps batch"]:
    """The examples of every step, in an order of their own in every epoch."""
    per_epoch = count // recipe.batch_size * recipe.batch_size
    keys = jax.random.split(jax.random.fold_in(key, 1), recipe.epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, count)[:per_epoch])(keys)
    return orders.reshape(-1, recipe.batch_size)


def train(
    network: Network,
    recipe: Recipe,
    key: Key[Array, ""],
    x: Float[Array, "N *shape"],
    y: Array,
    prior_prec: PyTree,
    noise_variance: Float[Array, ""],
) -> PyTree:
    """One network, from a key; see `stepper`."""
    start, step = stepper(network, recipe, x, y, prior_prec, noise_variance)
    indices = batches(recipe, key, len(x))
    state = start(network.init(key))
    return jax.lax.scan(lambda state, at: (step(state, at), None), state, indices)[0][0]


def key_of(seed: Any, member: Any) -> Key[Array, ""]:
    """The key of a network; member 0 is the network of all methods but ensembles."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), member)


def train_all(
    network: Network,
    recipe: Recipe,
    x: Float[Array, "seeds N *shape"],
    y: Array,
    members: int,
) -> PyTree:
    """Networks of all seeds, several members each: leaves (seeds, members, ...)."""
    train = _in_turn if network.convolutions else _side_by_side
    return train(network, recipe, x, y, members)


@functools.partial(jax.jit, static_argnames=("network", "recipe", "members"))
def _side_by_side(network: Network, recipe: Recipe, x: Array, y: Array, members: int) -> PyTree:
    """In one program: the products of many networks are one."""

    def one(seed: Array, member: Array) -> PyTree:
        noise = jnp.asarray(0.5)
        return train(
            network, recipe, key_of(seed, member), x[seed], y[seed], recipe.prior_prec, noise
        )

    over_members = jax.vmap(one, (None, 0))
    return jax.vmap(over_members, (0, None))(jnp.arange(len(x)), jnp.arange(members))


def _in_turn(network: Network, recipe: Recipe, x: Array, y: Array, members: int) -> PyTree:
    """A step a program: convolutions of many kernels are slow, and so are those in loops."""

    @jax.jit
    def step(state: State, indices: Array, x: Array, y: Array) -> State:
        return stepper(network, recipe, x, y, recipe.prior_prec, jnp.asarray(0.5))[1](
            state, indices
        )

    def one(seed: int, member: int) -> PyTree:
        key = key_of(seed, member)
        start, _ = stepper(network, recipe, x[seed], y[seed], 1.0, jnp.asarray(0.5))
        state = start(network.init(key))
        for indices in np.asarray(batches(recipe, key, x.shape[1])):
            state = step(state, indices, x[seed], y[seed])
        return state[0]

    networks = [[one(seed, member) for member in range(members)] for seed in range(len(x))]
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *row) for row in networks]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
