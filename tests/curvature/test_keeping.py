"""A fit that was killed goes on where it was, and ends with the same bits.

``LAPLAX_KFAC_KILLS=20`` kills as many processes; two by default.
"""

import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laplax_kfac
from laplax_kfac.factors import to_blocks

BLOCKS = to_blocks._blocks
KILLS = int(os.environ.get("LAPLAX_KFAC_KILLS", "2"))
RNG = np.random.default_rng(0)
DATA = [
    (RNG.normal(size=(n, 3)).astype("f4"), RNG.integers(0, 4, n)) for n in (6, 6, 6, 6, 6, 5, 6)
]
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32),
    "shift": jnp.ones(5),
    "out": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
}


def model_fn(input, params):
    return jnp.tanh(input @ params["in"]) * params["shift"] @ params["out"]


class KilledError(Exception):
    """Stands for the end of the process."""


class Loader:
    """Batches; ends with an error after so many reads, over all passes."""

    def __init__(self, reads: int = 10**6) -> None:
        self.left = reads

    def __iter__(self):
        for batch in DATA:
            if not self.left:
                raise KilledError
            self.left -= 1
            yield batch


FITS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "ekfac": {"eigenvalue_correction": True},
    "kfoc": {"optimal_factors": True, "iterations": 2},
    "both": {"optimal_factors": True, "iterations": 1, "eigenvalue_correction": True},
    "mc": {"fisher_type": "mc", "mc_samples": 2, "eigenvalue_correction": True},
    "blocks": {"curvature": "block"},
    "other kinds": {"factor_kinds": "blocked:2"},
    "smaller parts": {"batch_size": 4, "eigenvalue_correction": True},
}


def fit(data, **options):
    options = {"loss_fn": "cross_entropy"} | options
    return laplax_kfac.kfac(model_fn, PARAMS, data, **options)


def assert_same_bits(found, expected):
    structure: Any = jax.tree.structure(found)
    assert structure == jax.tree.structure(expected)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@functools.cache
def whole(name):
    return fit(Loader(), **FITS[name])


@pytest.mark.filterwarnings("ignore:`kfoc` stopped")
@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("every", [1, 3])
def test_a_fit_goes_on_wherever_it_was_killed(name, every, tmp_path):
    keep = {"checkpoint": tmp_path / "kept", "checkpoint_every": every}
    for reads in itertools.count(1, 2):
        (tmp_path / "kept").unlink(missing_ok=True)
        try:
            found = fit(Loader(reads), **keep, **FITS[name])
        except KilledError:
            found = fit(Loader(), **keep, **FITS[name])
        else:
            assert reads >= len(DATA)
            assert_same_bits(found, whole(name))
            break
        assert_same_bits(found, whole(name))
    # A fit that had ended ends at once, in the same bits.
    assert_same_bits(fit(Loader(), **keep, **FITS[name]), whole(name))


@pytest.mark.filterwarnings("ignore:`kfoc` stopped")
def test_a_fit_that_is_killed_again_and_again_ends(tmp_path):
    keep = {"checkpoint": tmp_path / "kept", "checkpoint_every": 1} | FITS["both"]
    kills, found = 0, None
    while found is None:
        try:
            found = fit(Loader(len(DATA) + 2), **keep)
        except KilledError:
            kills += 1
    assert kills == 3
    assert_same_bits(found, whole("both"))


def from_the_file(statistics, _):
    """Nothing is decomposed: eigenvectors come from the file, and only their shapes are asked."""
    assert all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(statistics))
    return BLOCKS(statistics, _)


def test_what_was_seen_is_not_worked_on_again(tmp_path, monkeypatch):
    keep = {"checkpoint": tmp_path / "kept", "checkpoint_every": 2, "eigenvalue_correction": True}
    with pytest.raises(KilledError):
        fit(Loader(2 * len(DATA) - 1), **keep)
    numbers = []
    of = laplax_kfac.Accumulator._pass

    def counted(self, batch, weights, number):
        numbers.append(int(number))
        return of(self, batch, weights, number)

    monkeypatch.setattr(laplax_kfac.Accumulator, "_pass", counted)
    monkeypatch.setattr("laplax_kfac.factors.to_blocks._blocks", from_the_file)
    fit(Loader(), **keep)
    assert sorted({*numbers}) == [0, 6]  # the first for its shape


def test_images_of_several_sizes_go_on(tmp_path):
    """Sums of wide matrices change their form when another size comes."""
    params = {"filter": jnp.asarray(RNG.normal(size=(3, 3, 1, 4)), jnp.float32)}

    def images(input, params):
        found = jax.lax.conv_general_dilated(
            input[None], params["filter"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.mean(found, axis=(0, 1, 2))

    data = [
        (RNG.normal(size=(2, n, n, 1)).astype("f4"), np.zeros((2, 4), "f4"))
        for n in (8, 8, 6, 8, 6)
    ]

    def of(data, **keep):
        return laplax_kfac.ekfac(images, params, data, loss_fn="mse", **keep)

    def killed(reads):
        yield from data[:reads]
        raise KilledError

    expected = of(data)
    for reads in range(1, len(data)):
        kept = tmp_path / f"kept{reads}"
        with pytest.raises(KilledError):
            laplax_kfac.kfac(
                images, params, killed(reads), loss_fn="mse", checkpoint=kept, checkpoint_every=1
            )
        found = laplax_kfac.kfac(
            images, params, iter(data), loss_fn="mse", checkpoint=kept, checkpoint_every=1
        )
        moments = laplax_kfac.accumulator(images, params, loss_fn="mse").correct(
            found, [(dict(zip(("input", "target"), b, strict=True)), jnp.ones(2)) for b in data]
        )
        assert_same_bits(moments, expected)


# -- what is refused ---------------------------------------------------------------------------


@functools.cache
def half_done(folder: Path) -> Path:
    with pytest.raises(KilledError):
        fit(Loader(5), checkpoint=folder / "kept", checkpoint_every=2, **FITS["ekfac"])
    return folder / "kept"


@pytest.fixture
def kept(tmp_path_factory, tmp_path):
    """The checkpoint of a fit that was killed after four batches; everyone gets a copy."""
    folder = tmp_path_factory.getbasetemp() / "half_done"
    folder.mkdir(exist_ok=True)
    shutil.copy(half_done(folder), tmp_path / "kept")
    return tmp_path / "kept"


def resumed(kept, data=DATA, model=model_fn, params=PARAMS, **options):
    options = FITS["ekfac"] | {"loss_fn": "cross_entropy"} | options
    return laplax_kfac.kfac(model, params, data, checkpoint=kept, checkpoint_every=2, **options)


def in_another_order():
    first, *rest = DATA
    return [first, *rest[::-1]]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "model": (
        {"model": lambda input, params: model_fn(2.0 * input, params)},
        "another fit, which differs in the model. Remove",
    ),
    "constants": (
        {"model": lambda input, params: model_fn(input, params) + np.ones(4, "f4")},
        "differs in the model, arrays that the model closes over",
    ),
    "parameters": (
        {"params": jax.tree.map(lambda x: x * (1 + 1e-6), PARAMS)},
        "differs in the parameters. Remove the file to begin anew",
    ),
    "loss": ({"loss_fn": lambda f, y: jnp.sum(jnp.cosh(f - y))}, "differs in the loss"),
    "fisher": ({"fisher_type": "empirical"}, "the options"),
    "key": ({"key": jax.random.key(1)}, "differs in the random key"),
    "correction": ({"eigenvalue_correction": False}, "differs in the options"),
    "selection": ({"params_filter": "in*"}, "the options"),
    "batch size": ({"batch_size": 2}, "the options, the first batch"),
    "another first batch": ({"data": DATA[::-1]}, "differs in the first batch"),
    "another order": ({"data": in_another_order()}, "another batch in the place of number 4"),
    "fewer batches": ({"data": DATA[:3]}, "`data` had 3 batches, but `checkpoint` .* after 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_checkpoint_of_another_fit_is_refused(case, kept):
    changes, text = OTHERS[case]
    before = kept.read_bytes()
    with pytest.raises(ValueError, match=text):
        resumed(kept, **changes)
    assert kept.read_bytes() == before
    assert_same_bits(resumed(kept), whole("ekfac"))


def test_passes_of_other_numbers_of_examples_are_refused(tmp_path):
    keep = {"checkpoint": tmp_path / "kept", "checkpoint_every": 2, "eigenvalue_correction": True}
    with pytest.raises(KilledError):
        fit(Loader(len(DATA) + 3), **keep)
    with pytest.raises(ValueError, match="41 examples in the first pass and 35 in pass 2"):
        fit(DATA[:-1], **keep)


def test_files_that_are_no_checkpoints_are_refused_and_stay(tmp_path):
    path = tmp_path / "file"
    path.write_text("a text")
    with pytest.raises(ValueError, match=r"`checkpoint` .* was not written by laplax_kfac\.save"):
        fit(DATA, checkpoint=path)
    assert path.read_text() == "a text"
    laplax_kfac.save(path, whole("kfac"))
    with pytest.raises(ValueError, match=r"`checkpoint` .* holds a Curvature, no half of a fit"):
        fit(DATA, checkpoint=path)
    assert_same_bits(laplax_kfac.load(path), whole("kfac"))


def test_a_damaged_checkpoint_is_refused(kept):
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 4
    kept.write_bytes(data)
    with pytest.raises(ValueError, match=r"`checkpoint` \(.*kept\) is damaged"):
        resumed(kept)


def test_a_checkpoint_is_no_curvature(kept):
    with pytest.raises(ValueError, match="is the checkpoint of a fit"):
        laplax_kfac.load(kept)


@pytest.mark.parametrize(
    ("keep", "error", "text"),
    [
        ({"checkpoint_every": 3}, ValueError, "`checkpoint_every` needs `checkpoint`"),
        ({"checkpoint": 3}, TypeError, "`checkpoint` must be the path of a file"),
        ({"checkpoint": "/missing/folder/file"}, FileNotFoundError, "there is no folder"),
        ({"checkpoint": "."}, ValueError, "is a folder, no regular file"),
        ({"checkpoint": "x", "checkpoint_every": 0}, ValueError, "`checkpoint_every` must be a"),
    ],
    ids=["alone", "no path", "no folder", "a folder", "zero"],
)
def test_arguments_are_checked_before_any_data_are_read(keep, error, text):
    with pytest.raises(error, match=text):
        fit(Loader(0), **keep)


def test_a_checkpoint_needs_values(tmp_path):
    def trace(x):
        return fit((x, DATA[0][1]), checkpoint=tmp_path / "kept").trace()

    with pytest.raises(ValueError, match="`checkpoint` needs values: call `kfac` outside of jit"):
        jax.jit(trace)(DATA[0][0])


# -- processes ---------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, threading, time
import numpy as np
import laplax_kfac
from laplax_kfac.curvature import keeping
sys.path.insert(0, {folder!r})
import test_keeping as here
kept, result, delay = sys.argv[1], sys.argv[2], float(sys.argv[3])
class Slow:
    def __iter__(self):
        for batch in here.DATA:
            time.sleep(0.01)
            yield batch
fit = lambda: here.fit(Slow(), checkpoint=kept, checkpoint_every=1, **here.FITS["both"])
if delay:
    threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
begin = time.time()
found = fit()
laplax_kfac.save(result, found)
print(time.time() - begin, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_processes_that_are_killed_end_in_the_same_bits(tmp_path):
    """At any moment: while batches are worked on, or while the file is written."""
    kept, result = tmp_path / "kept", tmp_path / "result"
    code = CHILD.format(folder=str(Path(__file__).parent))

    def run(delay: float) -> str:
        command = [sys.executable, "-W", "ignore", "-c", code, kept, result, str(delay)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        return done.stdout

    seconds = float(run(0.0))
    expected = laplax_kfac.load(result)
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        kept.unlink(missing_ok=True)
        result.unlink()
        while not run(rng.uniform(0.1, 0.9) * seconds):
            kills += 1
        assert_same_bits(laplax_kfac.load(result), expected)
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]
