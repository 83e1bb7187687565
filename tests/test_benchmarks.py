"""The page on performance shows the committed results, and the scripts are sound."""

import ast
import json
from pathlib import Path

import chart
import harness
import jax
import jax.extend
import models_jax
import numpy as np
import pytest
import table
import workloads

FOLDER = Path(table.__file__).parent
MAKEFILE = (FOLDER.parent / "Makefile").read_text()
QUESTIONS = next(line for line in MAKEFILE.splitlines() if line.startswith("ONLY ?=")).split()[2:]


def test_page_shows_the_committed_results():
    page = table.PAGE.read_text()
    assert page == table.page_with(table.tables(), page)


def test_every_question_has_a_script_and_a_section():
    assert sorted(QUESTIONS) == sorted(table.SECTIONS)
    for question in QUESTIONS:
        script = ast.parse((FOLDER / f"{question}.py").read_text())
        assert f"harness.Session('{question}')" in ast.unparse(script)
        assert ast.get_docstring(script), question


@pytest.mark.parametrize("path", sorted(FOLDER.glob("results/*.jsonl")), ids=lambda p: p.stem)
def test_results_name_no_machine(path):
    head, *records = map(json.loads, path.read_text().splitlines())
    assert head["environment"]["processor"]
    assert records
    assert "/" not in json.dumps(head)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workload_describes_its_network(name):
    """Weights, positions and operations that the floor counts are those of the forward function."""
    workload = workloads.WORKLOADS[name].sized(2, 2)
    params, (x, _) = workloads.weights(workload), workloads.data(workload)
    forward = models_jax.forward(workload)
    assert jax.eval_shape(forward, params, x).shape == (2, workload.classes)
    assert jax.eval_shape(forward, params, x[0]).shape == (workload.classes,)
    assert sum(w.size for w in params.values()) == workload.num_params
    jaxpr = jax.make_jaxpr(forward)(params, x)
    assert matrix_operations(jaxpr.jaxpr) == workloads.operations(workload, 1)["forward"]


def matrix_operations(jaxpr):
    """Floating-point operations of the products in a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            weight, out = eqn.invars[1].aval, eqn.outvars[0].aval
            if eqn.primitive.name == "dot_general":
                (_, contracted), _ = eqn.params["dimension_numbers"]
                inner = np.prod([weight.shape[axis] for axis in contracted])
            else:
                inner = np.prod(weight.shape[:-1])  # HWIO
            total += 2 * out.size * inner
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            total += matrix_operations(sub)
    return total


def record(contender, cpu, wall=1.0, **more):
    base = {"workload": {"name": "mlp"}, "variant": "mc", "contender": contender}
    numbers = {"cpu": cpu, "wall": wall, "fraction": 1.0, "first_wall": 9.0, "peak_mb": 100.0}
    return {**base, **numbers, **more}


def test_table_of_contenders():
    failed = {"workload": {"name": "mlp"}, "variant": "mc", "contender": "c", "error": "X: no"}
    records = [record("machine", 1.0), record("laplax_kfac", 2.0), record("b", 3.0), failed]
    text = table.by_variant(table.Results({}, {}, records))
    assert "| b | 3.00 / 1.00 (1.50x) | 9.00 | 100 MB |" in text
    assert "| c | [1] |" in text
    assert "[1] `X: no`" in text
    counts = workloads.operations(workloads.WORKLOADS["mlp"], 1)
    expected = table.number(sum(counts.values()) / workloads.RATE_OPERATIONS)
    assert f"| *naive floor* | *{expected} / {expected}* |" in text


def test_times_of_a_part_are_scaled_up():
    assert table.seconds(record("b", 3.0, fraction=0.01)) == "≈ 300 / 100"


def test_runs_keep_the_first_apart_and_stop_at_their_share():
    runs = harness.Runs("a", {"fraction": 1.0, "peak_mb": 1.0})
    reply = {"cpu": 1.0, "peak_mb": 2.0}
    runs.firsts = [{**reply, "wall": 50.0}]
    runs.timed = [{**reply, "wall": wall} for wall in (1.0, 9.0, 2.0)]
    assert not runs.wants_more(5, 10.0)
    assert runs.wants_more(5, 20.0)
    assert not runs.wants_more(5, 20.0, with_firsts=True)
    assert (runs.summary()["wall"], runs.summary()["first_wall"]) == (2.0, 50.0)
    runs.timed.append({"error": "X: no"})
    assert runs.summary() == {"contender": "a", "error": "X: no"}


def test_the_chart_has_the_multiples_of_the_tables(tmp_path):
    def record(contender, cpu, **more):
        return {
            "workload": {"name": "mlp"}, "variant": "type2", "contender": contender, "cpu": cpu,
            "fraction": 1.0, **more,
        }  # fmt: skip

    records = [
        record("laplax_kfac", 2.0),
        record("peer", 3.0, fraction=0.5),
        record("machine", 1.0),
    ]
    records += [{**record("broken", 9.0), "error": "no"}, {**record("peer", 1.0), "variant": "mc"}]
    assert chart.multiples(records, "type2") == {"mlp": {"laplax_kfac": 1.0, "peer": 3.0}}
    chart.draw(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").exists()
    assert (table.PAGE.parent / "assets/performance.png").exists()
