"""Training: all networks of a task, seeds and members of ensembles, in one compiled program."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

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


def train(
    network: Network,
    recipe: Recipe,
    key: Key[Array, ""],
    x: Float[Array, "N *shape"],
    y: Array,
    prior_prec: PyTree,
    noise_variance: Float[Array, ""],
) -> PyTree:
    """One network, from a key; ``prior_prec`` is a pytree prefix of the parameters.

    ``mse`` is the negative log-likelihood of noise of variance 1/2; other noise divides it.
    """
    count = len(x)
    factor = 1.0 if recipe.loss == "cross_entropy" else 1.0 / (2.0 * noise_variance)

    def objective(params: PyTree, indices: Array) -> Array:
        outputs = jax.vmap(lambda x: network(x, params))(x[indices])
        data = factor * jnp.mean(LOSSES[recipe.loss](outputs, y[indices]))
        broadcast = jax.tree.map(
            lambda t, part: jax.tree.map(lambda p: t * jnp.sum(p**2), part), prior_prec, params
        )
        return data + 0.5 * sum(jax.tree.leaves(broadcast)) / count

    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps(count)))

    def step(state: tuple[PyTree, PyTree], indices: Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, inner = state
        updates, inner = optimizer.update(jax.grad(objective)(params, indices), inner)
        return (optax.apply_updates(params, updates), inner), None

    def epoch(state: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], None]:
        order = jax.random.permutation(key, count)[: count // recipe.batch_size * recipe.batch_size]
        return jax.lax.scan(step, state, order.reshape(-1, recipe.batch_size))

    params = network.init(key)
    keys = jax.random.split(jax.random.fold_in(key, 1), recipe.epochs)
    return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[0][0]


@functools.partial(jax.jit, static_argnames=("network", "recipe", "members"))
def train_all(
    network: Network,
    recipe: Recipe,
    x: Float[Array, "seeds N *shape"],
    y: Array,
    members: int,
) -> PyTree:
    """Networks of all seeds, several members each: leaves (seeds, members, ...).

    Perceptrons are trained side by side, which makes products of many networks one; convolutions
    with kernels of their own would be grouped ones, which are slow: these are trained in turn.
    """
    seeds = len(x)

    def one(pair: Array) -> PyTree:
        seed, member = pair
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), member)
        noise = jnp.asarray(0.5)
        return train(network, recipe, key, x[seed], y[seed], recipe.prior_prec, noise)

    pairs = jnp.stack(jnp.meshgrid(jnp.arange(seeds), jnp.arange(members), indexing="ij"), -1)
    if network.convolutions:
        flat = jax.lax.map(one, pairs.reshape(-1, 2))
        return jax.tree.map(lambda a: a.reshape(seeds, members, *a.shape[1:]), flat)
    return jax.vmap(jax.vmap(one))(pairs)
