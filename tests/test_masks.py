"""Masks of the largest magnitudes and variances, and masks and indices that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models

import laplax_kfac
from laplax_kfac import masks

pytestmark = pytest.mark.usefixtures("x64")


def test_the_largest_magnitudes_are_chosen_and_integers_never():
    params = {"a": jnp.asarray([[1.0, -5.0], [0.5, 2.0]]), "n": jnp.asarray([9]), "z": jnp.ones(2)}
    mask = masks.largest_magnitude(params, 3)
    np.testing.assert_array_equal(mask["a"], [[True, True], [False, True]])  # of equal ones, first
    np.testing.assert_array_equal(mask["n"], [False])
    np.testing.assert_array_equal(mask["z"], [False, False])
    assert sum(x.sum() for x in jax.tree.leaves(masks.largest_magnitude(params, 6))) == 6
    with pytest.raises(ValueError, match="there are 6 parameters"):
        masks.largest_magnitude(params, 7)
    with pytest.raises(ValueError, match="NaN"):
        masks.largest({"a": jnp.asarray([jnp.nan, 1.0])}, 1)


def test_the_largest_variances_are_those_of_the_posterior():
    model_fn, params, data = models.classified("mlp")
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy")
    posterior = laplax_kfac.make_posterior(curvature, 0.1)
    mask = jnp.concatenate(
        [jnp.ravel(x) for x in jax.tree.leaves(masks.largest_variance(posterior, 5))]
    )
    variances = np.diag(posterior.to_dense())
    assert mask.sum() == 5
    assert variances[np.asarray(mask)].min() >= variances[~np.asarray(mask)].max()


PARAMS = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
TRUE = jax.tree.map(lambda x: np.ones(x.shape, bool), PARAMS)


@pytest.mark.parametrize(
    ("chosen", "curvature", "error", "message"),
    [
        (TRUE, "kronecker", ValueError, "needs `curvature='full'`"),
        (TRUE, "block", ValueError, "blocks are of whole layers"),
        ({"w": TRUE["w"]}, "full", ValueError, "`params_filter`.*missing are 'b'"),
        ({**TRUE, "b": np.ones(3, bool)}, "full", ValueError, "has shape"),
        (jax.tree.map(np.logical_not, TRUE), "full", ValueError, "False everywhere"),
        (PARAMS, "full", TypeError, "of booleans"),
        (jnp.asarray([0, 8]), "full", ValueError, "index 8, but there are 8 parameters"),
        (jnp.asarray([0, 0]), "diagonal", ValueError, "different indices"),
        (jnp.asarray([-1]), "diagonal", ValueError, "from 0"),
        (jnp.zeros((1, 2), int), "diagonal", ValueError, "one array"),
        (jnp.asarray([0.5]), "diagonal", TypeError, "of booleans"),
    ],
)
def test_what_is_no_subnetwork_is_refused(chosen, curvature, error, message):
    with pytest.raises(error, match=message):
        laplax_kfac.find_layers(
            lambda input, params: input @ params["w"] + params["b"], PARAMS, jnp.zeros(3),
            curvature=curvature, params_filter=chosen,
        )  # fmt: skip
