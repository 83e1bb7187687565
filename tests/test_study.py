"""The study's page shows its committed results, and its parts compute what they say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study import classification, continual, data, metrics, regression, results, selection, tables
from study.approximations import APPROXIMATIONS, fitted
from study.networks import Flat, Network, num_params
from study.training import Recipe, train_all

pytestmark = pytest.mark.filterwarnings("ignore")  # what is warned of is what is measured


def test_page_shows_the_committed_results():
    page = tables.PAGE.read_text()
    assert page == tables.page_with(tables.Summary(results.Results.read()), page)


def test_committed_results_are_of_known_cells():
    kinds = (classification, regression, selection, continual)
    names = {task.name for kind in kinds for task in kind.TASKS}
    records = list(results.Results.read())
    assert {record["task"] for record in records} <= names
    assert {record["seed"] for record in records} <= set(range(5))


def test_an_interrupted_line_is_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    kept = results.Results.read(path)
    kept.add("task", "method", 0, {"nll": 1 / 3})
    kept.add("task", "method", 1, {"nll": 2 / 3})
    path.write_text(path.read_text()[:-5])
    again = results.Results.read(path)
    assert ("task", "method", 0) in again
    assert ("task", "method", 1) not in again
    again.add("task", "method", 1, {"nll": 0.5})
    assert [json.loads(line)["nll"] for line in path.read_text().splitlines()] == [0.33333, 0.5]


def test_scores_of_classes():
    p = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.3, 0.7]])
    scores = metrics.of_classes(p, np.array([0, 1, 1, 1]))
    assert scores["accuracy"] == 0.75
    assert np.isclose(scores["nll"], -np.log([0.8, 0.6, 0.1, 0.7]).mean())
    assert np.isclose(scores["brier"], np.mean([0.08, 0.32, 1.62, 0.18]))
    assert np.isclose(scores["ece"], (0.2 + 0.4 + 0.9 + 0.3) / 4)  # each in a bin of its own


def test_scores_of_strange_inputs():
    known, strange = (
        np.stack([p, 1 - p], 1) for p in (np.linspace(0.6, 0.99, 20), np.r_[0.55, 0.8])
    )
    scores = metrics.of_strangeness(known, strange)
    assert np.isclose(scores["auroc"], np.mean(known[:, 0] > 0.8) / 2 + 0.5)
    assert scores["fpr95"] == 0.5  # 19 of 20 pass at 0.62, and so does 0.8


def test_temperature_is_the_best_of_many():
    random = np.random.default_rng(0)
    logits, labels = 3 * random.normal(size=(200, 4)), random.integers(4, size=200)
    found = metrics.temperature(logits, labels)

    def nll(heat):
        logs = jax.nn.log_softmax(logits / heat)
        return -float(logs[np.arange(200), labels].mean())

    assert nll(found) <= min(map(nll, np.exp(np.linspace(-2.9, 2.9, 50)))) + 1e-6


def test_splits_share_nothing_and_strange_digits_are_unknown():
    source = data.digits8()
    found = data.images(source, 0, (700, 230, 500))
    parts = [found.train.x, found.validation.x, found.test.x]
    assert [len(part) for part in parts] == [700, 230, 500]
    assert len(np.unique(np.concatenate(parts).reshape(1430, -1), axis=0)) == 1430
    assert max(part.y.max() for part in (found.train, found.validation, found.test)) < data.KNOWN
    strange = {image.tobytes() for image in found.strange["other digits"]}
    assert strange <= {image.tobytes() for image in source.x[source.y >= data.KNOWN]}


def test_whole_curvature_is_the_full_generalised_gauss_newton_matrix():
    network = Network((64, 4, data.KNOWN))
    params = network.init(jax.random.key(0))
    found = data.images(data.digits8(), 0, (30, 10, 20))
    model = fitted(APPROXIMATIONS["full"], network, params, found, "cross_entropy")
    flat = Flat(network)
    theta = flat.flatten(params)

    def term(x):
        jacobian = jax.jacrev(lambda t: network(x, jax.flatten_util.ravel_pytree(params)[1](t)))
        p = jax.nn.softmax(network(x, params))
        rows = jacobian(theta["theta"])
        return rows.T @ (jnp.diag(p) - jnp.outer(p, p)) @ rows

    expected = sum(term(x) for x in found.train.x)
    np.testing.assert_allclose(model.curvature.to_dense(), expected, rtol=1e-3, atol=1e-4)


def test_trained_side_by_side_as_one_by_one():
    network, recipe = Network((3, 4, 1)), Recipe("mse", epochs=3, batch_size=5)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 20, 3)), random.normal(size=(2, 20, 1))
    both = train_all(network, recipe, jnp.asarray(x), jnp.asarray(y), 2)
    assert jax.tree.leaves(both)[0].shape[:2] == (2, 2)
    first = train_all(network, recipe, jnp.asarray(x[:1]), jnp.asarray(y[:1]), 1)
    for some, one in zip(jax.tree.leaves(both), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(some[0, 0], one[0, 0], rtol=1e-4, atol=1e-6)


TINY = Recipe("cross_entropy", epochs=3, batch_size=30)


@pytest.mark.slow
def test_cells_of_a_task_are_run_once(tmp_path):
    task = dataclasses.replace(
        classification.TASKS[0], sizes=(60, 20, 30), network=Network((64, 5, data.KNOWN)),
        recipe=TINY, approximations=("last_full",), marglik_epochs=5,
    )  # fmt: skip
    path = tmp_path / "results.jsonl"
    cells = list(classification.run(task, [0], results.Results.read(path)))
    assert len(cells) == len(classification.methods_of(task))
    assert not list(classification.run(task, [0], results.Results.read(path)))
    summary = tables.Summary(results.Results.read(path))
    assert tables.classification_tables(summary).count("±") == len(cells) * len(tables.SCORES)
    links = summary.cells[task.name, "last_full/evidence"][0]["links"]
    assert links["mc"]["distance"] == 0
    assert all(0 < links[link]["distance"] < 0.5 for link in links if link != "mc")


@pytest.mark.slow
def test_regression_selection_and_continual_cells(tmp_path):
    kept = results.Results.read(tmp_path / "results.jsonl")
    short = dataclasses.replace(TINY, loss="mse")
    table = dataclasses.replace(
        regression.TASKS[0], recipe=short, network=Network((data.COLUMNS, 3, 1)),
        approximations=("kfac",),
    )  # fmt: skip
    assert len(list(regression.run(table, [0], kept))) == len(regression.methods_of(table))
    choice = dataclasses.replace(selection.TASKS[-1], recipe=short, hidden=((), (2,)), rounds=1)
    assert len(list(selection.run(choice, [0], kept))) == 2
    permuted = continual.Continual(tasks=2, steps=5, network=Network((64, 6, 10)))
    assert len(list(continual.run(permuted, [0], kept))) == len(continual.METHODS)
    params = Network((data.COLUMNS, 2, 1)).init(jax.random.key(0))
    cell = kept.records[choice.name, "2", 0]
    assert cell["num_params"] == num_params(params)
    assert np.isclose(cell["symmetries"], np.log(2 * 2**2))


def test_evidence_of_the_full_matrix_from_formulas_is_that_of_the_package():
    found = data.table(data.teacher(), 0)
    network = Network((data.COLUMNS, 3, 1))
    params = network.init(jax.random.key(0))
    numbers = selection.dense(network, params, found)
    model = fitted(APPROXIMATIONS["full"], network, params, found, "mse")
    tuned = model.tuned("evidence", found.validation)
    np.testing.assert_allclose(numbers["evidence"], tuned.evidence.value, atol=0.02)
    assert tuned.noise_variance is not None
    np.testing.assert_allclose(numbers["noise_variance"], tuned.noise_variance, rtol=0.02)
    scores = regression.of_laplace(model, tuned, found.test)
    np.testing.assert_allclose(numbers["nll"], scores["nll"], rtol=2e-3)
