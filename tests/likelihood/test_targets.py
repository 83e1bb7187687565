"""Targets that no loss can mean: values that are noticed in a pass, shapes before it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal

import laplax_kfac
from laplax_kfac import likelihood as lik
from laplax_kfac.likelihood import resolve_likelihood, weighted

pytestmark = pytest.mark.usefixtures("x64")

X = normal(4, 3)
LABELS = np.asarray([0, 1, 3, 2])
FISHER_TYPES = ["type2", "mc", "empirical", "forward_only"]


def network(outputs):
    return (lambda input, params: input @ params), normal(3, outputs, seed=1)


def soft(*rows):
    return np.asarray([[0.25] * 4, *rows, *[[1.0, 0, 0, 0]] * (3 - len(rows))])


LABELS_OUTSIDE = r"class labels outside 0\.\.3.*ignore_index.*weight 0"
NO_PROBABILITIES = r"negative or do not sum to one.*weighted"
OUTSIDE_THE_UNIT = r"numbers outside \[0, 1\]"

FAULTY = [
    ("cross_entropy", LABELS + 1, LABELS_OUTSIDE),
    ("cross_entropy", LABELS - 1, LABELS_OUTSIDE),
    ("cross_entropy", np.where(LABELS == 3, -100, LABELS), LABELS_OUTSIDE),
    ("cross_entropy", np.where(LABELS == 3, 255, LABELS).astype(np.uint8), LABELS_OUTSIDE),
    ("cross_entropy", (LABELS + 1).astype(np.int8)[:, None], LABELS_OUTSIDE),
    (lik.categorical(ignore_index=-1), LABELS + 1, LABELS_OUTSIDE),
    (lik.categorical(label_smoothing=0.1), LABELS + 1, LABELS_OUTSIDE),
    ("cross_entropy", soft([0.0] * 4), NO_PROBABILITIES),
    ("cross_entropy", soft([0.2, 0.2, 0.2, 0.2]), NO_PROBABILITIES),
    ("cross_entropy", soft([2.0, 0, 0, 0]), NO_PROBABILITIES),
    ("cross_entropy", soft([1.5, -0.5, 0, 0]), NO_PROBABILITIES),
    ("cross_entropy", soft([np.nan, 0, 0, 1]), NO_PROBABILITIES),
    ("cross_entropy", soft([1.0, 1, 0, 0]).astype(int), NO_PROBABILITIES),
    ("binary_cross_entropy", 2 * (normal(4, 4) > 0) - 1, OUTSIDE_THE_UNIT),
    ("binary_cross_entropy", np.full((4, 4), 2), OUTSIDE_THE_UNIT),
    ("binary_cross_entropy", np.full((4, 4), 1.01), OUTSIDE_THE_UNIT),
    ("binary_cross_entropy", np.full((4, 4), np.nan), OUTSIDE_THE_UNIT),
    (lik.poisson(), np.full((4, 4), -1), "counts that are negative"),
    (lik.poisson(), np.full((4, 4), np.inf), "counts that are negative"),
    ("mse", np.full((4, 4), np.nan), "targets of `data` hold NaN or infinity"),
    (lik.gaussian(0.5), np.full((4, 4), -np.inf), "targets of `data` hold NaN or infinity"),
    (lik.heteroscedastic_gaussian(), np.full((4, 2), np.nan), "targets of `data` hold NaN"),
    (weighted("cross_entropy"), (LABELS + 1, np.ones(4)), LABELS_OUTSIDE),
    (weighted("cross_entropy"), (LABELS, -np.ones(4)), "weights of terms that are negative"),
    (weighted("mse"), (np.zeros((4, 4)), np.full((4, 4), np.nan)), "weights of terms"),
]


@pytest.mark.parametrize(("loss_fn", "targets", "message"), FAULTY)
def test_values_that_are_no_targets(loss_fn, targets, message):
    model_fn, params = network(4)
    for call in (laplax_kfac.kfac, laplax_kfac.data_fit):
        with pytest.raises(ValueError, match=message):
            call(model_fn, params, (X, targets), loss_fn=loss_fn)


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize(("loss_fn", "targets", "message"), [FAULTY[0], FAULTY[7], FAULTY[13]])
def test_every_fisher_type_looks_at_targets(fisher_type, loss_fn, targets, message):
    model_fn, params = network(4)
    with pytest.raises(ValueError, match=message):
        laplax_kfac.kfac(model_fn, params, (X, targets), loss_fn=loss_fn, fisher_type=fisher_type)


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize(
    ("loss_fn", "outputs", "targets", "message"),
    [
        ("cross_entropy", 1, LABELS % 2, r"found shape \(1,\).*binary_cross_entropy"),
        ("cross_entropy", 4, LABELS.astype(float), r"float64 of shape \(\); convert.*astype"),
        ("cross_entropy", 4, LABELS > 1, r"found bool of shape \(\)"),
        ("cross_entropy", 4, np.zeros((4, 3)), r"found float64 of shape \(3,\)"),
        ("cross_entropy", 4, np.zeros((4, 2), int), r"found int64 of shape \(2,\)"),
        ("mse", 4, np.zeros((4, 2)), r"shape of the output, \(4,\) an example; found \(2,\)"),
        ("mse", 4, np.zeros(4), r"outputs float64\[4\] and targets float64\[\]"),
        ("mse", 4, np.zeros((4, 4), complex), "needs real outputs and targets"),
        ("binary_cross_entropy", 4, np.zeros((4, 3)), r"found \(3,\)"),
        ("binary_cross_entropy", 4, np.zeros(4), r"found \(\)"),
        (lik.poisson(), 4, np.zeros((4, 5)), r"found \(5,\)"),
        (lik.gaussian(1.0), 4, np.zeros((4, 5)), r"found \(5,\)"),
        (lik.heteroscedastic_gaussian(), 3, np.zeros((4, 1)), "of even size"),
        (lambda f, y: jnp.sum((f - y) ** 2), 4, np.zeros((4, 3)), r"`loss_fn`.*float64\[4\]"),
        (lambda f, y: (f - y) ** 2, 4, np.zeros((4, 4)), "one number an example"),
        (lambda f, y: f @ y["a"], 4, np.zeros((4, 4)), "`loss_fn`"),
        ("mse", 4, {"a": np.zeros((4, 4))}, "`loss_fn`"),
    ],
)  # fmt: skip
def test_shapes_and_dtypes_that_do_not_fit(fisher_type, loss_fn, outputs, targets, message):
    model_fn, params = network(outputs)
    options: dict[str, Any] = {"loss_fn": loss_fn}
    with pytest.raises(ValueError, match=message):
        laplax_kfac.kfac(model_fn, params, (X, targets), fisher_type=fisher_type, **options)
    if fisher_type == "type2":
        with pytest.raises(ValueError, match=message):
            laplax_kfac.data_fit(model_fn, params, (X, targets), **options)


def test_labels_of_transposed_terms_are_refused():
    """Six labels for six terms, in another order: a reshape would mix them."""
    likelihood = resolve_likelihood("cross_entropy")
    with pytest.raises(ValueError, match=r"integer classes of shape \(2, 3\)"):
        likelihood.loss(normal(2, 3, 4), np.zeros((3, 2), int))
    assert likelihood.loss(normal(2, 3, 4), np.zeros((2, 3, 1), int)) > 0


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        ("cross_entropy", LABELS),
        ("cross_entropy", LABELS.astype(np.uint8)[:, None]),
        ("cross_entropy", np.eye(4, dtype=int)),
        ("cross_entropy", np.full((4, 4), 0.25, np.float16)),
        ("cross_entropy", np.asarray(jax.nn.softmax(normal(4, 4)), jnp.bfloat16)),
        (lik.categorical(ignore_index=-100), np.where(LABELS == 3, -100, LABELS)),
        (lik.categorical(ignore_index=7), np.where(LABELS == 3, 7, LABELS)),
        (weighted("cross_entropy"), (np.where(LABELS == 3, -1, LABELS), (LABELS < 3) * 1.0)),
        (weighted("cross_entropy"), (soft([0.0] * 4), np.asarray([1.0, 0, 2, 1]))),
        (weighted("mse"), (np.where(np.eye(4)[:, :1], np.nan, np.zeros((4, 4))), LABELS > 0)),
        ("binary_cross_entropy", normal(4, 4) > 0),
        ("binary_cross_entropy", np.full((4, 4), 0.3)),
        (lik.poisson(), np.full((4, 4), 3)),
        ("mse", np.zeros((4, 4, 1))),
    ],
)
def test_targets_that_are_right(loss_fn, targets):
    model_fn, params = network(4)
    for call in (laplax_kfac.kfac, laplax_kfac.data_fit):
        call(model_fn, params, (X, targets), loss_fn=loss_fn)


def test_weights_in_rows_belong_beside_them():
    """What a row of sum s stands for, -sum q log p, is s times the loss of q / s."""
    model_fn, params = network(4)
    q, s = np.asarray(jax.nn.softmax(normal(4, 4))), np.asarray([1.0, 0.5, 0.0, 3.0])
    found = laplax_kfac.kfac(
        model_fn, params, (X, (q, s)), loss_fn=weighted("cross_entropy"), curvature="block"
    )

    def loss(w):
        return -jnp.sum(s[:, None] * q * jax.nn.log_softmax(X @ w.reshape(3, 4)))

    expected = jax.hessian(loss)(jnp.ravel(params))  # the model is linear
    np.testing.assert_allclose(found.to_dense(), expected, rtol=1e-9, atol=1e-12)


def test_texts_of_faults_do_not_depend_on_the_target():
    """They are the structure of what passes add up, whatever comes in a batch."""
    f = jnp.zeros((2, 4))
    hard, probable = np.zeros(2, int), np.full((2, 4), 0.25)
    faults = resolve_likelihood("cross_entropy").faults
    assert faults is not None
    assert faults(f, hard).keys() == faults(f, probable).keys()
    model_fn, params = network(4)
    data = [(X, LABELS), (X, np.eye(4)), (X, np.eye(4) / 2)]
    with pytest.raises(ValueError, match=r"do not sum to one.*batch 2"):
        laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy")
