"""Random networks against the dense curvature; `make fuzz N=2000 SEED=7` runs more of them."""

import os
import subprocess
import sys
from dataclasses import replace

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase

import laplax_kfac
from fuzz.descriptions import CALLS, KINDS, Case, Part, cases
from fuzz.programs import CALLS as WRITTEN_CALLS
from fuzz.programs import LAYERS, run, source
from fuzz.reference import TOLERANCES, Wrong, check
from fuzz.survey import drawn
from laplax_kfac import patterns

pytestmark = pytest.mark.usefixtures("x64")

NUMBER = int(os.environ.get("LAPLAX_KFAC_FUZZ", "100"))
SEED = int(os.environ.get("LAPLAX_KFAC_FUZZ_SEED", "0"))
TOGETHER = 10
"""Networks a test; what was compiled for them is then forgotten, for it would fill the memory."""
THOROUGH = "LAPLAX_KFAC_FUZZ" in os.environ


def check_case(case):
    """Check a network; in the normal suite records of some, the posterior of others."""
    few = (["records"], ["posterior"], [])[case.seed % 3]
    parts = ["records", "posterior"] if THOROUGH else few
    check(run(case), TOLERANCES[case.precision], parts)


def explore(number):
    """Draw the network of this number, and shrink it if it is wrong."""
    simple: list[Case] = []

    # Hypothesis makes variants of one network within a run: for independent ones, run it anew.
    @hypothesis.seed(number)
    @hypothesis.settings(
        max_examples=2,
        phases=[Phase.generate, Phase.shrink],
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases())
    def explored(case):
        if not simple:  # the first is the simplest, whatever the seed
            simple.append(case)
            return
        try:
            check_case(case)
        except Exception as error:
            error.add_note(f"{case}\n\n{source(case)}")
            raise

    explored()


@pytest.mark.parametrize("start", range(SEED, SEED + NUMBER, TOGETHER))
def test_networks(start):
    try:
        for number in range(start, min(start + TOGETHER, SEED + NUMBER)):
            explore(number)
    finally:
        jax.clear_caches()


SEQUENCE = Case(shape=(3, 2), examples=2, outputs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_written(kind):
    """Of every variant, the program runs and has the shape that was worked out for it."""
    assert {*KINDS} == {*LAYERS}
    for variant in range(6):
        for bias in (False, True):
            program = run(replace(SEQUENCE, parts=(Part(kind, bias=bias, variant=variant),)))
            output = jax.eval_shape(
                jax.vmap(lambda x, p=program: p["model_fn"](x, p["params"])), program["inputs"]
            )
            assert output.shape == program["targets"].shape


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_written(call):
    assert {*CALLS} == {*WRITTEN_CALLS}
    program = run(replace(SEQUENCE, parts=(Part("dense", call, activation="tanh"),)))
    text = source(replace(SEQUENCE, parts=(Part("dense", call, activation="tanh"),)))
    template = WRITTEN_CALLS[call].split("{f}")[0].split("{p}")[0]
    assert template in text
    output = jax.eval_shape(
        jax.vmap(lambda x: program["model_fn"](x, program["params"])), program["inputs"]
    )
    assert output.shape == program["targets"].shape


def test_a_printed_program_runs_on_its_own(tmp_path):
    case = replace(SEQUENCE, parts=(Part("layer_norm", activation="gelu"),), loss="cross_entropy")
    path = tmp_path / "case.py"
    path.write_text(source(case))
    subprocess.run([sys.executable, str(path)], check=True, capture_output=True)
    wrong = source(case).replace("curvature = laplax_kfac.kfac(*arguments, **options)\n",
                                 "curvature = laplax_kfac.kfac(*arguments, **options)"
                                 ".map(lambda v: 2 * v)\n")  # fmt: skip
    path.write_text(wrong)
    found = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert "Wrong: dense block of 'shift'" in found.stderr


# -- the fuzzer can fail -------------------------------------------------------------------------

DENSE = replace(SEQUENCE, parts=(Part("dense", activation="tanh"),))
ONE = Case(shape=(2,), examples=1, outputs=1, eigenvalue_correction=False)


@pytest.fixture
def pattern():
    """Registers a wrong pattern of products, and the right one after the test."""
    yield lambda **changes: patterns.register("dot_general", replace(patterns.DENSE, **changes))
    patterns.register("dot_general", patterns.DENSE)


def doubled(eqn, operand, others):
    return 2.0 * patterns.DENSE.inputs(eqn, operand, others)


def reversed_positions(eqn, operand, others):
    return jnp.flip(patterns.DENSE.inputs(eqn, operand, others), 0)


@pytest.mark.parametrize("inputs", [doubled, reversed_positions])
@pytest.mark.parametrize(
    ("case", "claim"),
    [
        (DENSE, "(trace|projection) of 'dense'"),
        (replace(DENSE, fisher_type="forward_only", eigenvalue_correction=False), "a g"),
    ],
)
def test_wrong_inputs_of_a_pattern_are_found(pattern, inputs, case, claim):
    check_all(case)
    pattern(inputs=inputs)
    with pytest.raises(Wrong, match=claim):
        check_all(case)


def check_all(case):
    check(run(case), TOLERANCES[case.precision])


def scaled(curvature):
    return curvature.map(lambda values: 1.001 * values)


def shifted(curvature):
    return curvature.map(lambda values: values - 1e-3)


def without_last(curvature):
    return replace(curvature, blocks=curvature.blocks[:-1], layers=curvature.layers[:-1])


def rotated(curvature):
    """The right eigenvalues, and so the right trace, in a wrong basis."""

    def wrong(block):
        first, *others = block.sides
        return replace(block, sides=(replace(first, vectors=first.vectors[:, ::-1]), *others))

    return replace(curvature, blocks=tuple(map(wrong, curvature.blocks)))


@pytest.mark.parametrize(
    ("change", "case", "claim"),
    [
        (scaled, DENSE, "trace of 'dense'"),
        (scaled, ONE, "one pair of 'dense'"),
        (scaled, replace(DENSE, curvature="block", eigenvalue_correction=False), "dense block"),
        (scaled, replace(DENSE, curvature="diagonal", eigenvalue_correction=False), "diagonal blo"),
        (shifted, ONE, "positive semi-definite"),
        (without_last, DENSE, "not in one layer each"),
        (rotated, DENSE, "projection of 'dense'"),
    ],
)
def test_wrong_curvatures_are_found(monkeypatch, change, case, claim):
    check_all(case)
    right = laplax_kfac.kfac
    monkeypatch.setattr(laplax_kfac, "kfac", lambda *a, **options: change(right(*a, **options)))
    with pytest.raises(Wrong, match=claim):
        check_all(case)


def test_wrong_predictions_are_found(monkeypatch):
    right = laplax_kfac.predictive_covariance

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        return replace(found, covariance=found.covariance * 1.01)

    monkeypatch.setattr(laplax_kfac, "predictive_covariance", wrong)
    with pytest.raises(Wrong, match="predictive covariance"):
        check_all(DENSE)


def test_a_wrong_network_shrinks_to_its_cause_and_is_printed(monkeypatch):
    """Where every network with a gain is wrong, nothing is left of the rest of the network."""

    def wrong(case):
        program = run(case)
        jax.eval_shape(
            jax.vmap(lambda x: program["forward"](x, program["params"])), program["inputs"]
        )
        assert "gain" not in {part.kind for part in case.parts}

    monkeypatch.setattr(f"{__name__}.check_case", wrong)
    number = next(k for k in range(1000) if "gain" in {part.kind for part in drawn(k).parts})
    with pytest.raises(AssertionError) as caught:
        explore(number)
    (note,) = [note for note in caught.value.__notes__ if note.startswith("Case(")]
    assert "parts=(Part(kind='gain', call='plain'" in note
    assert note.count("Part(") == 1
    assert 'def layer0(p, x):\n    x = x * p["s"]' in note
    assert "check(globals()" in note
