"""Every Fisher type keeps the contract of its record, and a new one is one record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplax_kfac
from laplax_kfac import fisher
from laplax_kfac.fisher import FISHER_TYPES, Columns, fisher_type_of
from laplax_kfac.likelihood.named import resolve_likelihood

pytestmark = pytest.mark.usefixtures("x64")
LOGITS = np.array([[0.3, -1.0, 0.7], [0.1, 0.4, -0.2]])
LABELS = jnp.array([2, 0])
CROSS_ENTROPY = resolve_likelihood("cross_entropy")


def expected(name):
    """What outer products of the columns sum to: H, but for one type of its own meaning."""
    if name == "empirical":
        gradient = jax.grad(lambda f: CROSS_ENTROPY.loss(f, LABELS))(jnp.asarray(LOGITS)).ravel()
        return np.outer(gradient, gradient)
    return jax.hessian(lambda f: CROSS_ENTROPY.loss(f, LABELS))(jnp.asarray(LOGITS)).reshape(6, 6)


@pytest.mark.parametrize("name", list(FISHER_TYPES))
@pytest.mark.parametrize("draws", [{}, {"mc_samples": 3}, {"sketches": 2}], ids=str)
def test_every_fisher_type_keeps_the_contract(name, draws):
    record = fisher_type_of(name)
    columns = Columns(CROSS_ENTROPY, record, **draws)
    if not columns.pull_back:
        assert columns.number(LOGITS, LABELS) == 0
        return

    def flat(key, labels=LABELS):
        return columns.vectors(key, jnp.asarray(LOGITS), labels).reshape(-1, LOGITS.size)

    one, other = flat(jax.random.key(0)), flat(jax.random.key(1))
    assert one.shape == (columns.number(LOGITS, LABELS), LOGITS.size)
    sketched = record.takes_sketches and "sketches" in draws
    assert (record.random or sketched) == (not np.array_equal(one, other))
    reads_target = not np.array_equal(flat(jax.random.key(0), (LABELS + 1) % 3), one)
    assert record.needs_targets == reads_target
    assert hash(columns) == hash(Columns(CROSS_ENTROPY, record, **draws))

    number = 20_000 if record.random or sketched else 1
    drawn = jax.vmap(flat)(jax.random.split(jax.random.key(2), number))
    mean = jnp.einsum("kri,krj->ij", drawn, drawn) / number
    np.testing.assert_allclose(mean, expected(name), atol=0.01 if number > 1 else 1e-12)


def test_only_a_root_that_is_not_sketched_is_all_of_it():
    for name, record in FISHER_TYPES.items():
        assert Columns(CROSS_ENTROPY, record).are_root(LOGITS, LABELS) == (name == "type2")
    type2 = fisher_type_of("type2")
    assert not Columns(CROSS_ENTROPY, type2, sketches=2).are_root(LOGITS, LABELS)
    assert Columns(CROSS_ENTROPY, type2, sketches=9).are_root(LOGITS, LABELS)


def test_adding_a_fisher_type_is_one_record(monkeypatch):
    """The diagonal of the Hessian alone: R = C columns sqrt(H_cc) e_c."""
    monkeypatch.setattr(fisher, "FISHER_TYPES", dict(FISHER_TYPES))

    def diagonal(columns, key, f, y):
        root = Columns(columns.likelihood, fisher_type_of("type2")).vectors(key, f, y)
        return jnp.diag(jnp.sqrt(jnp.sum(root**2, axis=0)))

    fisher.register(fisher.FisherType("type2_diagonal", diagonal, lambda _, f, __: f.size))
    weights = {"w": jnp.array([[0.2, -0.4, 1.0], [0.5, 0.1, -0.3]])}
    x, y = jnp.array([[1.0, -2.0]]), jnp.array([1])

    def model_fn(input, params):
        return input @ params["w"]

    found = laplax_kfac.kfac(
        model_fn, weights, (x, y), loss_fn="cross_entropy", fisher_type="type2_diagonal"
    )
    p = jax.nn.softmax(x[0] @ weights["w"])
    exact = np.kron(np.outer(x[0], x[0]), np.diag(p * (1 - p)))
    np.testing.assert_allclose(found.to_dense(), exact, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="type2_diagonal"):
        laplax_kfac.kfac(model_fn, weights, (x, y), loss_fn="cross_entropy", fisher_type="diag")
