"""Files that were damaged, or made by hand: an error that names the file, or the same numbers.

``LAPLAX_KFAC_CORRUPTIONS=10000`` draws as many; a few hundred by default.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models
from support.corruptions import CORRUPTIONS, corrupted, forged
from support.matrices import matrix

import laplax_kfac
from laplax_kfac.curvature.curvature import Curvature

pytestmark = pytest.mark.usefixtures("x64")
NUMBER = int(os.environ.get("LAPLAX_KFAC_CORRUPTIONS", "500"))


def of_every_kind():
    whole = matrix()
    return Curvature(whole.blocks, whole.layers, whole.space)


@functools.cache
def state():
    model_fn, params, inputs, _ = models.by_name("mlp").make()
    accumulate = laplax_kfac.accumulator(model_fn, params, loss_fn="cross_entropy")
    return accumulate.update(accumulate.init(), (inputs, np.arange(len(inputs)) % 3))


def posterior_of_an_mlp():
    _, params, _, _ = models.by_name("mlp").make()
    acc = laplax_kfac.accumulator(models.by_name("mlp").make()[0], params, loss_fn="cross_entropy")
    return laplax_kfac.make_posterior(acc.finalize(state()), 0.5, params=params)


SAVED: dict[str, Callable[[], Any]] = {
    "curvature": of_every_kind,
    "posterior": lambda: laplax_kfac.make_posterior(of_every_kind(), 0.5),
    "posterior with its mean": posterior_of_an_mlp,
    "state": state,
}


def outcome(path):
    """What is in a file, or the error that says why it cannot be read."""
    try:
        return laplax_kfac.load(path)
    except Exception as error:
        return error


@pytest.mark.parametrize("case", SAVED)
def test_a_damaged_file_is_refused_or_loads_the_same(case, tmp_path):
    saved, path = SAVED[case](), tmp_path / "file"
    laplax_kfac.save(path, saved)
    data = path.read_bytes()
    treedef: Any = jax.tree.structure(saved)
    expected = [np.asarray(x) for x in jax.tree.leaves(saved)]
    refused = dict.fromkeys([c.__name__ for c in CORRUPTIONS], 0)
    for seed in range(NUMBER // len(SAVED)):
        what, changed = corrupted(data, seed)
        path.write_bytes(changed)
        found = outcome(path)
        if isinstance(found, Exception):
            assert type(found) is ValueError, (what, seed)
            assert str(path) in str(found), (what, seed)
            refused[what] += 1
            continue
        assert jax.tree.structure(found) == treedef, (what, seed)
        for got, want in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    assert min(refused.values()) > 0  # else it would not tell


def in_layer(k, **changes):
    return lambda header, _: header["layers"][k].update(changes)


def in_segment(**changes):
    return lambda header, _: header["layers"][0]["segments"][0].update(changes)


def in_space(**changes):
    return lambda header, _: header["space"].update(changes)


def array(name, change):
    return lambda _, arrays: arrays.update({name: change(np.array(arrays[name]))})


def without(name):
    return lambda _, arrays: arrays.pop(name)


def header(**changes):
    return lambda header, _: header.update(changes)


def with_first(value):
    def change(x):
        x.flat[0] = value
        return x

    return change


def strange(_, arrays):
    arrays["block9/eigenvalues"] = np.ones(3)


def twice(header, _):
    header["layers"][1]["segments"] = header["layers"][0]["segments"]


VALUES = "block0/eigenvalues"
FORGERIES = {
    "no eigenvalues": (without(VALUES), "array 'block0/eigenvalues' is missing"),
    "no basis": (without("block0/basis0/0"), "'block0/basis0/0' is missing"),
    "no ids": (without("layer2/ids0"), "is missing"),
    "a stranger": (strange, r"knows nothing of the arrays \['block9"),
    "eigenvalues of another shape": (array(VALUES, np.ravel), "has shape"),
    "more eigenvalues": (array(VALUES, lambda x: np.concatenate([x, x])), "has shape"),
    "a basis of another shape": (array("block0/basis0/0", lambda x: x[:-1]), "has shape"),
    "integers": (array(VALUES, lambda x: x.astype(int)), "and dtype int64"),
    "complex": (array(VALUES, lambda x: x * 1j), "and dtype complex128"),
    "NaN": (array(VALUES, with_first(np.nan)), "are not finite"),
    "infinity": (array(VALUES, with_first(np.inf)), "are not finite"),
    "NaN in a basis": (array("block0/basis0/0", with_first(np.nan)), "are not finite"),
    "negative": (array(VALUES, with_first(-1.0)), "are negative"),
    "a strange kind": (header(kind="Evil"), "said to hold 'Evil'"),
    "no kind": (lambda header, _: header.pop("kind"), "kind"),
    "no layers": (lambda header, _: header.pop("layers"), "layers"),
    "fewer layers": (lambda header, _: header["layers"].pop(), "blocks for"),
    "fewer blocks": (lambda header, _: header["sides"].pop(), "blocks for"),
    "one side of two": (lambda header, _: header["sides"][0].pop(), "has the sides"),
    "another side": (lambda header, _: header["sides"][0].__setitem__(0, "diagonal"), "knows not"),
    "a strange side": (lambda header, _: header["sides"][0].__setitem__(0, "odd"), "no kind of"),
    "blocks of nothing": (
        lambda header, _: header["sides"][0].__setitem__(0, "blocked:0"),
        "no kind of",
    ),
    "a layer of other sides": (in_layer(0, sides=["dense", "odd"]), "no kind of"),
    "a layer of a strange block": (in_layer(0, block="odd"), "has the block 'odd'"),
    "a layer of another size": (in_layer(0, out_features=99), "ids for"),
    "a layer of negative size": (in_layer(0, in_features=-2), "sizes of layer"),
    "a layer of half a size": (in_layer(0, in_features=2.5), "sizes of layer|ids for"),
    "a layer without a name": (in_layer(0, name=3), "has the name 3"),
    "a layer with more": (in_layer(0, colour="red"), "has the entries"),
    "ids outside": (in_segment(start=10**6), "holds the ids"),
    "negative ids": (in_segment(start=-1), "ids of a segment"),
    "ids of another size": (in_segment(sizes=[1, 1]), "segment"),
    "many ids": (in_segment(sizes=[10**9, 10**9, 10**9]), "sizes of a segment"),
    "axes twice": (in_segment(permutation=[0, 0]), "has axes"),
    "scattered ids outside": (array("layer2/ids0", with_first(10**6)), "outside 0 to"),
    "ids twice": (twice, "same parameters|ids for|has rows"),
    "other names": (in_space(names=["a"]), "different numbers"),
    "other paths": (in_space(paths=["a"] * 8), "leaves of other names"),
    "a strange dtype": (in_space(dtypes=["odd"] * 8), "odd"),
    "another tree": (in_space(tree={"list": [0, 1]}), "other leaves"),
    "a strange tree": (in_space(tree={"code": []}), "code"),
    "a huge parameter": (in_space(shapes=[[10**12, 10**12]] * 8), "shape of a parameter"),
    "a negative parameter": (in_space(shapes=[[-1]] * 8), "shape of a parameter"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_file_that_contradicts_itself_is_refused(case, tmp_path):
    change, text = FORGERIES[case]
    path = tmp_path / "file"
    laplax_kfac.save(path, of_every_kind())
    forged(path, change)
    with pytest.raises(ValueError, match=rf"`path` \(.*file\) is damaged.*({text})"):
        laplax_kfac.load(path)


STATE_FORGERIES = {
    "no sums": (without("sums0/0"), "'sums0/0' is missing"),
    "sums of another shape": (array("sums0/0", lambda x: x[..., :-1]), "has shape"),
    "NaN": (array("sums0/0", with_first(np.nan)), "are not finite"),
    "no count": (without("state/num_updates"), "'state/num_updates' is missing"),
    "uses of another number": (header(uses=[7, 1]), "has shape"),
    "fewer uses": (header(uses=[1]), "sums for 1 of"),
    "uses that are no numbers": (header(uses=["one", 1]), "numbers of uses"),
}


@pytest.mark.parametrize("case", STATE_FORGERIES)
def test_a_state_that_contradicts_itself_is_refused(case, tmp_path):
    change, text = STATE_FORGERIES[case]
    path = tmp_path / "file"
    laplax_kfac.save(path, state())
    forged(path, change)
    with pytest.raises(ValueError, match=rf"`path` \(.*file\) is damaged.*({text})"):
        laplax_kfac.load(path)


def test_nothing_changed_loads(tmp_path):
    # Otherwise the forgeries would not tell.
    laplax_kfac.save(tmp_path / "file", of_every_kind())
    found = laplax_kfac.load(forged(tmp_path / "file", lambda *_: None))
    np.testing.assert_array_equal(found.to_dense(), of_every_kind().to_dense())
    assert jnp.isfinite(found.trace())
