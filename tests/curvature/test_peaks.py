"""What is told of memory is what XLA and the machine need, and what cannot fit is refused."""

import functools

import jax
import jax.numpy as jnp
import memory
import pytest
import workloads

import laplax_kfac
from laplax_kfac import machine
from laplax_kfac.curvature import peaks
from laplax_kfac.parsing.layer import Layer

WIDE = 3000


def told(report):
    assert report.pass_bytes
    return report.pass_bytes


def linear(input, params):
    return input @ params["w"]


PARAMS = {"w": jnp.full((2, WIDE), 0.01)}
DATA = (jnp.ones((4, 2)), jnp.zeros(4, int))
NARROW = laplax_kfac.Options(max_factor_size=100)  # the factor of the outputs is diagonal


@pytest.mark.parametrize(
    ("workload", "fisher_type", "batch"),
    [
        (workloads.mlp((196, 300, 300, 10)), "type2", 64),
        (workloads.mlp((196, 300, 300, 10)), "mc", 256),
        (workloads.transformer(tokens=32, width=64, hidden=128, depth=2), "type2", 16),
    ],
    ids=["mlp-type2", "mlp-mc", "transformer"],
)
def test_the_peak_of_a_pass_is_within_30_percent_of_xla(workload, fisher_type, batch):
    report = memory.report_of(workload, fisher_type, batch)
    assert told(report) == pytest.approx(memory.measured_pass(report.work), rel=0.3)
    assert f"(batches of {batch}, {10 - 1 if fisher_type == 'type2' else 1} columns" in str(report)


def test_the_roots_of_many_classes_count():
    report = laplax_kfac.find_layers(linear, PARAMS, DATA[0][0], batch_size=4, options=NARROW)
    assert told(report) > 4 * WIDE**2
    assert told(report) == pytest.approx(memory.measured_pass(report.work), rel=0.3)
    few = laplax_kfac.find_layers(
        linear, PARAMS, DATA[0][0], batch_size=4, sketches=2, options=NARROW
    )
    assert told(few) < told(report) / 50
    assert f"{WIDE - 1} columns pulled back" in str(report)
    assert "2 columns pulled back" in str(few)


def layer(size, stack=1, sides=("dense", "dense")):
    return Layer("l", "dense", ("w",), "kronecker", size, 8, stack=stack, sides=sides)


def test_decompositions_count_sums_matrices_vectors_and_work():
    wide, small = 1000**2 + 8**2, 100**2 + 8**2
    values = 8000 * 4
    assert peaks.finalization_bytes([layer(1000)]) == 12 * wide + 8 * (1000**2 + 2 * 1000**2)
    both = 12 * (2 * small) + 8 * (2 * 2 * small + 2 * 100**2)
    assert peaks.finalization_bytes([layer(100), layer(100)]) == both
    assert (
        peaks.finalization_bytes([layer(1000, sides=("diagonal", "identity"))]) == 4 * 1001 + values
    )
    in_blocks = peaks.finalization_bytes([layer(1000, sides=("blocked:100", "diagonal"))])
    assert in_blocks < peaks.finalization_bytes([layer(1000)]) / 5


# -- what cannot fit ---------------------------------------------------------------------------


def room_of(monkeypatch, room):
    monkeypatch.setattr(machine, "room", lambda: room)


def fit(data, **keywords):
    found = functools.partial(laplax_kfac.kfac, linear, PARAMS, data, loss_fn="cross_entropy")
    return found(options=NARROW, **keywords)


def test_a_pass_that_cannot_fit_is_refused_before_it_starts(monkeypatch):
    compiled = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: compiled.append(1))
    room_of(monkeypatch, 10**7)
    with pytest.raises(ValueError, match=r"needs about .*; there are 10 MB") as error:
        fit(DATA)
    assert "This fits: fisher_type='mc' (" in str(error.value)
    assert "sketches=32 (" in str(error.value)
    assert not compiled


def test_what_is_said_to_fit_does(monkeypatch):
    laplax_kfac.clear_caches()
    room_of(monkeypatch, 10**7)
    assert fit(DATA, fisher_type="mc").trace() > 0
    assert fit(DATA, sketches=32).trace() > 0


def test_smaller_batches_are_named_where_they_help(monkeypatch):
    def model(input, params):
        return input @ params["w"]

    params, examples = {"w": jnp.ones((256, 2))}, 4096
    data = (jnp.ones((examples, 256)), jnp.ones((examples, 2)))
    room_of(monkeypatch, 3 * 10**6)
    with pytest.raises(ValueError, match=r"This fits: .*batch_size=\d+ \("):
        laplax_kfac.kfac(model, params, data, loss_fn="mse", batch_size=examples)


def test_factors_that_cannot_fit_have_other_advice(monkeypatch):
    room_of(monkeypatch, 10**5)
    with pytest.raises(ValueError, match="Smaller factors need less: `max_factor_size`"):
        laplax_kfac.kfac(
            linear, {"w": jnp.ones((600, 2))}, (jnp.ones((1, 600)), jnp.ones((1, 2))),
            loss_fn="mse",
        )  # fmt: skip


def test_the_later_passes_are_looked_at_too(monkeypatch):
    """Those of `ekfac` need their own memory: it is refused where only the first one fits."""
    acc = laplax_kfac.accumulator(linear, PARAMS, loss_fn="cross_entropy", fisher_type="mc")
    curvature = acc.finalize(acc.update(acc.init(), DATA))
    room_of(monkeypatch, 10**4)
    parts = acc.parts([DATA], 4)
    with pytest.raises(ValueError, match="a pass over one batch needs about"):
        acc.correct(curvature, parts)


def test_there_is_some_room():
    room = machine.room()
    assert room is not None
    assert 10**8 < room < 10**14


def test_less_is_allowed_than_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "memory.max")
    whole = machine.room()
    machine.CGROUP.write_text("max\n")
    assert machine.room() == whole
    machine.CGROUP.write_text("123456789\n")
    assert machine.room() == 123456789
