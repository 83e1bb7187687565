"""Batches of data: accepted forms, splitting to one size, padding, errors."""

import functools
import itertools
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.matrices import normal

import laplax_kfac
from laplax_kfac.capture.batches import (
    as_batch,
    batch_size,
    batches,
    even_batches,
    first_example,
    pad,
    require_several_passes,
    same_number,
    to_arrays,
    weighted_batch,
)

X, Y = np.arange(12.0).reshape(6, 2), np.arange(6)
WEIGHTS = np.asarray([1, 0, 3, 2, 1, 2])


def weighted_by(weights, x=X, y=Y):
    """A batch whose examples count so many times."""
    return {"input": x, "target": y, "weight": weights}


class Tensor:
    """Like a torch tensor: no JAX array, but numpy can read it."""

    def __init__(self, values):
        self.values = values
        self.shape = values.shape

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype, copy=copy)


class TorchTensor:
    """Like a torch tensor with a gradient, or of a type that numpy has not: it refuses."""

    shape = (6, 2)

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


class TensorflowDataset:
    """Like a ``tf.data.Dataset``: hands out iterators over numpy batches."""

    def __init__(self, *found):
        self.found = found

    def __iter__(self):
        raise AssertionError

    def as_numpy_iterator(self):
        return iter(self.found)


class Resetting:
    """An iterator that starts anew when `iter` is called on it, as loaders of tutorials do."""

    def __init__(self, *found):
        self.found = found

    def __iter__(self):
        self.rest = list(self.found)
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        return self.rest.pop(0)


class Loader:
    """Starts anew with every iteration, as a data loader does."""

    def __init__(self, *found):
        self.found = found
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from self.found


def assert_batch(batch, x, y):
    assert list(batch) == ["input", "target"]
    np.testing.assert_array_equal(batch["input"], x)
    np.testing.assert_array_equal(batch["target"], y)


# -- forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        {"input": X, "target": Y},
        {"target": Y, "extra": None, "input": X},
        MappingProxyType({"input": X, "target": Y}),
    ],
    ids=["tuple", "list", "dict", "dict with more", "mapping"],
)
def test_as_batch_accepts(batch):
    assert_batch(as_batch(batch), X, Y)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X,), ValueError, r"must be \(input, target\), found a tuple of 1"),
        ([X, Y, Y, Y], ValueError, "found a list of 4"),
        ((X, Y, np.arange(6)), ValueError, r"tuple of 3.*not taken for weights.*\"weight\": w"),
        ((X, Y, np.ones(6)), ValueError, r"tuple of 3.*transform=lambda batch: batch\[:2\]"),
        ({"input": X, "target": Y, "weights": WEIGHTS}, ValueError, "have the key 'weight'"),
        (weighted_by(X), ValueError, r"weight of a batch of `data` .* \(N,\).*of \(6, 2\)"),
        (weighted_by(2.0), ValueError, r"found float of \(\)"),
        (weighted_by({"w": Y}), ValueError, "found dict"),
        (weighted_by(Y - 1), ValueError, "must be finite and not negative; found 1 .* such as -1"),
        (weighted_by(np.full(6, np.inf)), ValueError, "finite and not negative"),
        (weighted_by(np.full(6, "1")), TypeError, "must be real numbers"),
        ({"input": X}, ValueError, r"needs the keys 'input' and 'target', found \['input'\]"),
        ({"x": X, 0: Y}, ValueError, r"found \['0', 'x'\]"),
        (X, TypeError, "found ndarray.*`data` is one such batch, or an iterable of them"),
        (None, TypeError, "found NoneType"),
    ],
)
def test_as_batch_refuses(batch, error, message):
    with pytest.raises(error, match=message):
        as_batch(batch)


@pytest.mark.parametrize("data", [(X, Y), {"input": X, "target": Y}], ids=["tuple", "dict"])
def test_a_tuple_or_a_mapping_is_one_batch(data):
    (batch,) = batches(data)
    assert_batch(batch, X, Y)


@pytest.mark.parametrize(
    "make",
    [list, Loader, iter, lambda found: (b for b in found), lambda found: found],
    ids=["list", "loader", "iterator", "generator", "list of lists"],
)
def test_anything_else_is_iterated_over(make):
    data = [[X[:4], Y[:4]], {"input": X[4:], "target": Y[4:]}]
    first, second = batches(Loader(*data) if make is Loader else make(data))
    assert_batch(first, X[:4], Y[:4])
    assert_batch(second, X[4:], Y[4:])


def test_a_list_of_two_arrays_is_no_batch():
    # As `data`, a list holds batches: [x, y] is ambiguous and refused with both readings.
    with pytest.raises(TypeError, match=r"found ndarray\. `data` is one such batch"):
        list(batches([X, Y]))


def test_transform_brings_batches_into_form():
    found = batches([{"image": X, "label": Y}], lambda b: (b["image"], b["label"]))
    assert_batch(next(found), X, Y)
    (batch,) = batches((X, Y), lambda b: (2 * b[0], b[1]))
    assert_batch(batch, 2 * X, Y)


def test_a_loader_starts_anew_and_is_read_lazily():
    loader = Loader((X, Y), (X, Y))
    assert len(list(batches(loader))) == len(list(batches(loader))) == 2
    assert loader.passes == 2

    def endless():
        while True:
            yield X, Y

    assert_batch(next(batches(endless())), X, Y)


def test_a_generator_that_was_consumed_is_named_as_the_cause():
    generator = (batch for batch in [(X, Y)])
    assert len(list(batches(generator))) == 1
    with pytest.raises(ValueError, match=r"no batches\. A generator can be iterated only once"):
        list(batches(generator))


@pytest.mark.parametrize("data", [[], Loader()], ids=["list", "loader"])
def test_no_batches_are_an_error(data):
    with pytest.raises(ValueError, match="`data` has no batches"):
        list(batches(data))


@pytest.mark.parametrize("data", [X, jnp.asarray(X), 3, None])
def test_what_is_neither_batch_nor_iterable_is_refused(data):
    with pytest.raises(TypeError, match=f"an iterable of batches, found {type(data).__name__}"):
        list(batches(data))


def test_foreign_tensors_are_read_through_numpy():
    batch = to_arrays({"input": {"a": Tensor(X), "b": jnp.asarray(X)}, "target": Tensor(Y)})
    assert isinstance(batch["input"]["a"], np.ndarray)
    assert isinstance(batch["input"]["b"], jax.Array)
    np.testing.assert_array_equal(batch["input"]["a"], X)
    assert batch["target"].dtype == Y.dtype


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            TorchTensor(RuntimeError("Can't call numpy()")),
            r"`data` holds a TorchTensor, which numpy cannot read as numbers \(Can't call numpy",
        ),
        (TorchTensor(TypeError("Got unsupported ScalarType BFloat16")), "unsupported ScalarType"),
        (object(), "holds a object, .* not made of numbers"),
        (np.asarray(["a", "b"]), r"holds \['a', 'b'\] \(an array of .* not made of numbers"),
    ],
    ids=["with gradient", "bfloat16", "object", "strings"],
)
def test_leaves_that_numpy_cannot_read_are_refused(leaf, message):
    with pytest.raises(TypeError, match=f"{message}.*; convert it by `transform`"):
        to_arrays({"input": leaf, "target": Y})


# -- several passes ----------------------------------------------------------------------------

BATCHES = [(X[:4], Y[:4]), {"input": X[4:], "target": Y[4:]}]


@pytest.mark.parametrize(
    "once",
    [iter(BATCHES), (b for b in BATCHES), map(tuple, BATCHES), Resetting(*BATCHES),
     TensorflowDataset(*BATCHES).as_numpy_iterator()],
    ids=["iterator", "generator", "map", "resetting", "of tensorflow"],
)  # fmt: skip
def test_what_ends_after_one_pass_is_refused_before_it_is_touched(once):
    with pytest.raises(TypeError, match=f"`ekfac` .* but a {type(once).__name__} is an iterator"):
        require_several_passes(once, "`ekfac`")
    found = list(batches(once)) if not isinstance(once, map) else []
    assert len(found) == 2 or isinstance(once, map)


@pytest.mark.parametrize(
    "data",
    [(X, Y), {"input": X, "target": Y}, BATCHES, Loader(*BATCHES), TensorflowDataset(*BATCHES)],
    ids=["tuple", "dict", "list", "loader", "dataset of tensorflow"],
)
def test_what_starts_anew_may_have_several_passes(data):
    require_several_passes(data, "`ekfac`")
    sizes: list[int] = []
    for _ in range(2):
        assert sum(map(batch_size, same_number(batches(data), sizes))) == 6
    assert sizes == [6, 6]


def test_a_pass_over_other_examples_is_noticed():
    sizes: list[int] = []
    assert len(list(same_number(batches(BATCHES), sizes))) == 2
    shorter = same_number(batches(BATCHES[:1]), sizes)
    assert_batch(next(shorter), X[:4], Y[:4])
    with pytest.raises(ValueError, match="6 examples in the first pass and 4 in pass 2"):
        next(shorter)


@pytest.mark.parametrize("curv_type", [laplax_kfac.ekfac, laplax_kfac.kfoc])
def test_curvatures_of_several_passes_do_not_touch_an_iterator(curv_type):
    def generate():
        raise AssertionError
        yield

    with pytest.raises(TypeError, match=f"`{curv_type.__name__}` goes through `data` more than"):
        curv_type(jnp.dot, {"w": X}, generate(), loss_fn="mse")


# -- real loaders, where they are installed ----------------------------------------------------


def whole(data):
    parts = [to_arrays(batch) for batch in batches(data)]
    assert len(parts) == 2
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


@pytest.mark.parametrize("tensors", [True, False], ids=["tensors", "numpy"])
def test_loaders_of_torch(tensors):
    torch = pytest.importorskip("torch")
    dataset: list = list(zip(X, Y, strict=True))
    options: dict = {"collate_fn": lambda found: tuple(map(np.stack, zip(*found, strict=True)))}
    if tensors:
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
        options = {}
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, **options)
    require_several_passes(loader, "`ekfac`")
    for _ in range(2):
        assert_batch(whole(loader), X, Y)
    with pytest.raises(TypeError, match="is an iterator"):
        require_several_passes(iter(loader), "`ekfac`")
    if tensors:
        assert_batch(to_arrays(as_batch((torch.from_numpy(X), torch.from_numpy(Y)))), X, Y)
        with pytest.raises(TypeError, match=r"holds a Tensor, .* requires grad"):
            to_arrays({"input": torch.ones(2, requires_grad=True), "target": Y})
        with pytest.raises(TypeError, match=r"holds a Tensor, .* BFloat16"):
            to_arrays({"input": torch.ones(2, dtype=torch.bfloat16), "target": Y})


def test_datasets_of_grain():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(list(zip(X, Y, strict=True))).batch(4)
    for data in (dataset, dataset.to_iter_dataset()):
        require_several_passes(data, "`ekfac`")
        for _ in range(2):
            assert_batch(whole(data), X, Y)
    iterator = iter(dataset.to_iter_dataset())
    with pytest.raises(TypeError, match="is an iterator"):
        require_several_passes(iterator, "`ekfac`")
    assert_batch(whole(iterator), X, Y)


def test_datasets_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices({"input": X, "target": Y}).batch(4)
    require_several_passes(dataset, "`ekfac`")
    for _ in range(2):
        assert_batch(whole(dataset), X, Y)
    for iterator in (dataset.as_numpy_iterator(), iter(dataset)):
        with pytest.raises(TypeError, match="is an iterator"):
            require_several_passes(iterator, "`ekfac`")
        assert_batch(whole(iterator), X, Y)


# -- sizes -------------------------------------------------------------------------------------


def test_batch_size_counts_examples_of_pytrees():
    assert batch_size({"input": {"a": X, "b": (Y, jnp.asarray(X))}, "target": Y}) == 6


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            X,
            Y[:5],
            r"same leading axis, found leading axes \{'input': \{\(6,\)\}, 'target': \{\(5,",
        ),
        ((X, X[:3]), Y, "same leading axis"),
        (X, np.asarray(1.0), "same leading axis"),
        (np.asarray(1.0), np.asarray(1.0), "same leading axis"),
        ((), (), "same leading axis"),
        (X[:0], Y[:0], "no examples"),
    ],
    ids=["targets", "inputs", "scalar target", "scalars", "no arrays", "no examples"],
)
def test_batch_size_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        batch_size({"input": x, "target": y})


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("size", [6, 7, 10])
def test_pad_repeats_the_last_example_with_weight_zero(convert, size):
    batch, weights = pad({"input": (convert(X),), "target": convert(Y)}, size)
    assert type(batch["target"]) is type(convert(Y))
    repeat = [*range(6), *[5] * (size - 6)]
    np.testing.assert_array_equal(batch["input"][0], X[repeat])
    np.testing.assert_array_equal(batch["target"], Y[repeat])
    np.testing.assert_array_equal(weights, [1.0] * 6 + [0.0] * (size - 6))


@pytest.mark.parametrize(
    ("counts", "most", "size"),
    [
        ((6,), 256, 6),
        ((10,), 4, 4),
        ((9,), 8, 5),
        ((8, 8), 4, 4),
        ((6, 6, 1), 256, 6),
        ((5, 5, 3), 3, 3),
        ((2, 7), 256, 2),
        ((7, 2), 1, 1),
    ],
)
def test_even_batches_have_one_size_and_hold_every_example_once(counts, most, size):
    starts = np.cumsum([0, *counts])
    examples = np.arange(starts[-1])
    stream = [
        {"input": {"x": examples[a:b, None]}, "target": -examples[a:b]}
        for a, b in itertools.pairwise(starts)
    ]
    seen = []
    for batch, weights in even_batches(stream, most):
        assert batch["input"]["x"].shape == (size, 1)
        assert batch["target"].shape == weights.shape == (size,)
        assert set(np.asarray(weights)) <= {0.0, 1.0}
        np.testing.assert_array_equal(batch["input"]["x"][:, 0], -batch["target"])
        assert np.isin(batch["target"], -examples).all()  # padding is made of real examples
        seen += batch["input"]["x"][np.asarray(weights) == 1.0, 0].tolist()
    assert seen == examples.tolist()


def test_even_batches_split_the_first_evenly_so_that_padding_stays_small():
    parts = list(even_batches([{"input": np.zeros((257, 1)), "target": np.zeros(257)}], 256))
    assert [int(weights.sum()) for _, weights in parts] == [129, 128]


def test_a_batch_of_the_right_size_is_not_copied():
    ((batch, _),) = even_batches([as_batch((jnp.asarray(X), Y))], 6)
    (again,) = [part["input"] for part, _ in even_batches([batch], 8)]
    assert again is batch["input"]


def test_even_batches_check_every_batch():
    stream = [{"input": X, "target": Y}, {"input": X, "target": Y[:5]}]
    with pytest.raises(ValueError, match="same leading axis"):
        list(even_batches(stream, 256))


def test_first_example_has_no_batch_axis_and_dtypes_of_jax():
    example = first_example({"input": {"a": X, "b": np.zeros((6, 2, 3), np.int8)}, "target": Y})
    assert example["a"] == jax.ShapeDtypeStruct((2,), jnp.float32)
    assert example["b"] == jax.ShapeDtypeStruct((2, 3), jnp.int8)
    with jax.enable_x64(True):
        assert first_example({"input": X, "target": Y}).dtype == jnp.float64


# -- weights of examples -----------------------------------------------------------------------


def test_batches_with_weights():
    found = as_batch({"weight": WEIGHTS, "target": Y, "input": X, "id": Y})
    assert list(found) == ["input", "target", "weight"]
    np.testing.assert_array_equal(found["weight"], WEIGHTS)
    assert_batch(as_batch({"input": X, "target": Y, "weight": None}), X, Y)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, Tensor], ids=["np", "jax", "torch"])
def test_weights_are_kept_where_batches_are_cut_and_padded(convert):
    stream = [to_arrays(as_batch(weighted_by(convert(WEIGHTS)))), {"input": X[:2], "target": Y[:2]}]
    parts = list(even_batches(stream, 4))
    assert [sorted(batch) for batch, _ in parts] == [["input", "target"]] * 3
    found = np.concatenate([weights for _, weights in parts])
    np.testing.assert_array_equal(found, [*WEIGHTS, 1.0, 1.0, 0.0])
    assert found.dtype == jnp.result_type(float)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"same leading axis.*'weight': \{\(5,\)\}"):
        list(even_batches([as_batch(weighted_by(WEIGHTS[:5]))], 4))
    for weights in (np.ones(5), np.ones(1), 2.0):
        with pytest.raises(ValueError, match=r"`weights` must have shape \(6,\).*found \("):
            weighted_batch(as_batch((X, Y)), weights)


def tokens(input, params):
    """Two layers over positions, gains without a Kronecker form, and a mean."""
    hidden = jnp.tanh(input @ params["first"]["w"] + params["first"]["b"]) * params["gain"]
    return (hidden @ params["second"]).mean(axis=0)


TOKENS = {
    "first": {"b": normal(4), "w": normal(3, 4, seed=1)},
    "gain": normal(4, seed=2),
    "second": normal(4, 3, seed=3),
}
EXAMPLES = normal(6, 5, 3, seed=4), np.arange(6) % 3
REPEATED = tuple(np.repeat(part, WEIGHTS, axis=0) for part in EXAMPLES)
LOSS = "cross_entropy"
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def plain(acc, state, _):
    return acc.finalize(state)


def corrected(acc, state, parts):
    return acc.correct(acc.finalize(state), parts)


def nearest(acc, state, parts):
    return acc.optimise(state, lambda: parts)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("options", "finish"),
    [
        ({}, plain),
        ({"kfac_approx": "reduce"}, plain),
        ({}, corrected),
        ({}, nearest),
        ({"fisher_type": "empirical", "curvature": "block"}, plain),
        ({"fisher_type": "forward_only"}, plain),
    ],
    ids=["expand", "reduce", "ekfac", "kfoc", "block", "forward only"],
)
def test_an_example_of_weight_w_counts_as_w_examples(options, finish):
    acc = laplax_kfac.accumulator(tokens, TOKENS, loss_fn=LOSS, **options)

    def fit(data):
        parts = list(even_batches([as_batch(data)], 3))
        state = functools.reduce(lambda state, part: acc.update(state, *part), parts, acc.init())
        return finish(acc, state, parts).to_dense()

    weighted, expected = fit(weighted_by(WEIGHTS, *EXAMPLES)), fit(REPEATED)
    np.testing.assert_allclose(weighted, expected, **CLOSE)
    assert np.linalg.norm(fit(EXAMPLES) - expected) > 0.1
    # Whatever they sum to: more than one, or less.
    few = fit(weighted_by(1e-3 * WEIGHTS, *EXAMPLES))
    np.testing.assert_allclose(few, 1e-3 * expected, rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_weights_come_with_the_batch_and_apart():
    acc = laplax_kfac.accumulator(tokens, TOKENS, loss_fn=LOSS)
    batch, twice = {"input": EXAMPLES[0], "target": EXAMPLES[1]}, jnp.asarray(2.0 * WEIGHTS)
    ways: list[Any] = [
        (batch, twice),
        (weighted_by(twice, *EXAMPLES), None),
        (batch | {"weight": WEIGHTS}, jnp.full(6, 2.0)),
    ]
    states = [acc.update(acc.init(), *way) for way in ways]
    assert [state.num_examples for state in states] == [2 * WEIGHTS.sum()] * 3
    found = [acc.finalize(state) for state in states]
    # The second pass, too, takes weights in either place.
    parts = [[(as_batch(batch), weights)] for batch, weights in ways[::2]]
    exact = [acc.correct(found[0], part) for part in parts]
    for curvatures in (found, exact):
        first, *others = (c.to_dense() for c in curvatures)
        for other in others:
            np.testing.assert_allclose(other, first, **CLOSE)


@pytest.mark.usefixtures("x64")
def test_the_fit_counts_weights():
    found, expected = (
        laplax_kfac.data_fit(tokens, TOKENS, data, loss_fn=LOSS, batch_size=3)
        for data in (weighted_by(WEIGHTS, *EXAMPLES), REPEATED)
    )
    np.testing.assert_allclose(found.loss, expected.loss, **CLOSE)
    assert found.num_outputs == expected.num_outputs == WEIGHTS.sum() * 3
