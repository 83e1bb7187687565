"""Likelihoods: roots of the loss Hessian, sampled gradients, sketches, weights, targets, errors."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy import stats
from laplax.enums import LossFn
from support.matrices import normal
from support.oracles import block_mask, dense_empirical_fisher, dense_ggn, sizes
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import likelihood as lik
from laplax_kfac.fisher import Columns, fisher_type_of
from laplax_kfac.likelihood.named import resolve_likelihood
from laplax_kfac.likelihood.record import Likelihood
from laplax_kfac.likelihood.weighted import weighted

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
    matrix: Callable[[Any, Any], Any] | None = None  # in place of the Hessian of the reference

    def __str__(self) -> str:
        return self.name


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


# -- likelihoods of six outputs, those of a network --------------------------------------------

SIX = 2.0 * normal(6, seed=8)
NOISE = np.asarray([0.1, 2.0, 0.7])
COUNTS = np.asarray([0, 3, 1, 0, 7, 2])
LABELS = np.asarray([2, 0])
SOME = np.asarray([True, False])


def one_normal(f, y):
    return -jnp.sum(stats.norm.logpdf(y, f, jnp.sqrt(NOISE)))


def normals(f, y):
    mean, log_variance = jnp.split(f, 2, axis=-1)
    return -jnp.sum(stats.norm.logpdf(y.reshape(mean.shape), mean, jnp.exp(0.5 * log_variance)))


def information(f, _):
    """The mean Hessian of `normals`: it is quadratic in y, so two points have its mean."""
    mean, log_variance = jnp.split(f, 2, axis=-1)
    flat, unravel = ravel_pytree(f)

    def hessian(y):
        return jax.hessian(lambda v: normals(unravel(v), y))(flat)

    deviation = jnp.exp(0.5 * log_variance)
    return 0.5 * (hessian(mean + deviation) + hessian(mean - deviation))


def smoothed(f, y):
    """The second of two classes is ignored."""
    return optax.softmax_cross_entropy(f[0], optax.smooth_labels(jax.nn.one_hot(y[0], 3), 0.2))


def smoothed_binary(f, y):
    return binary(f, 0.8 * y + 0.1)


def weighted_labels(f, y):
    return jnp.sum(y[1] * optax.softmax_cross_entropy_with_integer_labels(f, y[0]))


def weighted_squares(f, y):
    return jnp.sum(y[1][:, None] * (f - y[0]) ** 2)


def gumbel(f, y):
    """Log-density of a Gumbel variable of location f: its Hessian depends on the target."""
    return (f - y) - jnp.exp(f - y)


def coupled(f, y):
    """A log-probability of two terms, in each of which three outputs meet."""
    return -jax.nn.logsumexp(f, axis=-1) - jnp.sum((f - y) ** 2, axis=-1) ** 2


def six(name, loss_fn, shape, y, reference, matrix=None):
    return Case(name, loss_fn, SIX.reshape(shape), y, reference, matrix)


OWN = Likelihood.from_log_prob("gumbel", lambda f, y: jnp.sum(gumbel(f, y)))
LIKELIHOODS = [
    six("gaussian", lik.gaussian(NOISE), (2, 3), normal(2, 3), one_normal),
    six("mean and variance", lik.heteroscedastic_gaussian(), 6, normal(3), normals, information),
    six(
        "mean and variance of three terms",
        lik.heteroscedastic_gaussian(),
        (3, 2),
        normal(3),
        normals,
        information,
    ),
    six(
        "poisson",
        lik.poisson(),
        6,
        COUNTS,
        lambda f, y: -jnp.sum(stats.poisson.logpmf(y, jnp.exp(f))),
    ),
    six(
        "smoothed classes, one ignored",
        lik.categorical(ignore_index=-1, label_smoothing=0.2),
        (2, 3),
        np.asarray([2, -1]),
        smoothed,
    ),
    six(
        "smoothed labels",
        lik.bernoulli(label_smoothing=0.2),
        6,
        COUNTS > 0,
        smoothed_binary,
    ),
    six(
        "weighted classes",
        weighted("cross_entropy"),
        (2, 3),
        (LABELS, np.asarray([0.3, 2.0])),
        weighted_labels,
    ),
    six(
        "masked pixels",
        weighted("mse"),
        (2, 3),
        (normal(2, 3), SOME),
        weighted_squares,
    ),
    six("a log-probability", OWN, 6, normal(6), lambda f, y: -jnp.sum(gumbel(f, y))),
    six(
        "a log-probability of terms",
        Likelihood.from_log_prob("coupled", coupled),
        (2, 3),
        normal(2, 3),
        lambda f, y: -jnp.sum(coupled(f, y)),
    ),
]


def columns(likelihood, fisher_type, f, y, *, key, mc_samples=1, sketches=None):
    """The vectors that are pulled back for one example."""
    chosen = Columns(likelihood, fisher_type_of(fisher_type), mc_samples, sketches)
    return chosen.vectors(key, f, y)


def num_columns(likelihood, fisher_type, f, y, mc_samples, sketches=None):
    """How many there are."""
    return Columns(likelihood, fisher_type_of(fisher_type), mc_samples, sketches).number(f, y)


def flat_columns(vectors):
    return jax.vmap(lambda v: ravel_pytree(v)[0])(vectors)


@functools.cache
def expected(case):
    """Value, gradient and Hessian of the reference loss, in the raveled output."""
    flat, unravel = ravel_pytree(case.f)

    def loss(v):
        return case.reference(unravel(v), case.y)

    def matrix(v):
        return jax.hessian(loss)(v) if case.matrix is None else case.matrix(unravel(v), case.y)

    return jax.jit(lambda v: (loss(v), jax.grad(loss)(v), matrix(v)))(flat)


@pytest.mark.parametrize("case", [*CASES, *LIKELIHOODS], ids=str)
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
    likelihood, f = resolve_likelihood("cross_entropy"), normal(*shape)
    root = jax.eval_shape(likelihood.hessian_root, f, None)
    assert root.shape == (rank, *shape)
    # No columns at all would stand for `forward_only`: a zero takes their place.
    assert num_columns(likelihood, "type2", f, None, 1) == max(rank, 1)


@pytest.mark.parametrize("fisher_type", ["type2", "mc", "empirical", "forward_only"])
def test_a_single_class_is_refused(fisher_type):
    """A softmax over one class is constant: one logit is another loss."""
    data = np.ones((2, 3)), np.zeros(2, int)
    with pytest.raises(ValueError, match=r"shape \(1,\).*binary_cross_entropy"):
        laplax_kfac.kfac(
            lambda input, params: input @ params,
            normal(3, 1),
            data,
            loss_fn="cross_entropy",
            fisher_type=fisher_type,
        )


def test_extreme_logits_stay_finite_in_float32():
    f = jnp.asarray([*EXTREME, -200.0], jnp.float32)
    root = columns(resolve_likelihood("cross_entropy"), "type2", f, jnp.asarray(0), key=KEY)
    assert root.dtype == jnp.float32
    p = jax.nn.softmax(f.astype(jnp.float64))
    expected = jnp.diag(p) - jnp.outer(p, p)
    np.testing.assert_allclose(root.T @ root, expected, **tolerance(jnp.float32))


@pytest.mark.parametrize(
    "loss_fn",
    ["mse", "cross_entropy", "binary_cross_entropy", lik.poisson()],
    ids=lambda loss_fn: getattr(loss_fn, "name", loss_fn),
)
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
    assert own.loss(normal(2), normal(2)) == own.log_prob(normal(2), normal(2)) == 0
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
def test_a_callable_that_is_not_scalar_is_refused(fisher_type: str):
    likelihood = resolve_likelihood(lambda f, y: (f - y) ** 2)
    with pytest.raises(ValueError, match=r"one number an example, found shape \(3,\); sum it"):
        columns(likelihood, fisher_type, normal(3), normal(3), key=KEY)


# -- through a network -------------------------------------------------------------------------

INPUT = normal(4, seed=9)
HIDDEN = {"b": normal(5, seed=10), "w": normal(4, 5, seed=11)}
ACTIVE = np.tanh(INPUT @ HIDDEN["w"] + HIDDEN["b"])
WEIGHT = normal(5, 6, seed=12)
NETWORK = {"hidden": HIDDEN, "out": {"b": SIX - ACTIVE @ WEIGHT, "w": WEIGHT}}  # SIX at INPUT
BLOCKS = [[f"['{name}']['b']", f"['{name}']['w']"] for name in NETWORK]
ORACLES = {"type2": dense_ggn, "empirical": dense_empirical_fisher}


def network(shape):
    def model_fn(input, params):
        hidden = jnp.tanh(input @ params["hidden"]["w"] + params["hidden"]["b"])
        return (hidden @ params["out"]["w"] + params["out"]["b"]).reshape(shape)

    return model_fn


@functools.cache
def jacobian():
    flat, unravel = ravel_pytree(NETWORK)
    return jax.jit(jax.jacrev(lambda v: network(6)(INPUT, unravel(v))))(flat)


def one_example(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)


TOKENS = next(case for case in CASES if case.name == "tokens")


@pytest.mark.parametrize("fisher_type", ["type2", "empirical"])
@pytest.mark.parametrize("case", LIKELIHOODS, ids=str)
def test_one_datapoint_gives_the_exact_blocks(case, fisher_type):
    # With several terms, too: `empirical` has the cross terms of a sum, `type2` has none to have.
    _, gradient, hessian = expected(case)
    middle = hessian if fisher_type == "type2" else jnp.outer(gradient, gradient)
    exact = jacobian().T @ middle @ jacobian() * block_mask(NETWORK, BLOCKS)
    found = laplax_kfac.kfac(
        network(case.f.shape), NETWORK, (INPUT[None], one_example(case.y)),
        loss_fn=case.loss_fn, fisher_type=fisher_type,
    ).to_dense()  # fmt: skip
    np.testing.assert_allclose(found, exact, **tolerance(jnp.float64))


def gains(input, params):
    """Tokens, scaled by what has no Kronecker form: its block is exact for all data."""
    return jnp.tanh(input) * params["gain"] + input[::-1]


GAIN = {"gain": normal(3, seed=13)}
SENTENCES = normal(4, 2, 3, seed=14), np.arange(8).reshape(4, 2) % 3


@pytest.mark.parametrize("fisher_type", ORACLES)
def test_which_cross_terms_of_tokens_are_kept(fisher_type):
    found = laplax_kfac.kfac(
        gains, GAIN, SENTENCES, loss_fn="cross_entropy", fisher_type=fisher_type
    ).to_dense()
    x, y = SENTENCES
    tokens = np.eye(2, dtype=int)
    apart = [  # the same with one token of each example at a time
        ORACLES[fisher_type](gains, GAIN, (x, (y, np.tile(one, (4, 1)))), weighted_labels)
        for one in tokens
    ]
    exact = ORACLES[fisher_type](gains, GAIN, SENTENCES, integer_labels)
    np.testing.assert_allclose(found, exact, **tolerance(jnp.float64))
    without = sum(apart)
    if fisher_type == "type2":
        np.testing.assert_allclose(found, without, **tolerance(jnp.float64))
    else:
        assert np.linalg.norm(found - without) > 0.1 * np.linalg.norm(without)


def test_cross_terms_of_draws_are_zero_on_average_only():
    # Columns of one draw touch all tokens; those of two tokens are independent.
    case, n = TOKENS, 40_000
    draws = columns(
        resolve_likelihood(case.loss_fn), "mc", case.f, case.y, key=KEY, mc_samples=n
    ) * np.sqrt(n)
    assert (np.abs(draws).max(axis=-1) > 0).all()
    products = np.einsum("nc,nd->ncd", draws[:, 0], draws[:, 1])
    assert (products.std(axis=0) > 0.05).all()
    assert (np.abs(products.mean(axis=0)) <= 5 * products.std(axis=0) / np.sqrt(n)).all()


@pytest.mark.parametrize("loss_fn", ["mse", "cross_entropy"])
def test_means_in_place_of_sums_scale_the_curvature(loss_fn):
    """A mean over the data or over terms is a sum with weights: the curvature is divided alike."""
    x, y = SENTENCES
    if loss_fn == "mse":
        y = normal(4, 2, 3, seed=15)
    whole = laplax_kfac.kfac(gains, GAIN, (x, y), loss_fn=loss_fn).to_dense()
    quarters = {"input": x, "target": y, "weight": np.full(4, 1 / 4)}
    over_data = laplax_kfac.kfac(gains, GAIN, quarters, loss_fn=loss_fn)
    over_terms = laplax_kfac.kfac(
        gains, GAIN, (x, (y, np.full((4, 2), 1 / 2))), loss_fn=weighted(loss_fn)
    )
    np.testing.assert_allclose(over_data.to_dense(), whole / 4, **tolerance(jnp.float64))
    np.testing.assert_allclose(over_terms.to_dense(), whole / 2, **tolerance(jnp.float64))

    def mean(f, y):
        return integer_labels(f, y) / 2 if loss_fn == "cross_entropy" else squares(f, y) / 2

    reference = dense_ggn(gains, GAIN, (x, y), mean)
    np.testing.assert_allclose(over_terms.to_dense(), reference, **tolerance(jnp.float64))


# -- draws -------------------------------------------------------------------------------------

SAMPLED = [
    case for case in LIKELIHOODS if case.loss_fn.sample_gradient and "labels" not in case.name
]


def second_moments(case, fisher_type, seed, keys, **options):
    """Mean over keys of H_found, its standard error, and the mean of ||H_found - H||^2."""
    likelihood = resolve_likelihood(case.loss_fn)

    @jax.jit
    def statistics(f, exact):
        def one(key):
            found = flat_columns(columns(likelihood, fisher_type, f, case.y, key=key, **options))
            return found.T @ found

        found = jax.vmap(one)(jax.random.split(jax.random.key(seed), keys))
        errors = jnp.sum((found - exact) ** 2, axis=(1, 2))
        return found.mean(axis=0), found.std(axis=0) / jnp.sqrt(keys), errors.mean()

    return statistics(case.f, expected(case)[2])


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_draws_of_likelihoods_are_right_on_average(case):
    mean, error, _ = second_moments(case, "mc", 1, 20_000)
    assert (np.abs(mean - expected(case)[2]) <= 5 * error + 1e-12).all()


def test_mc_converges_at_the_rate_of_one_over_the_root_of_samples():
    case = next(case for case in CASES if case.name == "classes")
    p = np.asarray(jax.nn.softmax(case.f))
    fourth_moment = p @ np.sum((p - np.eye(5)) ** 2, axis=1) ** 2
    variance = fourth_moment - np.sum(np.asarray(expected(case)[2]) ** 2)
    for n in (1, 16):
        _, _, squared_error = second_moments(case, "mc", n, 4000, mc_samples=n)
        np.testing.assert_allclose(squared_error, variance / n, rtol=0.1)


def test_a_sampler_of_ones_own():
    def log_prob(f, y):
        return jnp.sum(stats.norm.logpdf(y, f, 0.5))

    def draw(key, f):
        return f + 0.5 * jax.random.normal(key, f.shape)

    own, f = Likelihood.from_log_prob("own", log_prob, sample=draw), normal(2)
    (found,) = columns(own, "mc", f, None, key=KEY)
    expected = own.gradient(f, draw(jax.random.split(KEY, 1)[0], f))
    assert np.abs(expected).min() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# -- sketches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[2], TOKENS, CASES[-2], *LIKELIHOODS], ids=str)
def test_a_sketch_combines_the_columns_with_random_signs(case):
    likelihood = resolve_likelihood(case.loss_fn)

    @jax.jit
    def vectors(f):
        root = columns(likelihood, "type2", f, case.y, key=KEY)
        return flat_columns(root), flat_columns(
            columns(likelihood, "type2", f, case.y, key=KEY, sketches=2)
        )

    root, sketches = map(np.asarray, vectors(case.f))
    assert len(sketches) == 2
    signs = np.linalg.lstsq(root.T, np.sqrt(2.0) * sketches.T)[0]
    np.testing.assert_allclose(root.T @ signs, np.sqrt(2.0) * sketches.T, **tolerance(jnp.float64))
    touched = np.abs(root).max(axis=1) > 1e-6  # columns of clipped or ignored terms are zero
    np.testing.assert_allclose(np.abs(signs[touched]), 1.0, rtol=1e-6)
    assert np.ptp(signs[:, 0]) > 1


WEIGHTED = next(case for case in LIKELIHOODS if case.name == "weighted classes")


@pytest.mark.parametrize("case", [TOKENS, WEIGHTED], ids=str)
def test_sketches_are_unbiased_and_have_the_variance_of_signs(case):
    k, exact = 3, np.asarray(expected(case)[2])
    mean, error, squared_error = second_moments(case, "type2", k, 5000, sketches=k)
    assert (np.abs(mean - exact) <= 5 * error + 1e-9).all()
    # w^T G w for signs w and the columns' Gram matrix G has variance 2 (||G||^2 - sum_r G_rr^2).
    root = columns(resolve_likelihood(case.loss_fn), "type2", case.f, case.y, key=KEY)
    norms = np.sum(np.asarray(flat_columns(root)) ** 2, axis=1)
    bound = np.trace(exact) ** 2 + np.sum(exact**2)
    np.testing.assert_allclose(squared_error, (bound - 2 * norms @ norms) / k, rtol=0.1)
    assert squared_error < bound / k


def test_sketches_combine_the_columns_of_a_root_of_ones_own():
    factor = normal(4, 3)
    own = Likelihood.from_log_prob("own", lambda *_: 0.0, hessian_root=lambda *_: factor)
    found = columns(own, "type2", normal(3), None, key=KEY, sketches=2) * np.sqrt(2.0)
    signs = 2.0 * np.asarray(list(np.ndindex(2, 2, 2, 2))) - 1
    for row in found:
        assert np.isclose(signs @ factor, row).all(axis=1).sum() == 1


@pytest.mark.parametrize("case", [CASES[0], TOKENS], ids=str)
def test_no_more_sketches_than_columns_are_pulled_back(case):
    likelihood = resolve_likelihood(case.loss_fn)
    rank = num_columns(likelihood, "type2", case.f, case.y, 1)
    for sketches in (rank, rank + 5):
        found = columns(likelihood, "type2", case.f, case.y, key=KEY, sketches=sketches)
        np.testing.assert_array_equal(found, likelihood.hessian_root(case.f, case.y))
        assert num_columns(likelihood, "type2", case.f, case.y, 1, sketches) == rank
    assert num_columns(likelihood, "type2", case.f, case.y, 1, rank - 1) == rank - 1


LARGE = 100_000
ONE_TARGET, TWO_TARGETS = np.zeros(2, int), (np.zeros(2, int), np.ones(2))
LARGE_CASES: dict[str, Any] = {
    "mse": ("mse", LARGE, None),
    "gaussian": (lik.gaussian(0.5), LARGE, None),
    "heteroscedastic": (lik.heteroscedastic_gaussian(), LARGE, None),
    "poisson": (lik.poisson(), LARGE, None),
    "classes": ("cross_entropy", LARGE, None),
    "labels": ("binary_cross_entropy", LARGE, None),
    "ignored tokens": (lik.categorical(ignore_index=-1), (2, LARGE // 2), ONE_TARGET),
    "weighted tokens": (weighted("cross_entropy"), (2, LARGE // 2), TWO_TARGETS),
}


@pytest.mark.parametrize("case", LARGE_CASES)
def test_sketches_of_large_outputs_hold_no_large_arrays(case):
    loss_fn, shape, y = LARGE_CASES[case]
    likelihood, k = resolve_likelihood(loss_fn), 4

    def sketched(f, y):
        return columns(likelihood, "type2", f, y, key=KEY, sketches=k)

    largest = max(sizes(jax.make_jaxpr(sketched)(jnp.zeros(shape), y).jaxpr))
    assert k * LARGE <= largest <= 2 * k * LARGE


def tokens_fit(key, **options):
    return laplax_kfac.kfac(gains, GAIN, SENTENCES, loss_fn="cross_entropy", key=key, **options)


def test_curvature_of_sketches_is_reproducible_and_unbiased():
    @jax.jit
    def found(keys):
        return jax.vmap(lambda key: tokens_fit(key, sketches=2).to_dense())(keys)

    keys = jax.random.split(KEY, 1000)
    draws = np.asarray(found(keys))
    again = tokens_fit(keys[3], sketches=2).to_dense()
    np.testing.assert_allclose(draws[3], again, **tolerance(jnp.float64))
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert error.min() > 1e-3
    assert (np.abs(draws.mean(axis=0) - tokens_fit(KEY).to_dense()) <= 5 * error).all()


def test_sketches_are_drawn_anew_for_every_example_and_every_batch():
    # Equal examples with equal sketches would give a matrix B of rank 1.
    acc = laplax_kfac.accumulator(network(6), NETWORK, loss_fn="mse", sketches=1)
    for parts in ([2], [1, 1]):
        state: Any = acc.init()
        for size in parts:
            state = acc.update(state, (np.ones((size, 4)), np.zeros((size, 6))))
        assert jnp.linalg.matrix_rank(state.sums[-1].outputs[0, 0]) == 2


def test_the_second_pass_of_ekfac_takes_the_same_sketches():
    # One sketch of one example is exact, and so unchanged by the correction if that is the same.
    data = INPUT[None], np.zeros((1, 6))
    found, corrected = (
        laplax_kfac.kfac(
            network(6), NETWORK, data, loss_fn="mse", sketches=1, eigenvalue_correction=correction
        ).to_dense()
        for correction in (False, True)
    )
    np.testing.assert_allclose(corrected, found, **tolerance(jnp.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "mc"}, "only fisher_type='type2' pulls back; found 'mc'"),
        ({"fisher_type": "empirical"}, "found 'empirical', leave `sketches` out"),
        ({"sketches": 0}, "`sketches` must be a positive integer, found 0"),
        ({"sketches": 1.5}, "`sketches` must be a positive integer"),
    ],
    ids=str,
)
def test_sketches_that_make_no_sense_are_refused(options, message):
    options = {"sketches": 1} | options
    with pytest.raises(ValueError, match=message):
        laplax_kfac.accumulator(network(6), NETWORK, loss_fn="mse", **options)


# -- weights -----------------------------------------------------------------------------------

MASK = np.asarray([1.0, 0.0, 2.0])


@pytest.mark.parametrize("fisher_type", ["type2", "mc", "empirical"])
def test_what_is_at_terms_of_weight_zero_does_not_matter(fisher_type):
    likelihood, f, y = weighted("cross_entropy"), normal(3, 4), np.asarray([1, 3, 0])
    spoiled_f, spoiled_y = f.copy(), y.copy()
    spoiled_f[1], spoiled_y[1] = np.nan, 99

    def found(f, y):
        return columns(likelihood, fisher_type, f, (y, MASK), key=KEY)

    spoiled = found(spoiled_f, spoiled_y)
    assert not spoiled[:, 1].any()
    np.testing.assert_array_equal(spoiled, found(f, y))
    assert likelihood.loss(spoiled_f, (spoiled_y, MASK)) == likelihood.loss(f, (y, MASK)) > 0


def test_masks_may_be_integers_or_booleans_and_nested():
    f, labels = normal(3, 4), np.asarray([1, -1, 0])
    ignoring = weighted(lik.categorical(ignore_index=-1))
    expected = 2 * integer_labels(f[0], labels[0])
    for weights in (np.asarray([2, 5, 0]), np.asarray([2.0, 5.0, 0.0])):
        np.testing.assert_allclose(ignoring.loss(f, (labels, weights)), expected, rtol=1e-12)
    np.testing.assert_allclose(
        ignoring.loss(f, (labels, np.asarray([True, True, False]))), expected / 2, rtol=1e-12
    )
    root = columns(ignoring, "type2", f, (labels, np.asarray([2, 5, 0])), key=KEY)
    assert root[:, 0].any()
    assert not root[:, 1:].any()


def test_weights_are_a_prefix_of_a_pytree_of_terms():
    f = {"a": normal(2, 3), "b": normal(2, seed=1)}
    y, weights = jax.tree.map(np.zeros_like, f), {"a": np.asarray([0.5, 0.0]), "b": 3.0}
    likelihood = weighted("mse")
    expected = 0.5 * np.sum(f["a"][0] ** 2) + 3 * np.sum(f["b"] ** 2)
    np.testing.assert_allclose(likelihood.loss(f, (y, weights)), expected, rtol=1e-12)
    np.testing.assert_allclose(likelihood.loss(f, (y, 2.0)), 2 * squares(f, y), rtol=1e-12)
    assert likelihood.num_outputs(f, (y, weights)) == 0.5 * 3 + 3 * 2
    root = flat_columns(columns(likelihood, "type2", f, (y, weights), key=KEY))
    diagonal = np.repeat([1.0, 0.0, 6.0], [3, 3, 2])
    np.testing.assert_allclose(root.T @ root, np.diag(diagonal), **tolerance(jnp.float64))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(3, int), r"targets that are pairs \(target, weights\)"),
        ((np.zeros(3, int),), "targets that are pairs"),
        ((np.zeros(3, int), np.ones(4)), r"shape of the loss terms, \(3,\).*found \(4,\)"),
        ((np.zeros(3, int), np.ones((3, 4))), r"found \(3, 4\)"),
        ((np.zeros(3, int), {"w": np.ones(3)}), "must be a pytree prefix of the loss terms"),
    ],
    ids=["no pair", "one", "another length", "classes", "a dictionary"],
)
def test_weights_of_another_form_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        columns(weighted("cross_entropy"), "type2", normal(3, 4), y, key=KEY)


def test_pairs_without_a_weighted_likelihood_are_refused():
    with pytest.raises(ValueError, match=r"one array, found .*`laplax_kfac.likelihood.weighted"):
        resolve_likelihood("cross_entropy").loss(normal(3, 4), (np.zeros(3, int), np.ones(3)))


# -- constants, dtypes and errors of ready-made likelihoods ------------------------------------


def test_log_probabilities_have_their_constants():
    f, y = normal(3), normal(3, seed=1)
    density = np.sum(stats.norm.logpdf(y, f, np.sqrt(0.5)))
    for likelihood in (resolve_likelihood("mse"), lik.gaussian(0.5)):
        np.testing.assert_allclose(likelihood.log_prob(f, y), density, rtol=1e-12)
    half = weighted("mse").log_prob(f, (y, np.asarray([0.5, 0.5, 0.5])))
    np.testing.assert_allclose(half, density / 2, rtol=1e-12)
    assert resolve_likelihood(squares).log_prob(f, y) == -squares(f, y)


def test_bfloat16_outputs_of_a_log_probability_are_computed_in_float32():
    with jax.enable_x64(False):
        f, y = jnp.asarray([0.3, -0.2], jnp.bfloat16), jnp.ones(2)
        found = columns(OWN, "type2", f, y, key=KEY)
        assert found.dtype == OWN.loss(f, y).dtype == jnp.float32
        exact = columns(OWN, "type2", f.astype(jnp.float32), y, key=KEY)
        np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lik.gaussian(0.0), "`noise_variance` must be positive and finite; found 0.0"),
        (lambda: lik.gaussian(np.asarray([1.0, -1.0])), "`noise_variance` must be positive"),
        (lambda: lik.categorical(label_smoothing=1.0), r"must be in \[0, 1\), found 1.0"),
        (lambda: lik.bernoulli(label_smoothing=-0.1), r"must be in \[0, 1\), found -0.1"),
        (
            lambda: lik.heteroscedastic_gaussian().loss(normal(3), normal(1)),
            r"even size; found shape \(3,\)",
        ),
        (
            lambda: lik.heteroscedastic_gaussian().loss(normal(4), normal(3)),
            r"shape of the output, \(2,\) an example; found \(3,\)",
        ),
        (
            lambda: columns(
                lik.categorical(ignore_index=0), "type2", normal(2, 3), soft(2, 3), key=KEY
            ),
            r"`ignore_index` needs targets that are integer classes of shape \(2,\)",
        ),
        (
            lambda: lik.poisson().loss({"a": normal(2), "b": normal(2)}, normal(2)),
            "needs a model with one output array, found 2",
        ),
        (
            lambda: Likelihood.from_log_prob("own", lambda f, _: f[:2]).loss(normal(3), None),
            r"log-probability of 'own' must be one number.*found shape \(2,\)",
        ),
    ],
    ids=range(9),
)
def test_likelihoods_refuse_what_they_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- in transformations, and through laplax ----------------------------------------------------


def test_the_curvature_is_differentiable_in_the_noise_variance():
    data = INPUT[None], np.zeros((1, 6))

    @jax.jit
    @jax.value_and_grad
    def trace(noise_variance):
        likelihood = lik.gaussian(noise_variance)
        return laplax_kfac.kfac(network(6), NETWORK, data, loss_fn=likelihood).trace()

    value, gradient = trace(0.5)
    exact = laplax_kfac.kfac(network(6), NETWORK, data, loss_fn="mse").trace()
    np.testing.assert_allclose((value, gradient), (exact, -2 * exact), rtol=1e-9)


@jax.custom_vjp
def _clipped(x):
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def test_as_many_sketches_as_columns_leave_rules_that_are_not_linear_alone():
    # Then, and only then, unit vectors are pulled back.
    def model_fn(input, params):
        return _clipped(network(6)(input, params))

    def fit(**options):
        data = INPUT[None], np.asarray([2])
        return laplax_kfac.kfac(
            model_fn, NETWORK, data, loss_fn="cross_entropy", **options
        ).to_dense()

    exact = fit()
    np.testing.assert_array_equal(fit(sketches=5), exact)
    assert np.linalg.norm(fit(sketches=4) - exact) > 0.01 * np.linalg.norm(exact)


def test_laplax_takes_likelihoods_weights_and_sketches():
    data = {"input": normal(3, 4), "target": np.ones((3, 6)), "weight": np.asarray([1, 2, 0])}
    options: Any = {"loss_fn": lik.poisson(), "sketches": 2}
    posterior_fn, curv = laplax.laplace(network(6), NETWORK, data, curv_type="kfac", **options)
    expected = laplax_kfac.kfac(network(6), NETWORK, data, **options)
    np.testing.assert_array_equal(curv.to_dense(), expected.to_dense())
    assert posterior_fn({"prior_prec": 1.0}) is not None
