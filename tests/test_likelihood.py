"""Losses as likelihoods: roots of the loss Hessian, sampled gradients, targets, errors."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tolerance
from jax.flatten_util import ravel_pytree
from laplax.enums import LossFn

from laplax_kfac.likelihood import FisherType, Likelihood, columns, resolve_likelihood

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)


@dataclass(frozen=True, eq=False)
class Case:
    """One example's output and target under one loss, and the loss by other means."""

    name: str
    loss_fn: Any
    f: Any
    y: Any
    reference: Callable[[Any, Any], Any]

    def __str__(self) -> str:
        return self.name


def normal(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).normal(size=shape))


def squares(f, y):
    return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (f, y)), strict=True))


def integer_labels(f, y):
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(f, y))


def probabilities(f, y):
    return jnp.sum(optax.softmax_cross_entropy(f, y))


def binary(f, y):
    return jnp.sum(optax.sigmoid_binary_cross_entropy(f, y))


def poisson(f, y):
    return jnp.sum(jnp.exp(f) - y * f) + 0.1 * jnp.sum(f) ** 2


def soft(*shape):
    p = np.exp(normal(*shape, seed=7))
    return p / p.sum(axis=-1, keepdims=True)


EXTREME = (80.0, -80.0, 0.0, 79.0)
CASES = [
    Case("mse", "mse", normal(3), normal(3, seed=1), squares),
    Case("mse of a matrix", "mse", normal(2, 3), normal(2, 3, seed=1), squares),
    Case(
        "mse of a pytree",
        LossFn.MSE,
        {"mean": normal(3), "rest": (normal(2, 2, seed=2), normal(seed=3))},
        {"mean": normal(3, seed=4), "rest": (normal(2, 2, seed=5), normal(seed=6))},
        squares,
    ),
    Case("classes", "cross_entropy", normal(5), np.asarray(3), integer_labels),
    Case("two classes", "cross_entropy", normal(2), np.asarray(1), integer_labels),
    Case("one-hot", "cross_entropy", normal(4), np.eye(4)[2], probabilities),
    Case("soft labels", "cross_entropy", normal(4), soft(4), probabilities),
    Case(
        "tokens",
        LossFn.CROSS_ENTROPY,
        normal(3, 4),
        np.asarray([0, 3, 1]),
        integer_labels,
    ),
    Case("soft tokens", "cross_entropy", normal(3, 4), soft(3, 4), probabilities),
    Case(
        "pixels",
        "cross_entropy",
        normal(2, 2, 3),
        np.asarray([[0, 1], [2, 0]]),
        integer_labels,
    ),
    Case(
        "extreme logits",
        "cross_entropy",
        np.asarray(EXTREME),
        np.asarray(1),
        integer_labels,
    ),
    Case(
        "extreme tokens",
        "cross_entropy",
        np.asarray([EXTREME, EXTREME[::-1], (-80.0,) * 4]),
        np.asarray([0, 1, 2]),
        integer_labels,
    ),
    Case("binary", "binary_cross_entropy", normal(1), np.ones(1), binary),
    Case(
        "several binary",
        LossFn.BINARY_CROSS_ENTROPY,
        normal(3),
        np.asarray([0, 1, 1]),
        binary,
    ),
    Case(
        "extreme binary",
        "binary_cross_entropy",
        np.asarray([80.0, -80.0, 30.0]),
        np.asarray([0.0, 0.0, 1.0]),
        binary,
    ),
    Case("callable", poisson, normal(3), normal(3, seed=1), poisson),
    Case(
        "callable of a pytree",
        squares,
        {"a": normal(2), "b": normal(seed=3)},
        {"a": normal(2, seed=1), "b": normal(seed=4)},
        squares,
    ),
]
NAMED = [case for case in CASES if not callable(case.loss_fn)]


def flat_columns(vectors):
    return jax.vmap(lambda v: ravel_pytree(v)[0])(vectors)


@functools.cache
def expected(case):
    """Value, gradient and Hessian of the reference loss, in the raveled output."""
    flat, unravel = ravel_pytree(case.f)

    def loss(v):
        return case.reference(unravel(v), case.y)

    return jax.jit(lambda v: (loss(v), jax.grad(loss)(v), jax.hessian(loss)(v)))(flat)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_columns_equal_the_reference(case):
    likelihood = resolve_likelihood(case.loss_fn)

    @jax.jit
    def found(f):
        empirical = columns(likelihood, "empirical", f, case.y, key=KEY)
        type2 = columns(likelihood, "type2", f, case.y, key=KEY)
        return likelihood.loss(f, case.y), empirical, type2

    loss, empirical, type2 = found(case.f)
    for vectors in (empirical, type2):
        assert jax.tree.all(jax.tree.map(lambda v, f: v.shape[1:] == f.shape, vectors, case.f))
    (gradient,), root = flat_columns(empirical), flat_columns(type2)
    for got, want in zip((loss, gradient, root.T @ root), expected(case), strict=True):
        np.testing.assert_allclose(got, want, **tolerance(jnp.float64))


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((5,), 4),
        ((2,), 1),
        ((3, 4), 9),
        ((1,), 0),
    ],
)
def test_cross_entropy_pulls_back_one_column_less_than_classes(shape, rank):
    root = jax.eval_shape(resolve_likelihood("cross_entropy").hessian_root, normal(*shape), None)
    assert root.shape == (rank, *shape)


def test_extreme_logits_stay_finite_in_float32():
    f = jnp.asarray([*EXTREME, -200.0], jnp.float32)
    root = columns(resolve_likelihood("cross_entropy"), "type2", f, jnp.asarray(0), key=KEY)
    assert root.dtype == jnp.float32
    p = jax.nn.softmax(f.astype(jnp.float64))
    expected = jnp.diag(p) - jnp.outer(p, p)
    np.testing.assert_allclose(root.T @ root, expected, **tolerance(jnp.float32))


@pytest.mark.parametrize("loss_fn", ["mse", "cross_entropy", "binary_cross_entropy"])
def test_bfloat16_outputs_are_computed_in_float32(loss_fn):
    f = jnp.asarray(normal(4), jnp.bfloat16)
    exact = f.astype(jnp.float32)
    y = jnp.asarray([1, 0, 0, 0], jnp.float32)
    likelihood = resolve_likelihood(loss_fn)
    root = columns(likelihood, "type2", f, y, key=KEY)
    assert root.dtype == jnp.float32
    expected = columns(likelihood, "type2", exact, y, key=KEY)
    np.testing.assert_array_equal(root, expected)
    assert likelihood.loss(f, y).dtype == jnp.float32


def test_negative_curvature_of_a_callable_is_clipped():
    eigenvalues = np.asarray([3.0, 0.5, -1.0, -2.0])
    basis = np.linalg.qr(normal(4, 4))[0]

    def saddle(f, y):
        return 0.5 * (f - y) @ (basis * eigenvalues) @ basis.T @ (f - y)

    root = columns(resolve_likelihood(saddle), "type2", normal(4), jnp.zeros(4), key=KEY)
    expected = (basis * np.clip(eigenvalues, 0.0, None)) @ basis.T
    np.testing.assert_allclose(root.T @ root, expected, **tolerance(jnp.float64))


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_sampled_gradients_have_mean_zero_and_the_hessian_as_covariance(case):
    n, likelihood = 100_000, resolve_likelihood(case.loss_fn)

    @jax.jit
    def moments(f):
        draws = columns(likelihood, "mc", f, case.y, key=jax.random.key(1), mc_samples=n)
        g = jnp.sqrt(n) * flat_columns(draws)  # `columns` divides by sqrt(mc_samples)
        products = g[:, :, None] * g[:, None, :]
        return [(x.mean(axis=0), x.std(axis=0) / jnp.sqrt(n)) for x in (g, products)]

    (mean, mean_error), (covariance, covariance_error) = moments(case.f)
    assert (np.abs(mean) <= 5 * mean_error + 1e-12).all()
    assert (np.abs(covariance - expected(case)[2]) <= 5 * covariance_error + 1e-12).all()


def test_a_draw_is_the_gradient_at_a_possible_target():
    f = normal(3)
    draws = columns(resolve_likelihood("cross_entropy"), "mc", f, None, key=KEY, mc_samples=200)
    drawn = jax.nn.softmax(f) - draws * jnp.sqrt(200.0)
    rounded = np.round(np.asarray(drawn))
    np.testing.assert_allclose(drawn, rounded, atol=1e-12)
    assert {tuple(row) for row in rounded} == {tuple(row) for row in np.eye(3)}


@pytest.mark.parametrize(
    ("f", "labels"), [((4,), 2), ((3, 4), [3, 0, 2]), ((2, 2, 3), [[0, 1], [2, 2]])]
)
@pytest.mark.parametrize("dtype", [float, int, bool])
def test_integer_and_one_hot_targets_agree(f, labels, dtype):
    f, labels = normal(*f), jnp.asarray(labels)
    one_hot = jax.nn.one_hot(labels, f.shape[-1]).astype(dtype)
    likelihood = resolve_likelihood("cross_entropy")
    assert likelihood.loss(f, labels) == likelihood.loss(f, one_hot)
    np.testing.assert_array_equal(likelihood.gradient(f, labels), likelihood.gradient(f, one_hot))


def test_targets_may_have_extra_axes_of_length_one():
    f = normal(3, 4)
    labels = jnp.asarray([[3], [0], [2]])
    cross_entropy, mse = map(resolve_likelihood, ("cross_entropy", "mse"))
    assert cross_entropy.loss(f, labels) == cross_entropy.loss(f, labels[:, 0])
    assert mse.loss(normal(1), jnp.asarray(2.0)) == mse.loss(normal(), jnp.asarray([2.0]))


@pytest.mark.parametrize("name", ["mse", "MSE", LossFn.MSE])
def test_names_and_laplax_members_resolve_alike(name):
    likelihood = resolve_likelihood(name)
    assert likelihood is resolve_likelihood("mse")
    assert resolve_likelihood(likelihood) is likelihood


def test_a_likelihood_of_ones_own_is_used_as_it_is():
    own = Likelihood("own", squares, lambda f, _: 3.0 * jnp.eye(f.size))
    assert resolve_likelihood(own) is own
    root = columns(resolve_likelihood(own), "type2", normal(2), None, key=KEY)
    np.testing.assert_array_equal(root, 3.0 * np.eye(2))


@pytest.mark.parametrize("name", ["huber", "", LossFn.NONE])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"expected one of \['binary_cross_entropy', 'cross_ent"):
        resolve_likelihood(name)


@pytest.mark.parametrize("value", [None, 3, ("mse",)])
def test_what_is_no_loss_is_refused(value):
    with pytest.raises(TypeError, match=f"must be a laplax LossFn.*got {type(value).__name__}"):
        resolve_likelihood(value)


@pytest.mark.parametrize(
    "target",
    [np.zeros(3, int), np.asarray(1.5), np.zeros(3), np.zeros((4, 4)), np.zeros((2, 2), int)],
    ids=["too many classes", "float class", "wrong length", "too many axes", "integer matrix"],
)
def test_wrong_targets_of_cross_entropy_name_the_right_ones(target):
    likelihood = resolve_likelihood("cross_entropy")
    expected = r"integer classes of shape \(\) or probabilities of shape \(4,\)"
    with pytest.raises(ValueError, match=expected):
        likelihood.loss(normal(4), target)


@pytest.mark.parametrize("name", ["mse", "binary_cross_entropy"])
def test_targets_of_another_size_are_refused(name):
    with pytest.raises((TypeError, ValueError), match=r"\(3,\)"):
        resolve_likelihood(name).loss(normal(2), jnp.zeros(3))


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_several_outputs_need_a_callable(name):
    f = {"a": normal(2), "b": normal(2)}
    with pytest.raises(ValueError, match=f"'{name}'` needs a model with one output array, found 2"):
        resolve_likelihood(name).hessian_root(f, None)


def test_sampling_from_a_callable_is_refused():
    likelihood = resolve_likelihood(poisson)
    with pytest.raises(ValueError, match=r"`loss_fn` \(the callable poisson\) defines none"):
        columns(likelihood, "mc", normal(3), normal(3), key=KEY)


@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
def test_a_callable_that_is_not_scalar_is_refused(fisher_type: FisherType):
    likelihood = resolve_likelihood(lambda f, y: (f - y) ** 2)
    with pytest.raises(ValueError, match=r"one number an example, found shape \(3,\); sum it"):
        columns(likelihood, fisher_type, normal(3), normal(3), key=KEY)
