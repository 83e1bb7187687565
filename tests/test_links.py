"""Class probabilities against integrals, against laplax's own functions, and in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laplax.eval import predictives
from support.matrices import normal, positive
from support.tolerances import tolerance

from laplax_kfac.links import class_probabilities
from laplax_kfac.predictive.gaussians import Marginals, Predictive

pytestmark = pytest.mark.usefixtures("x64")

CLOSE = tolerance(jnp.float64)
LINKS = ["probit", "mean_field_0", "mean_field_1", "mean_field_2", "laplace_bridge"]
LINKS += ["laplace_bridge_norm", "mc"]


def logits(count=4, classes=5, scale=1.0, seed=0):
    return Predictive(
        jnp.asarray(normal(count, classes, seed=seed)),
        scale * jnp.asarray(positive(count, classes, seed=seed + 1)),
    )


@functools.partial(jax.jit, static_argnums=1, static_argnames="num_classes")
def probabilities(predictive, link, num_classes=None):
    return class_probabilities(
        predictive, link, num_classes=num_classes, key=jax.random.key(0), num_samples=4000
    )


def integral(predictive):
    """The mean of the softmax, by numpy's own samples."""
    rng = np.random.default_rng(0)
    averages = []
    for mean, covariance in zip(predictive.mean, predictive.covariance, strict=True):
        drawn = np.exp(rng.multivariate_normal(mean, covariance, size=40_000))
        averages.append((drawn / drawn.sum(axis=1, keepdims=True)).mean(axis=0))
    return np.asarray(averages)


@pytest.mark.parametrize("link", LINKS)
def test_probabilities_are_positive_and_sum_to_one(link):
    found = probabilities(logits(), link)
    assert found.shape == (4, 5)
    assert (found > 0).all()
    np.testing.assert_allclose(found.sum(axis=1), np.ones(4), **CLOSE)


def test_every_link_comes_as_close_to_the_integral_as_is_known_of_it():
    expected = integral(logits(scale=0.2))
    distance = {
        link: np.abs(probabilities(logits(scale=0.2), link) - expected).sum(axis=1).mean() / 2
        for link in LINKS
    }
    assert distance["mc"] < 0.02  # two standard errors of 4,000 samples
    assert max(distance["mean_field_2"], distance["probit"]) < 0.1
    assert distance["laplace_bridge"] < 0.35


@pytest.mark.parametrize("link", ["probit", "mean_field_1", "mean_field_2", "mc"])
def test_logits_without_variance_have_their_softmax(link):
    certain = logits(scale=0.0)
    np.testing.assert_allclose(probabilities(certain, link), jax.nn.softmax(certain.mean), **CLOSE)


@pytest.mark.parametrize("link", ["mean_field_2", "laplace_bridge", "laplace_bridge_norm", "mc"])
def test_what_all_logits_share_does_not_count(link):
    plain = logits()
    shifted = Predictive(plain.mean + 3.0, plain.covariance + 7.0)  # 7 is a shared variance
    # The square root of another matrix moves the samples: those agree up to their error.
    close = {"atol": 0.03} if link == "mc" else CLOSE
    np.testing.assert_allclose(probabilities(shifted, link), probabilities(plain, link), **close)


@pytest.mark.parametrize(
    ("link", "reference"),
    [
        ("mean_field_0", lambda m, s: predictives.mean_field_0_predictive(m, jnp.diag(s))),
        ("mean_field_1", lambda m, s: predictives.mean_field_1_predictive(m, jnp.diag(s))),
        ("mean_field_2", predictives.mean_field_2_predictive),
    ],
)
def test_mean_fields_are_those_of_laplax_scaled_to_sum_to_one(link, reference):
    pairs = zip(logits().mean, logits().covariance, strict=True)
    theirs = np.stack([reference(m, s) for m, s in pairs])
    found = probabilities(logits(), link)
    np.testing.assert_allclose(found, theirs / theirs.sum(axis=1, keepdims=True), **CLOSE)


def test_the_bridge_inverts_the_laplace_approximation_of_a_dirichlet():
    alpha = np.asarray([0.7, 2.0, 5.0, 11.0])
    classes, logs, inverse = len(alpha), np.log(alpha), 1 / alpha
    shared = (inverse[:, None] + inverse - inverse.mean()) / classes  # MacKay 1998
    gaussian = Predictive(
        jnp.asarray(logs - logs.mean())[None], jnp.asarray(np.diag(inverse) - shared)[None]
    )
    expected = alpha / alpha.sum()
    np.testing.assert_allclose(probabilities(gaussian, "laplace_bridge")[0], expected, **CLOSE)


def test_the_normalised_bridge_is_that_of_laplace_torch():
    # Its code, in NumPy, for logits that sum to zero: its correction for others is another one.
    mean = normal(4, 5, seed=0)
    mean -= mean.mean(axis=1, keepdims=True)
    project = np.eye(5) - 1 / 5
    covariance = project @ positive(4, 5, seed=1) @ project
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    scale = variance.mean(axis=1, keepdims=True) / np.sqrt(5 / 2)
    m, v = mean / np.sqrt(scale), variance / scale
    alpha = (1 - 2 / 5 + np.exp(m) / 5**2 * np.exp(-m).sum(axis=1, keepdims=True)) / v
    found = probabilities(
        Predictive(jnp.asarray(mean), jnp.asarray(covariance)), "laplace_bridge_norm"
    )
    np.testing.assert_allclose(found, alpha / alpha.sum(axis=1, keepdims=True), **CLOSE)


def test_laplax_cannot_build_its_bridge():
    with pytest.raises(IndexError):
        predictives.laplace_bridge(jnp.zeros(3), jnp.ones(3), use_correction=True)


# -- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["probit", "mean_field_1", "mean_field_2"])
def test_one_logit_is_the_probit_of_a_sigmoid(link):
    binary = logits(6, 1)
    expected = jax.nn.sigmoid(binary.mean / np.sqrt(1 + np.pi / 8 * binary.variance))
    np.testing.assert_allclose(probabilities(binary, link), expected, **CLOSE)


def test_samples_of_one_logit_average_the_sigmoid():
    binary = logits(2, 1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    values = binary.mean + np.sqrt(binary.variance) * nodes
    expected = (np.asarray(jax.nn.sigmoid(values)) * weights).sum(axis=1) / weights.sum()
    np.testing.assert_allclose(probabilities(binary, "mc")[:, 0], expected, atol=0.03)


@pytest.mark.parametrize("link", LINKS)
def test_several_softmaxes_are_worked_on_one_by_one(link):
    tokens = logits(2, 6)
    found = probabilities(tokens, link, num_classes=3)
    assert found.shape == (2, 2, 3)
    for term in range(2):
        part = slice(3 * term, 3 * term + 3)
        alone = Predictive(tokens.mean[:, part], tokens.covariance[:, part, part])
        np.testing.assert_allclose(found[:, term], probabilities(alone, link), **CLOSE)


@pytest.mark.parametrize("link", LINKS)
def test_the_softmax_is_over_the_last_axis_of_the_output(link):
    flat = logits(2, 6)
    tokens = Predictive(flat.mean.reshape(2, 2, 3), flat.covariance)
    expected = probabilities(flat, link, num_classes=3)
    np.testing.assert_array_equal(probabilities(tokens, link), expected)


def test_a_scalar_output_is_one_logit():
    column = logits(2, 1)
    scalar = Predictive(column.mean[:, 0], column.covariance)
    found = probabilities(scalar, "probit")
    np.testing.assert_array_equal(found, probabilities(column, "probit")[:, 0])


@pytest.mark.parametrize("link", ["probit", "mean_field_1"])
def test_variances_alone_are_enough_for_some(link):
    marginals = Marginals(logits().mean, logits().variance)
    expected = probabilities(logits(), link)
    np.testing.assert_allclose(probabilities(marginals, link), expected, **CLOSE)


@pytest.mark.parametrize("link", ["mc", "mean_field_2"])
def test_links_with_correlations_refuse_variances(link):
    marginals = Marginals(logits().mean, logits().variance)
    with pytest.raises(ValueError, match="needs the correlations between logits"):
        class_probabilities(marginals, link)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"link": "softmax"}, r"`link` must be one of 'mc', 'probit'"),
        ({"link": "mc"}, "`link='mc'` draws samples: pass `key`"),
        ({"num_classes": 3}, "`num_classes` is 3, which does not divide the 5 outputs"),
        ({"num_classes": 0}, "`num_classes` must be a positive integer, found 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_probabilities(logits(), **arguments)
