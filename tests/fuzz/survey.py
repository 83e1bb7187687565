"""Draw many networks, and count what is wrong by cause: ``python -m fuzz.survey N SEED``."""

import sys
import time
import traceback
import warnings

import jax
from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.descriptions import Case, cases
from fuzz.programs import run
from fuzz.reference import TOLERANCES, check

CLEAR_EVERY = 40
"""Networks between two clearings of what JAX has compiled, which would fill the memory."""


def drawn(number: int) -> Case:
    """A network by its number. Hypothesis makes variants of one within a run, so run it anew."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=2,  # the first is always the simplest
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found[-1]


def cause(case: Case) -> str | None:
    """What is wrong with a network, in one line; None if nothing is."""
    try:
        check(run(case), TOLERANCES[case.precision])
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [f for f in frames if "fuzz" not in f.filename]
        at = f" at {inside[-1].filename[-40:]}:{inside[-1].lineno}" if inside else ""
        return f"{type(error).__name__}: {str(error)[:160]}{at}"
    return None


def survey(number: int, start: int) -> list[tuple[str, Case]]:
    """The failures among that many networks."""
    failures: list[tuple[str, Case]] = []
    began = time.time()
    for k in range(start, start + number):
        case = drawn(k)
        if k % CLEAR_EVERY == 0:
            jax.clear_caches()
            print(f"from {k} on, {time.time() - began:.0f} s", flush=True)
        found = cause(case)
        if found is not None:
            failures.append((found, case))
            print(f"{k}  {time.time() - began:.0f}s  {found}\n    {case}", flush=True)
    print(f"{len(failures)} of {number} networks are wrong, {time.time() - began:.0f} s")
    return failures


if __name__ == "__main__":
    warnings.simplefilter("error")
    jax.config.update("jax_enable_x64", True)
    survey(int(sys.argv[1]), int(sys.argv[2]))
