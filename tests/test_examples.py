"""The examples run from top to bottom, and show what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def printed_by(name, tmp_path):
    """What a copy of the example prints: elsewhere, for it draws its figure beside itself."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "docs/assets").mkdir(parents=True)
    script = shutil.copy(EXAMPLES / f"{name}.py", tmp_path / "examples")
    # Those of the tests compile with little effort, and run slowly.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_posterior_sampling(tmp_path):
    lines = printed_by("posterior_sampling", tmp_path).splitlines()
    closed, linearised, _ = (numbers(line) for line in lines[2:5])
    assert 2 * closed[0] < closed[1]  # uncertain where there are no data
    for ours, theirs in zip(linearised, closed, strict=True):
        assert ours == pytest.approx(theirs, rel=0.15)
    covered = float(re.findall(r"([\d.]+)% within", lines[-1])[0])
    assert 90 < covered < 99


def test_hyperparameter_tuning(tmp_path):
    lines = printed_by("hyperparameter_tuning", tmp_path).splitlines()
    evidences = [numbers(line[20:30])[0] for line in lines[2:6]]
    assert evidences == sorted(evidences)
    assert evidences[3] > evidences[1] + 10
    losses = [numbers(line[42:56])[0] for line in lines[2:6]]
    assert max(losses[1:]) < losses[0] - 0.02


def test_model_selection(tmp_path):
    text = printed_by("model_selection", tmp_path)
    ((chosen, gained),) = re.findall(r"chooses (.+): held-out (-?[\d.]+) better", text)
    (lost,) = re.findall(r"and (-?[\d.]+) worse", text)
    assert chosen != "linear"
    assert float(gained) > 0.02
    assert float(lost) < float(gained)


def test_continual_learning(tmp_path):
    lines = printed_by("continual_learning", tmp_path).splitlines()
    plain, penalty = (numbers(line)[-1] for line in (lines[5], lines[10]))
    assert penalty > 85
    assert plain < penalty - 20


def test_bayesian_optimisation(tmp_path):
    text = printed_by("bayesian_optimisation", tmp_path)
    place, found, highest = numbers(text)
    assert place == pytest.approx(0.5, abs=0.1)
    assert found > highest - 0.1
    assert (tmp_path / "docs/assets/bayesian_optimisation.png").exists()
