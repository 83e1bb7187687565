"""What `save` writes, `load` reads: the same curvature, without pickle, and whole or not at all."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
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


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_posterior_keeps_its_mean(dtype, tmp_path):
    mean = {**tree(matrices.normal(matrices.SPACE.size, seed=3))}
    mean = jax.tree.map(lambda x: x.astype(dtype), mean)
    posterior = laplax_kfac.make_posterior(every_kind(), 0.5, params=mean)
    laplax_kfac.save(tmp_path / "file", posterior)
    found = laplax_kfac.load(tmp_path / "file")
    assert found.mean.keys() == mean.keys()
    for got, want in zip(jax.tree.leaves(found.mean), jax.tree.leaves(mean), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(found.penalty(mean), 0.0)
    broken = jax.tree.map(lambda x: x * jnp.nan, mean)
    posterior = laplax_kfac.make_posterior(every_kind(), 0.5, params=broken)
    with pytest.raises(ValueError, match=r"the mean of .* is not finite; nonfinite='keep'"):
        laplax_kfac.save(tmp_path / "file", posterior)
    laplax_kfac.save(tmp_path / "file", posterior, nonfinite="keep")
    assert np.isnan(jax.tree.leaves(laplax_kfac.load(tmp_path / "file").mean)[0]).all()


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


# -- numbers and states ------------------------------------------------------------------------


def fit(name, params, **options):
    model_fn, _, inputs, _ = models.by_name(name).make()
    inputs = jax.tree.map(jnp.asarray, inputs)
    data = inputs, np.arange(len(jax.tree.leaves(inputs)[0])) % 3
    return laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy", **options)


def cast(params, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


@pytest.mark.parametrize("at_save", [True, False])
@pytest.mark.parametrize("at_load", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, float], ids=["bfloat16", "float"])
def test_what_was_saved_merges_with_a_fresh_fit(at_save, at_load, dtype, tmp_path):
    """Whether x64 was on where it was saved, and is where it is loaded."""
    params = jax.tree.map(np.asarray, models.by_name("mlp").make()[1])
    with jax.enable_x64(at_save):
        saved = fit("mlp", cast(params, dtype))
        laplax_kfac.save(tmp_path / "file", saved)
        trace = float(saved.trace())
    with jax.enable_x64(at_load):
        loaded = laplax_kfac.load(tmp_path / "file")
        kept = cast(params, dtype) if at_load <= at_save else cast(params, jnp.float32)
        if dtype is jnp.bfloat16:
            kept = cast(params, dtype)
        fresh = fit("mlp", kept)
        both = laplax_kfac.merge(loaded, fresh)
        expected = trace + float(fresh.trace())
        np.testing.assert_allclose(both.trace(), expected, rtol=1e-3)
        again = laplax_kfac.load(tmp_path / "file", kept)
        np.testing.assert_allclose(again.trace(), trace, rtol=1e-6)


def test_arrays_in_bfloat16_come_back(tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), every_kind())
    laplax_kfac.save(tmp_path / "file", half)
    assert_same(laplax_kfac.load(tmp_path / "file"), half)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_unless_kept(value, tmp_path):
    curvature = every_kind().map(lambda x: x.at[..., 0].set(value))
    with pytest.raises(ValueError, match=r"`x` cannot be saved: eigenvalues of the layer '.*' are"):
        laplax_kfac.save(tmp_path / "file", curvature)
    assert list(tmp_path.iterdir()) == []
    laplax_kfac.save(tmp_path / "file", curvature, nonfinite="keep")
    assert_same(laplax_kfac.load(tmp_path / "file"), curvature)
    with pytest.raises(ValueError, match="`nonfinite` must be one of 'error', 'keep'"):
        laplax_kfac.save(tmp_path / "file", curvature, nonfinite="drop")


def test_negative_eigenvalues_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`x` cannot be saved: .* are negative"):
        laplax_kfac.save(tmp_path / "file", every_kind().map(lambda x: -x), nonfinite="keep")


def test_posteriors_of_frozen_parameters_have_infinite_precision(tmp_path):
    model_fn, params, inputs, _ = models.by_name("mlp").make()
    curvature = laplax_kfac.kfac(
        model_fn, params, (inputs, np.arange(3)), loss_fn="cross_entropy", params_filter="lin1/*"
    )
    posterior = laplax_kfac.make_posterior(curvature, 1.0)
    assert not all(jnp.isfinite(x).all() for x in jax.tree.leaves(posterior))
    laplax_kfac.save(tmp_path / "file", posterior)
    assert_same(laplax_kfac.load(tmp_path / "file"), posterior)


STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "kronecker": ("mlp", {}),
    "a stack": ("scan_over_layers", {}),
    "scattered ids": ("rows_in_another_order", {}),
    "a diagonal side": ("embedding", {}),
    "unused leaves": ("leaves_that_do_not_count", {}),
    "blocks of features": ("mlp", {"factor_kinds": "blocked:2"}),
    "identity": ("mlp", {"fisher_type": "forward_only"}),
    "dense blocks": ("mlp", {"curvature": "block"}),
    "diagonal blocks": ("mlp", {"curvature": "diagonal"}),
    "frozen": ("mlp", {"params_filter": "lin2/*"}),
    "used twice": ("tied", {}),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_comes_back_and_goes_on(case, tmp_path):
    name, options = STATES[case]
    model_fn, params, inputs, _ = models.by_name(name).make()
    accumulate = laplax_kfac.accumulator(model_fn, params, loss_fn="mse", **options)
    outputs = jax.vmap(lambda x: model_fn(input=x, params=params))(inputs)
    batch = inputs, jax.tree.map(jnp.zeros_like, outputs)
    state = accumulate.update(accumulate.init(), batch)
    laplax_kfac.save(tmp_path / "file", state)
    found = laplax_kfac.load(tmp_path / "file")
    assert_same(found, state)
    assert_same(accumulate.finalize(found), accumulate.finalize(state))
    assert_same(accumulate.update(found, batch), accumulate.update(state, batch))
    assert_same(accumulate.merge(found, state), accumulate.merge(state, state))


def test_a_state_before_any_data_comes_back(tmp_path):
    model_fn, params, *_ = models.by_name("mlp").make()
    empty = laplax_kfac.accumulator(model_fn, params, loss_fn="mse").init()
    laplax_kfac.save(tmp_path / "file", empty)
    assert_same(laplax_kfac.load(tmp_path / "file"), empty)


def test_a_state_that_is_not_finite_is_refused(tmp_path):
    model_fn, params, inputs, _ = models.by_name("mlp").make()
    accumulate = laplax_kfac.accumulator(model_fn, params, loss_fn="mse")
    state = accumulate.update(accumulate.init(), (inputs, jnp.zeros((3, 3))))
    broken = replace(state, sums=jax.tree.map(lambda x: x * jnp.nan, state.sums))
    with pytest.raises(ValueError, match=r"sums of the layer 'lin1' are not finite; nonfinite="):
        laplax_kfac.save(tmp_path / "file", broken)
    laplax_kfac.save(tmp_path / "file", broken, nonfinite="keep")
    assert_same(laplax_kfac.load(tmp_path / "file"), broken)


def test_a_traced_curvature_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`x` is traced: call `save` outside of jit"):
        jax.jit(lambda x: laplax_kfac.save(tmp_path / "file", x))(every_kind())


# -- files -------------------------------------------------------------------------------------


def fail_halfway(error):
    def write_array(entry, *_: Any, **__: Any):
        entry.write(b"half of a file")
        raise error

    return write_array


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=type)
def test_a_failing_save_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    path = tmp_path / "file"
    laplax_kfac.save(path, every_kind())
    before = path.read_bytes()
    monkeypatch.setattr("numpy.lib.format.write_array", fail_halfway(error))
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
    assert json.loads(str(entries["header"]))["format"] == 3


# -- errors ------------------------------------------------------------------------------------


def of_older_format(path, change, number):
    """Write a file as older versions did, without checksums."""
    with np.load(path, allow_pickle=False) as file:
        entries = {name: file[name] for name in file.files}
    header = json.loads(str(entries.pop("header")))
    for name in ("entries", "nonfinite"):
        header.pop(name)
    entries.pop("checksum")
    change(header, entries)
    with path.open("wb") as file:
        np.savez(file, header=np.asarray(json.dumps(header | {"format": number})), **entries)


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "file"
    laplax_kfac.save(path, every_kind())
    of_older_format(path, lambda *_: None, 2)
    assert_same(laplax_kfac.load(path), every_kind())
    laplax_kfac.save(path, every_kind())
    of_older_format(path, lambda *_: None, 4)
    with pytest.raises(ValueError, match="has format 4; this version reads 3"):
        laplax_kfac.load(path)


@pytest.mark.parametrize("case", ["a stack", "a diagonal side", "scattered ids"])
def test_files_of_the_first_format_are_read(case, tmp_path):
    """Sides were dense, with one array, or diagonal, with none."""
    curvature, path = PLAIN[case]()[1], tmp_path / "file"
    laplax_kfac.save(path, curvature)

    def as_was(header, entries):
        header["axes"] = [len(sides) for sides in header.pop("sides")]
        for layer in header["layers"]:
            layer["diagonal"] = [text == "diagonal" for text in layer.pop("sides")]
        for name in list(entries):
            entries[name.removesuffix("/0")] = entries.pop(name)

    of_older_format(path, as_was, 1)
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
