"""What `save` writes, `load` reads: the same curvature, without pickle, and whole or not at all."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import matrices, models
from support.matrices import basis_of, matrix, tree
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.blocks.blocks import Block
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.parsing.segments import Scattered
from laplax_kfac.posterior.posterior import Posterior

pytestmark = pytest.mark.usefixtures("x64")


def structure(x) -> Any:
    return jax.tree.structure(x)


def assert_same(found, expected):
    """The same type, the same structure with all that is static, and the same arrays."""
    assert type(found) is type(expected)
    assert structure(found) == structure(expected)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def every_kind() -> Curvature:
    """Kronecker, stacked, fused, joint, dense on scattered ids, diagonal, and none."""
    whole = matrix()
    return Curvature(whole.blocks, whole.layers, whole.space)


def orthogonal(rng, *shape):
    return jnp.asarray(np.linalg.qr(rng.normal(size=(*shape, shape[-1])))[0])


def curvature_of(model_fn, params, one_input) -> Curvature:
    """Blocks of random numbers, for the layers of a model."""
    rng = np.random.default_rng(0)
    layers = tuple(laplax_kfac.find_layers(model_fn, params, one_input))
    blocks = []
    for layer in layers:
        sides = tuple(
            kind.promote(basis_of(orthogonal(rng, *layer.shape[:-2], n)), n)
            for kind, n in zip(layer.kinds, layer.shape[-2:], strict=True)
        )
        blocks.append(Block(sides, jnp.asarray(np.abs(rng.normal(size=layer.shape)))))
    return Curvature(tuple(blocks), layers, ParameterSpace.of(params))


@functools.cache
def of_model(name):
    model_fn, params, inputs, _ = models.by_name(name).make()
    return params, curvature_of(model_fn, params, jax.tree.map(lambda x: x[0], inputs))


def nested():
    params: Any = {"a": [jnp.ones((3, 2)), (jnp.ones(2), None)], "b": {}, "c": (), "d": None}

    def model_fn(input, params):
        weight, (bias, _) = params["a"]
        return input @ weight + bias

    return params, curvature_of(model_fn, params, np.ones(3))


PLAIN: dict[str, Callable[[], tuple[Any, Curvature]]] = {
    "a dict": functools.partial(of_model, "mlp"),
    "a list": functools.partial(of_model, "mlp_without_bias"),
    "one array": functools.partial(of_model, "flat_vector"),
    "lists, tuples, None": nested,
    "a stack": functools.partial(of_model, "scan_over_layers"),
    "scattered ids": functools.partial(of_model, "rows_in_another_order"),
    "a diagonal side": functools.partial(of_model, "embedding"),
    "unused leaves": functools.partial(of_model, "leaves_that_do_not_count"),
}
SPECIAL: dict[str, Callable[[], tuple[Any, Curvature]]] = {
    "nnx": functools.partial(of_model, "nnx_mlp"),
    "equinox": functools.partial(of_model, "equinox_mlp"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_trees_of_dicts_lists_and_tuples_come_back_by_themselves(case, tmp_path):
    params, curvature = PLAIN[case]()
    laplax_kfac.save(tmp_path / "curvature", curvature)
    found = laplax_kfac.load(tmp_path / "curvature")
    assert_same(found, curvature)
    assert found.layers == curvature.layers
    assert found.space.paths == curvature.space.paths
    assert found.space.names == curvature.space.names
    assert structure(found.mv(params)) == structure(params)
    assert_same(laplax_kfac.load(tmp_path / "curvature", params), curvature)


def test_the_cases_have_scattered_and_contiguous_ids_and_diagonal_sides():
    # Otherwise the round trips would not tell.
    def places(curvature):
        return [isinstance(s.place, Scattered) for ly in curvature.layers for s in ly.segments]

    assert any(places(PLAIN["scattered ids"]()[1]))
    assert any(places(every_kind()))
    assert not all(places(every_kind()))
    kinds = {b.sides[0].kind.text for b in PLAIN["a diagonal side"]()[1].blocks}
    assert kinds == {"diagonal", "dense"}
    assert max(layer.stack for layer in PLAIN["a stack"]()[1].layers) == 3


@pytest.mark.parametrize("case", SPECIAL)
def test_other_containers_need_the_parameters(case, tmp_path):
    params, curvature = SPECIAL[case]()
    path = str(tmp_path / "curvature.npz")  # a string will do, too
    laplax_kfac.save(path, curvature)
    with pytest.raises(ValueError, match=r"`params` is needed .* Call load\(path, params\)"):
        laplax_kfac.load(path)
    found = laplax_kfac.load(path, params)
    assert_same(found, curvature)
    product = found.mv(params)
    assert structure(product) == structure(params)
    for got, want in zip(*map(jax.tree.leaves, (product, curvature.mv(params))), strict=True):
        np.testing.assert_array_equal(got, want)
    # Shapes are enough.
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert_same(laplax_kfac.load(path, abstract), curvature)


def test_every_kind_of_block_comes_back(tmp_path):
    laplax_kfac.save(tmp_path / "file", every_kind())
    found = laplax_kfac.load(tmp_path / "file")
    assert_same(found, every_kind())
    dense = jax.jit(Curvature.to_dense)(found)
    np.testing.assert_allclose(dense, matrices.dense_matrix(), **tolerance(jnp.float64))


def test_a_posterior_comes_back(tmp_path):
    posterior = laplax_kfac.make_posterior(every_kind(), 0.5)
    laplax_kfac.save(tmp_path / "file", posterior)
    found = laplax_kfac.load(tmp_path / "file")
    assert isinstance(found, Posterior)
    v = tree(matrices.normal(matrices.SPACE.size))
    for got, want in zip(
        *(jax.tree.leaves(p.covariance_mv(v)) for p in (found, posterior)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(found.log_determinant(), posterior.log_determinant())


@pytest.mark.parametrize("correction", [False, True], ids=["kfac", "ekfac"])
def test_a_fit_comes_back(correction, tmp_path):
    model_fn, params, inputs, _ = models.by_name("mlp").make()
    curvature = laplax_kfac.kfac(
        model_fn, params, (inputs, np.arange(3)), loss_fn="cross_entropy",
        fisher_type="empirical", eigenvalue_correction=correction,
    )  # fmt: skip
    assert curvature.degree == 2
    laplax_kfac.save(tmp_path / "file", curvature)
    assert_same(laplax_kfac.load(tmp_path / "file"), curvature)


@pytest.mark.parametrize("x", [True, False], ids=["float64", "float32"])
def test_dtypes_come_back(x, tmp_path):
    with jax.enable_x64(x):
        params = {"w": jnp.ones((3, 2), jnp.bfloat16), "v": jnp.ones(2)}
        curvature = curvature_of(
            lambda input, params: input @ params["w"] + params["v"],
            params,
            jnp.ones(3),
        )
        laplax_kfac.save(tmp_path / "file", curvature)
        found = laplax_kfac.load(tmp_path / "file")
        assert_same(found, curvature)
        assert found.space.dtypes == (jnp.ones(()).dtype, jnp.bfloat16)
        assert found.mv(params)["w"].dtype == jnp.bfloat16


def test_a_loaded_curvature_is_the_same_under_jit(tmp_path):
    laplax_kfac.save(tmp_path / "file", every_kind())
    traced = []

    @jax.jit
    def product(curvature, v):
        traced.append(curvature)
        return curvature.mv(v)

    v = tree(matrices.normal(matrices.SPACE.size))
    expected = product(every_kind(), v)
    found = product(laplax_kfac.load(tmp_path / "file"), v)
    for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(traced) == 1  # one compilation serves both


# -- files -------------------------------------------------------------------------------------


def fail_halfway(error):
    def savez(file, **_: Any):
        file.write(b"half of a file")
        file.flush()
        raise error

    return savez


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=type)
def test_a_failing_save_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    laplax_kfac.save(path, every_kind())
    before = path.read_bytes()
    monkeypatch.setattr("laplax_kfac.checkpoint.np.savez", fail_halfway(error))
    for target in (path, tmp_path / "new"):
        with pytest.raises(type(error)):
            laplax_kfac.save(target, every_kind())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == before
    assert_same(laplax_kfac.load(path), every_kind())


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("an older file")
    laplax_kfac.save(path, every_kind())
    assert_same(laplax_kfac.load(path), every_kind())
    _, other = PLAIN["a dict"]()
    laplax_kfac.save(path, other)
    assert_same(laplax_kfac.load(path), other)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_the_file_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    laplax_kfac.save(tmp_path / "file", every_kind())
    modes = {p.name: p.stat().st_mode for p in tmp_path.iterdir()}
    assert modes["file"] == modes["other"]


def test_nothing_is_pickled(tmp_path):
    laplax_kfac.save(tmp_path / "file", every_kind())
    with np.load(tmp_path / "file", allow_pickle=False) as file:
        entries = {name: file[name] for name in file.files}
    assert all(value.dtype.kind in "fiU" for value in entries.values())
    eigenvalues = [name for name in entries if name.endswith("/eigenvalues")]
    assert len(eigenvalues) == len(matrices.LAYERS)
    assert json.loads(str(entries["header"]))["format"] == 2


# -- errors ------------------------------------------------------------------------------------


def rewrite_header(path, **changes):
    with np.load(path, allow_pickle=False) as file:
        entries = {name: file[name] for name in file.files}
    header = json.loads(str(entries.pop("header"))) | changes
    with path.open("wb") as file:
        np.savez(file, header=np.asarray(json.dumps(header)), **entries)


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "file"
    laplax_kfac.save(path, every_kind())
    rewrite_header(path)
    assert_same(laplax_kfac.load(path), every_kind())
    rewrite_header(path, format=3)
    with pytest.raises(ValueError, match="has format 3; this version reads 2"):
        laplax_kfac.load(path)


@pytest.mark.parametrize("case", ["a stack", "a diagonal side", "scattered ids"])
def test_files_of_the_first_format_are_read(case, tmp_path):
    """Sides were dense, with one array, or diagonal, with none."""
    curvature, path = PLAIN[case]()[1], tmp_path / "file"
    laplax_kfac.save(path, curvature)
    with np.load(path, allow_pickle=False) as file:
        entries = {name.removesuffix("/0"): file[name] for name in file.files}
    header = json.loads(str(entries.pop("header"))) | {"format": 1}
    header["axes"] = [len(sides) for sides in header.pop("sides")]
    for layer in header["layers"]:
        layer["diagonal"] = [text == "diagonal" for text in layer.pop("sides")]
    with path.open("wb") as file:
        np.savez(file, header=np.asarray(json.dumps(header)), **entries)
    assert_same(laplax_kfac.load(path), curvature)


def test_archives_of_something_else_are_refused(tmp_path):
    np.savez(tmp_path / "file.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match=r"file\.npz\) was not written by laplax_kfac.save"):
        laplax_kfac.load(tmp_path / "file.npz")


def write_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def write_half(path):
    laplax_kfac.save(path, every_kind())
    path.write_bytes(path.read_bytes()[:1000])


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("a text"),
    "nothing": lambda path: path.write_bytes(b""),
    "an array": write_array,
    "half of an archive": write_half,
}


@pytest.mark.parametrize("content", WRITERS)
def test_files_of_something_else_are_refused(content, tmp_path):
    WRITERS[content](tmp_path / "file")
    with pytest.raises(ValueError, match=r"file\) was not written by laplax_kfac.save"):
        laplax_kfac.load(tmp_path / "file")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        laplax_kfac.load(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"lin1": p["lin1"]},
        lambda p: p | {"lin2": p["lin2"] | {"b": np.zeros(4)}},
        lambda p: {"lin1": p["lin1"], "other": p["lin2"]},
    ],
    ids=["a leaf missing", "another shape", "another name"],
)
def test_other_parameters_are_refused(change, tmp_path):
    params, curvature = PLAIN["a dict"]()
    laplax_kfac.save(tmp_path / "file", curvature)
    with pytest.raises(ValueError, match=r"`params` has the leaves .*; the file has .* of shapes"):
        laplax_kfac.load(tmp_path / "file", change(params))


OTHERS: dict[str, Callable[[], Any]] = {
    "a tree": lambda: {"w": np.ones(3)},
    "nothing": lambda: None,
    "a matrix": matrix,  # it would come back as a curvature
    "a block": lambda: matrix().blocks[0],
}


@pytest.mark.parametrize("x", OTHERS)
def test_other_objects_are_refused(x, tmp_path):
    with pytest.raises(TypeError, match="`x` must be a Curvature or a Posterior, got"):
        laplax_kfac.save(tmp_path / "file", OTHERS[x]())
    assert list(tmp_path.iterdir()) == []
