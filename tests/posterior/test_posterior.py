"""Posteriors against dense linear algebra: covariance, scale, determinant, samples, gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import multivariate_normal
from support.machines import tune_machine
from support.matrices import LAYERS, PARAMS, SPACE, dense_matrix, matrix, normal, tree
from support.tolerances import tolerance

from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.parsing.layer import FROZEN
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.posterior.prior import Hyperparameters

pytestmark = pytest.mark.usefixtures("x64")


@dataclass(frozen=True)
class Prior:
    """Arguments of a posterior; its precision is (sigma_squared C + prior_prec I) / scaling."""

    prior_prec: float
    sigma_squared: float = 1.0
    loss_scaling_factor: float = 1.0

    def __str__(self) -> str:
        return f"{self.prior_prec:g},{self.sigma_squared:g},{self.loss_scaling_factor:g}"

    def posterior(self) -> Posterior:
        return make_posterior(
            matrix(),
            self.prior_prec,
            sigma_squared=self.sigma_squared,
            loss_scaling_factor=self.loss_scaling_factor,
        )

    def dense_precision(self) -> np.ndarray:
        dense = self.sigma_squared * dense_matrix() + self.prior_prec * np.eye(SPACE.size)
        return dense / self.loss_scaling_factor


PRIORS = [Prior(1.0), Prior(1e-3), Prior(50.0, 0.3, 4.0)]


def flat(pytree) -> Any:
    return np.asarray(ravel_pytree(pytree)[0])


def as_matrix(mv: Callable[[Any], Any]) -> np.ndarray:
    """The matrix of a linear function of pytrees like the parameters."""
    rows = jax.jit(jax.vmap(lambda v: ravel_pytree(mv(tree(v)))[0]))(np.eye(SPACE.size))
    return np.asarray(rows).T


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_covariance_and_scale_are_inverse_and_root_of_the_precision(prior):
    posterior = prior.posterior()
    covariance = np.linalg.inv(prior.dense_precision())
    scale = as_matrix(posterior.scale_mv)
    for found in (as_matrix(posterior.covariance_mv), scale @ scale.T):
        np.testing.assert_allclose(found, covariance, **tolerance(jnp.float64))
    diagonal = flat(posterior.covariance_diagonal())
    np.testing.assert_allclose(diagonal, np.diag(covariance), **tolerance(jnp.float64))
    deviation = flat(posterior.standard_deviation())
    np.testing.assert_allclose(deviation**2, np.diag(covariance), **tolerance(jnp.float64))


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_log_determinant_is_that_of_the_dense_precision(prior):
    sign, expected = np.linalg.slogdet(prior.dense_precision())
    assert sign == 1
    found = prior.posterior().log_determinant()
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_gradients_of_the_log_determinant_have_their_closed_form(prior):
    # d logdet(Q) = tr(Q^-1 dQ) with Q = (s C + t I) / f.
    def logdet(prior_prec, sigma_squared, loss_scaling_factor):
        return make_posterior(
            matrix(),
            prior_prec,
            sigma_squared=sigma_squared,
            loss_scaling_factor=loss_scaling_factor,
        ).log_determinant()

    arguments = prior.prior_prec, prior.sigma_squared, prior.loss_scaling_factor
    found = jax.jit(jax.grad(logdet, argnums=(0, 1, 2)))(*arguments)
    covariance = np.linalg.inv(prior.dense_precision())
    expected = (
        np.trace(covariance) / prior.loss_scaling_factor,
        np.trace(covariance @ dense_matrix()) / prior.loss_scaling_factor,
        -SPACE.size / prior.loss_scaling_factor,
    )
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_curvature_methods_add_the_prior():
    curv = Curvature(matrix().blocks, matrix().layers, matrix().space)
    v = tree(normal(SPACE.size))
    covariance = np.linalg.inv(Prior(0.7).dense_precision())
    product = flat(curv.inverse_mv(v, prior_prec=0.7))
    np.testing.assert_allclose(product, covariance @ flat(v), **tolerance(jnp.float64))
    expected = np.linalg.slogdet(Prior(0.7).dense_precision())[1]
    np.testing.assert_allclose(curv.logdet(prior_prec=0.7), expected, **tolerance(jnp.float64))
    key = jax.random.key(0)
    found = jax.jit(lambda: curv.sample(key, 5, v, prior_prec=0.7))()
    expected = jax.jit(lambda: Prior(0.7).posterior().sample(key, 5, v))()
    np.testing.assert_array_equal(flat(found), flat(expected))


# -- samples -----------------------------------------------------------------------------------


def test_samples_have_the_mean_and_the_covariance_of_the_posterior():
    n, prior, mean = 100_000, Prior(0.5), tree(normal(SPACE.size))  # SPACE has every kind of block

    @jax.jit
    def moments(key):
        samples = prior.posterior().sample(key, n, mean)
        offsets = jax.vmap(lambda s: ravel_pytree(s)[0])(samples) - ravel_pytree(mean)[0]
        return offsets.mean(axis=0), offsets.T @ offsets / n

    found_mean, found = moments(jax.random.key(0))
    covariance = np.linalg.inv(prior.dense_precision())
    variances = np.diag(covariance)
    # Six standard errors: var(x_i x_j) = C_ii C_jj + C_ij^2 for a Gaussian of mean zero.
    assert (np.abs(found_mean) < 6 * np.sqrt(variances / n)).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert (np.abs(found - covariance) < 6 * error).all()


def test_a_sample_depends_on_the_key_and_its_number_alone():
    posterior, mean = Prior(1.0).posterior(), tree(normal(SPACE.size))
    draw = jax.jit(posterior.sample, static_argnums=1)
    key, other = jax.random.split(jax.random.key(0))
    few, many = draw(key, 2, mean), draw(key, 5, mean)
    first = flat(jax.tree.map(lambda x: x[:2], many))
    np.testing.assert_allclose(first, flat(few), **tolerance(jnp.float64))
    vectors = np.concatenate(
        [jax.vmap(lambda s: ravel_pytree(s)[0])(s) for s in (many, draw(other, 5, mean))]
    )
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    assert distances[~np.eye(10, dtype=bool)].min() > 0.1


@pytest.mark.parametrize(("impl", "together"), [("threefry2x32", 2), ("unsafe_rbg", 1)])
def test_samples_do_not_depend_on_how_many_are_drawn_together(impl, together, monkeypatch):
    precision, key = Prior(1.0).posterior(), jax.random.key(0, impl=impl)
    mean = tree(normal(SPACE.size))
    whole = jax.jit(lambda: precision.sample(key, 5, mean))()
    tune_machine(monkeypatch, samples_together=together * SPACE.size)
    parts = jax.jit(lambda: precision.sample(key, 5, mean))()
    np.testing.assert_allclose(flat(parts), flat(whole), **tolerance(jnp.float64))
    last = jax.jit(lambda start: precision.sample(key, 2, mean, start=start))(3)
    expected = flat(jax.tree.map(lambda x: x[3:], whole))
    np.testing.assert_allclose(flat(last), expected, **tolerance(jnp.float64))


def test_frozen_parameters_are_not_drawn():
    layers = tuple(replace(ly, pattern=FROZEN) if ly.name == "joint" else ly for ly in LAYERS)
    frozen = make_posterior(replace(matrix(), layers=layers), 1.0)
    mean = tree(normal(SPACE.size))
    samples = jax.jit(lambda: frozen.sample(jax.random.key(0), 3, mean))()
    for drawn, fixed in zip(*map(jax.tree.leaves, (samples["joint"], mean["joint"])), strict=True):
        np.testing.assert_array_equal(drawn, np.stack([fixed] * 3))
    assert np.abs(samples["vector"] - mean["vector"]).min() > 0
    assert flat(frozen.standard_deviation()["joint"]).max() == 0


def test_numbers_of_samples_must_be_positive():
    with pytest.raises(ValueError, match="`num_samples` must be a positive integer, found 0"):
        Prior(1.0).posterior().sample(jax.random.key(0), 0, tree(normal(SPACE.size)))


def test_samples_keep_dtypes_and_integer_leaves():
    params = jax.tree.map(jnp.asarray, PARAMS)
    params["step"] = jnp.asarray(7, jnp.int32)
    params["vector"] = jnp.ones(5, jnp.bfloat16)
    params["mixed"] = jnp.ones(11, jnp.float32)
    draw = jax.jit(Prior(1.0).posterior().sample, static_argnums=1)
    samples = draw(jax.random.key(0), 4, params)
    for sample, mean in zip(*map(jax.tree.leaves, (samples, params)), strict=True):
        assert sample.dtype == mean.dtype
        assert sample.shape == (4, *mean.shape)
    np.testing.assert_array_equal(samples["step"], [7, 7, 7, 7])
    assert np.std(samples["vector"].astype(jnp.float32)) > 0.1


# -- transformations and errors ----------------------------------------------------------------


def test_everything_works_under_jit_and_vmap_over_the_prior():
    v, key = tree(normal(SPACE.size)), jax.random.key(0)

    def everything(prior_prec):
        posterior = make_posterior(matrix(), prior_prec)
        trees = (
            posterior.covariance_mv(v),
            posterior.scale_mv(v),
            posterior.covariance_diagonal(),
            posterior.sample(key, 1, jax.tree.map(jnp.zeros_like, v)),
        )
        return [ravel_pytree(t)[0] for t in trees], posterior.log_determinant()

    priors = np.asarray([0.1, 1.0, 20.0])
    (products, scaled, diagonals, samples), determinants = jax.jit(jax.vmap(everything))(priors)
    lengths = []
    for k, prior_prec in enumerate(priors):
        precision = Prior(prior_prec).dense_precision()
        covariance = np.linalg.inv(precision)
        for found, expected in (
            (products[k], covariance @ flat(v)),
            (diagonals[k], np.diag(covariance)),
            (determinants[k], np.linalg.slogdet(precision)[1]),
            (scaled[k] @ precision @ scaled[k], flat(v) @ flat(v)),
        ):
            np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))
        lengths.append(samples[k] @ precision @ samples[k])
    # One key means the same noise z for all priors, and z^T z does not depend on the prior.
    np.testing.assert_allclose(lengths, lengths[0], **tolerance(jnp.float64))


def test_posteriors_are_pytrees():
    leaves, treedef = jax.tree.flatten(Prior(1.0).posterior())
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    doubled = jax.tree.unflatten(treedef, leaves)
    assert isinstance(doubled, Posterior)
    assert doubled.precision.layers == matrix().layers


@pytest.mark.parametrize("prior_prec", [np.ones(3), jnp.ones((1, 1)), np.ones(1)])
def test_a_prior_of_another_shape_is_refused(prior_prec):
    shape = str(np.shape(prior_prec)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"`prior_prec` has shape {shape}, but the curvature has"):
        make_posterior(matrix(), prior_prec)


@pytest.mark.parametrize("prior_prec", [0.0, -1.0, float("nan"), jnp.asarray(-2.0), np.float32(0)])
def test_a_prior_that_is_not_positive_is_refused(prior_prec):
    with pytest.raises(ValueError, match="`prior_prec` must be positive and finite, or the"):
        make_posterior(matrix(), prior_prec)


@pytest.mark.parametrize("method", ["covariance_mv", "scale_mv"])
def test_vectors_of_another_structure_are_refused(method):
    wrong = replace_leaf(tree(normal(SPACE.size)))
    with pytest.raises(ValueError, match="`v` must be a pytree with the structure and shapes"):
        getattr(Prior(1.0).posterior(), method)(wrong)


def test_means_of_another_structure_are_refused():
    wrong = replace_leaf(tree(normal(SPACE.size)))
    with pytest.raises(ValueError, match="`params` must be a pytree with the structure and shapes"):
        Prior(1.0).posterior().sample(jax.random.key(0), 1, wrong)


def replace_leaf(pytree):
    return pytree | {"vector": np.zeros(4)}


# -- mean, noise, and what was tuned -------------------------------------------------------------


@dataclass(frozen=True)
class Chosen(Hyperparameters):
    prior_prec: Any
    noise_variance: Any = None


def test_log_prob_is_that_of_the_dense_gaussian():
    posterior = make_posterior(matrix(), 2.0, params=PARAMS)
    covariance = np.linalg.inv(dense_matrix() + 2.0 * np.eye(SPACE.size))
    point = jax.tree.map(lambda x: x + 0.1, PARAMS)
    expected = multivariate_normal.logpdf(flat(point), flat(PARAMS), covariance)
    for found in (
        posterior.log_prob(point),
        jax.jit(lambda p: p.log_prob(point))(posterior),
        make_posterior(matrix(), 2.0).log_prob(point, PARAMS),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_dense_covariance():
    posterior = make_posterior(matrix(), 2.0)
    expected = np.linalg.inv(dense_matrix() + 2.0 * np.eye(SPACE.size))
    np.testing.assert_allclose(posterior.to_dense(), expected, **tolerance(jnp.float64))


def test_a_posterior_made_with_parameters_knows_its_mean():
    posterior = make_posterior(matrix(), 2.0, params=PARAMS)
    key = jax.random.key(3)
    expected = flat(make_posterior(matrix(), 2.0).sample(key, 4, PARAMS))
    for found in (posterior.sample(key, 4), posterior.sample(key, 4, mean=PARAMS)):
        np.testing.assert_array_equal(flat(found), expected)
    assert posterior.penalty(PARAMS) == 0.0
    np.testing.assert_array_equal(flat(posterior.mean), flat(PARAMS))


def test_a_posterior_without_parameters_says_how_to_make_one():
    posterior = make_posterior(matrix(), 2.0)
    for call in (posterior.log_prob, posterior.penalty):
        with pytest.raises(ValueError, match=r"does not know its mean: .*params=params"):
            call(PARAMS)
    with pytest.raises(ValueError, match="does not know its mean"):
        posterior.sample(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="another name"):
        posterior.sample(jax.random.key(0), 2, PARAMS, mean=PARAMS)


def test_parameters_of_another_model_are_no_mean():
    with pytest.raises(ValueError, match="`params`"):
        make_posterior(matrix(), 2.0, params={"other": jnp.ones(3)})


def test_samples_with_a_bar_are_the_same(capsys):
    posterior = make_posterior(matrix(), 2.0, params=PARAMS)
    key = jax.random.key(3)
    expected = posterior.sample(key, 25, start=2)
    assert capsys.readouterr().err == ""
    found = posterior.sample(key, 25, start=2, progress=True)
    np.testing.assert_allclose(flat(found), flat(expected), **tolerance(jnp.float64))
    assert "25/25" in capsys.readouterr().err


def test_the_number_of_samples_is_given_once():
    v = tree(normal(SPACE.size, seed=5))
    with pytest.raises(ValueError, match="`n` is another name of `num_samples`: pass one"):
        as_curvature().sample(jax.random.key(0), 3, v, prior_prec=1.0, n=3)


@pytest.mark.parametrize("number", [{"num_samples": 3}, {"n": 3}])
def test_samples_of_a_curvature_by_either_name(number):
    key, curvature = jax.random.key(3), as_curvature()
    expected = make_posterior(curvature, 2.0, noise_variance=0.1).sample(key, 3, PARAMS)
    found = curvature.sample(key, params=PARAMS, prior_prec=2.0, noise_variance=0.1, **number)
    np.testing.assert_array_equal(flat(found), flat(expected))


def as_curvature():
    return Curvature(matrix().blocks, LAYERS, SPACE)


@pytest.mark.parametrize(
    "prior",
    [{"prior_prec": 2.0, "noise_variance": 0.1}, {"prior_prec": Chosen(2.0, 0.1)},
     {"prior_prec": Chosen(2.0), "noise_variance": 0.1}],
)  # fmt: skip
def test_noise_goes_with_the_prior(prior):
    curvature = as_curvature()
    precision = dense_matrix() / (2 * 0.1) + 2.0 * np.eye(SPACE.size)
    v = tree(normal(SPACE.size, seed=5))
    close = tolerance(jnp.float64)
    np.testing.assert_allclose(
        flat(curvature.inverse_mv(v, **prior)), np.linalg.solve(precision, flat(v)), **close
    )
    np.testing.assert_allclose(curvature.logdet(**prior), np.linalg.slogdet(precision)[1], **close)
    np.testing.assert_allclose(make_posterior(curvature, **prior).precision.to_dense(), precision)


@pytest.mark.parametrize(
    "arguments",
    [{"prior_prec": 1.0, "noise_variance": 0.1, "sigma_squared": 5.0},
     {"prior_prec": Chosen(1.0, 0.1), "sigma_squared": 5.0},
     {"prior_prec": Chosen(1.0, 0.1), "noise_variance": 0.1}],
)  # fmt: skip
def test_noise_is_given_once(arguments):
    with pytest.raises(ValueError, match="`noise_variance`"):
        make_posterior(matrix(), **arguments)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_noise_must_be_positive(value):
    with pytest.raises(ValueError, match="`noise_variance` must be positive and finite"):
        make_posterior(matrix(), 1.0, noise_variance=value)
