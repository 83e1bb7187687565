"""`kfac` against dense matrices: exact where it must be, and what its options do."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support.machines import tune_machine
from support.matrices import normal
from support.oracles import LOSSES, block_mask, dense_empirical_fisher, dense_ggn, sizes
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.curvature import memory

pytestmark = pytest.mark.usefixtures("x64")


# -- models and targets ------------------------------------------------------------------------


def layers(*sizes, seed=0):
    """Parameters {"l0": {"b", "w"}, ...} of a chain of linear layers."""
    rng = np.random.default_rng(seed)
    return {
        f"l{k}": {"b": rng.normal(size=m), "w": rng.normal(size=(n, m)) / np.sqrt(n)}
        for k, (n, m) in enumerate(itertools.pairwise(sizes))
    }


def chain(activation=lambda x: x, readout=lambda x: x):
    """A multi-layer perceptron on the last axis."""

    def model_fn(input, params):
        x = input
        for k, layer in enumerate(params.values()):
            x = (activation(x) if k else x) @ layer["w"] + layer["b"]
        return readout(x)

    return model_fn


def groups(params, separate):
    """Leaves that share a block: those of one layer, or none."""
    by_layer = [[f"['{k}']['{leaf}']" for leaf in layer] for k, layer in params.items()]
    return [[path] for group in by_layer for path in group] if separate else by_layer


TARGETS = {
    "mse": ("mse", lambda n, c: normal(n, c, seed=3)),
    "classes": ("cross_entropy", lambda n, c: np.arange(n) % c),
    "one-hot": ("cross_entropy", lambda n, c: np.eye(c)[np.arange(n) % c]),
    "binary": ("binary_cross_entropy", lambda n, c: np.arange(n * c).reshape(n, c) % 2),
}
ORACLES = {"type2": dense_ggn, "empirical": dense_empirical_fisher}
ACTIVATIONS = {
    "tanh": chain(jnp.tanh),
    "sigmoid": chain(jax.nn.sigmoid),
    "relu": chain(jax.nn.relu),
}


# -- exact cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fisher_type", ORACLES)
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_one_datapoint_gives_the_exact_blocks(activation, target, fisher_type, separate):
    loss_fn, make_target = TARGETS[target]
    model_fn, params = ACTIVATIONS[activation], layers(5, 4, 3)
    data = normal(1, 5, seed=1), make_target(1, 3)
    curv = laplax_kfac.kfac(
        model_fn, params, data, loss_fn=loss_fn, fisher_type=fisher_type,
        separate_weight_and_bias=separate,
    )  # fmt: skip
    exact = ORACLES[fisher_type](model_fn, params, data, loss_fn)
    expected = np.where(block_mask(params, groups(params, separate)), exact, 0.0)
    np.testing.assert_allclose(curv.to_dense(), expected, **tolerance(jnp.float64))


@dataclass(frozen=True)
class Exact:
    """A deep linear network under mse: KFAC is exact for any number of examples."""

    name: str
    input_shape: tuple[int, ...]
    kfac_approx: str = "expand"
    readout: Callable[[Any], Any] = lambda x: x
    positions: int = 1

    def __str__(self) -> str:
        return self.name


LINEAR = [
    Exact("vectors", (5,)),
    Exact("vectors, reduce", (5,), "reduce"),
    Exact("an output a token", (3, 5), positions=3),
    Exact("an output a pixel", (2, 3, 5), positions=6),
    Exact("tokens averaged", (3, 5), "reduce", lambda x: x.mean(axis=0), 3),
    Exact("tokens summed", (3, 5), "reduce", lambda x: x.sum(axis=0), 3),
    Exact("pixels averaged", (2, 3, 5), "reduce", lambda x: x.mean(axis=(0, 1)), 6),
]


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_deep_linear_networks_give_the_exact_blocks_for_all_data(case, separate):
    model_fn, params = chain(readout=case.readout), layers(5, 4, 3)
    x = normal(7, *case.input_shape, seed=1)
    data = x, np.zeros(jax.eval_shape(jax.vmap(lambda x: model_fn(x, params)), x).shape)
    curv = laplax_kfac.kfac(
        model_fn, params, data, loss_fn="mse", kfac_approx=case.kfac_approx,
        separate_weight_and_bias=separate,
    )  # fmt: skip
    assert {layer.positions for layer in curv.layers} == {case.positions}
    exact = dense_ggn(model_fn, params, data, "mse")
    expected = np.where(block_mask(params, groups(params, separate)), exact, 0.0)
    np.testing.assert_allclose(curv.to_dense(), expected, **tolerance(jnp.float64))


@pytest.mark.parametrize("reduction", [jnp.mean, jnp.sum], ids=["mean", "sum"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_reduction_inside_a_linear_network(reduction, kfac_approx):
    params = layers(5, 4, 3)

    def model_fn(input, params):
        hidden = reduction(input @ params["l0"]["w"] + params["l0"]["b"], axis=0)
        return hidden @ params["l1"]["w"] + params["l1"]["b"]

    data = normal(7, 3, 5, seed=1), np.zeros((7, 3))
    curv = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", kfac_approx=kfac_approx)
    assert [layer.positions for layer in curv.layers] == [3, 1]
    found, exact = curv.to_dense(), dense_ggn(model_fn, params, data, "mse")
    behind = slice(5 * 4 + 4, None)
    np.testing.assert_allclose(found[behind, behind], exact[behind, behind], **tolerance(float))
    before = slice(5 * 4 + 4)
    right = np.allclose(found[before, before], exact[before, before], **tolerance(float))
    assert right == (kfac_approx == "reduce")


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_reduce_is_exact_for_the_last_convolution_before_a_sum(kfac_approx):
    params = {"first": normal(4, 2, 3, 3), "second": normal(3, 4, 2, 2, seed=1)}

    def model_fn(input, params):
        x = input[None]
        for kernel in params.values():
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID")
        return x.sum(axis=(0, 2, 3))

    data = normal(5, 2, 6, 5, seed=2), np.zeros((5, 3))
    curv = laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", kfac_approx=kfac_approx)
    assert [layer.positions for layer in curv.layers] == [12, 6]
    last = slice(params["first"].size, None)
    found = curv.to_dense()[last, last]
    exact = dense_ggn(model_fn, params, data, "mse")[last, last]
    assert np.allclose(found, exact, **tolerance(float)) == (kfac_approx == "reduce")


@pytest.mark.parametrize("case", [LINEAR[2], LINEAR[4]], ids=str)
def test_the_other_approximation_is_not_exact(case):
    # Otherwise the cases above would not tell `expand` and `reduce` apart.
    model_fn, params = chain(readout=case.readout), layers(5, 4, 3)
    x = normal(7, *case.input_shape, seed=1)
    data = x, np.zeros(jax.eval_shape(jax.vmap(lambda x: model_fn(x, params)), x).shape)
    other = {"expand": "reduce", "reduce": "expand"}[case.kfac_approx]
    found = [
        laplax_kfac.kfac(model_fn, params, data, loss_fn="mse", kfac_approx=approx).to_dense()
        for approx in (case.kfac_approx, other)
    ]
    assert np.linalg.norm(found[1] - found[0]) > 0.1 * np.linalg.norm(found[0])


@pytest.mark.parametrize("target", ["mse", "classes"])
def test_a_convolution_at_one_position_is_exact(target):
    loss_fn, make_target = TARGETS[target]
    rng = np.random.default_rng(0)
    params = {
        "conv": {"b": rng.normal(size=4), "w": rng.normal(size=(3, 2, 2, 4)) / 4},
        "out": {"b": rng.normal(size=3), "w": rng.normal(size=(4, 3))},
    }

    def model_fn(input, params):
        dims = ("NHWC", "HWIO", "NHWC")
        kernel = params["conv"]["w"]
        x = jax.lax.conv_general_dilated(
            input[None], kernel, (1, 1), "VALID", dimension_numbers=dims
        )
        x = jnp.tanh(x[0, 0, 0] + params["conv"]["b"])
        return x @ params["out"]["w"] + params["out"]["b"]

    data = normal(1, 3, 2, 2, seed=1), make_target(1, 3)
    curv = laplax_kfac.kfac(model_fn, params, data, loss_fn=loss_fn)
    assert [(layer.name, layer.pattern) for layer in curv.layers] == [
        ("conv", "conv"),
        ("out", "dense"),
    ]
    exact = dense_ggn(model_fn, params, data, loss_fn)
    expected = np.where(block_mask(params, groups(params, separate=False)), exact, 0.0)
    np.testing.assert_allclose(curv.to_dense(), expected, **tolerance(jnp.float64))


def test_relu_network_784_10_10_10_has_correlation_one_with_the_fisher():
    # The claim of laplax's prototype for one datapoint; here the scale agrees too.
    model_fn, params = chain(jax.nn.relu), layers(784, 10, 10, 10)
    data = np.abs(normal(1, 784, seed=1)), np.asarray([3])
    curv = laplax_kfac.kfac(model_fn, params, data, loss_fn="cross_entropy")

    flat, unravel = ravel_pytree(params)
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda v: model_fn(data[0][0], unravel(v))))(flat))
    logits = np.asarray(model_fn(data[0][0], params))
    p = np.exp(logits) / np.exp(logits).sum()
    fisher = jacobian.T @ (np.diag(p) - np.outer(p, p))

    for layer in np.split(np.arange(flat.size), [7850, 7960]):
        columns = np.random.default_rng(2).choice(layer, 40, replace=False)
        expected = np.zeros((flat.size, 40))
        expected[layer] = fisher[layer] @ jacobian[:, columns]
        units = np.zeros((40, flat.size))
        units[np.arange(40), columns] = 1.0
        mv = jax.jit(jax.vmap(lambda v: ravel_pytree(curv.mv(unravel(v)))[0]))
        found = np.asarray(mv(units)).T
        np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))
        correlation = np.corrcoef(found[layer].ravel(), expected[layer].ravel())[0, 1]
        np.testing.assert_allclose(correlation, 1.0, rtol=1e-12)


# -- Monte Carlo -------------------------------------------------------------------------------

SMALL = chain(jnp.tanh), layers(4, 3, 3)


def mc(key, samples=1, data=None, **options):
    data = (normal(3, 4, seed=1), np.arange(3)) if data is None else data
    return laplax_kfac.kfac(
        *SMALL, data, loss_fn="cross_entropy", fisher_type="mc", mc_samples=samples,
        key=jax.random.key(key), **options,
    ).to_dense()  # fmt: skip


@pytest.mark.parametrize("target", ["mse", "classes", "binary"])
def test_mc_converges_to_type2(target):
    loss_fn, make_target = TARGETS[target]
    data = normal(3, 4, seed=1), make_target(3, 3)
    exact = laplax_kfac.kfac(*SMALL, data, loss_fn=loss_fn).to_dense()
    sampled = laplax_kfac.kfac(
        *SMALL, data, loss_fn=loss_fn, fisher_type="mc", mc_samples=25_000, key=jax.random.key(1)
    ).to_dense()
    assert np.linalg.norm(sampled - exact) < 0.05 * np.linalg.norm(exact)
    assert np.linalg.norm(sampled - exact) > 0


def test_mc_is_reproducible_for_a_key_and_differs_between_keys():
    np.testing.assert_array_equal(mc(0), mc(0))
    assert np.linalg.norm(mc(0) - mc(1)) > 0.01 * np.linalg.norm(mc(0))


@pytest.mark.parametrize("batches", [[2], [1, 1]], ids=["one batch", "two batches"])
def test_mc_draws_anew_for_every_example_and_every_batch(batches):
    # Equal examples with equal draws would give a matrix B of rank 1.
    acc = laplax_kfac.accumulator(*SMALL, loss_fn="mse", fisher_type="mc")
    data = [(np.ones((size, 4)), np.zeros((size, 3))) for size in batches]
    state: Any = acc.init()
    for batch in data:
        state = acc.update(state, batch)
    collected: Any = acc.collect(acc.parts(data, 2))
    for found in (state, collected):
        assert jnp.linalg.matrix_rank(found.sums[-1].outputs[0, 0]) == 2
    np.testing.assert_allclose(
        collected.sums[-1].outputs, state.sums[-1].outputs, **tolerance(jnp.float64)
    )


# -- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How ten examples reach `kfac`."""

    name: str
    cut: Callable[[Any, Any], Any]
    batch_size: int = 256

    def __str__(self) -> str:
        return self.name


def cuts(x, y, *starts):
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise([0, *starts, len(x)])]


SPLITS = [
    Split("a dictionary", lambda x, y: {"input": x, "target": y}),
    Split("small batches", lambda x, y: (x, y), 3),
    Split("single examples", lambda x, y: (x, y), 1),
    Split("a ragged list", lambda x, y: cuts(x, y, 4, 8)),
    Split("a ragged list, split again", lambda x, y: cuts(x, y, 5), 2),
    Split("a growing list", lambda x, y: cuts(x, y, 1, 3)),
    Split("another order", lambda x, y: cuts(x, y, 4, 8)[::-1]),
    Split("a generator", lambda x, y: (batch for batch in cuts(x, y, 7))),
    Split("jax arrays", lambda x, y: (jnp.asarray(x), jnp.asarray(y)), 4),
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_split_of_the_data_does_not_matter(split):
    x, y = normal(10, 4, seed=1), np.arange(10) % 3
    whole = laplax_kfac.kfac(*SMALL, (x, y), loss_fn="cross_entropy").to_dense()
    found = laplax_kfac.kfac(
        *SMALL, split.cut(x, y), loss_fn="cross_entropy", batch_size=split.batch_size
    ).to_dense()
    np.testing.assert_allclose(found, whole, **tolerance(jnp.float64))


def test_data_twice_doubles_the_curvature():
    data = normal(5, 4, seed=1), np.arange(5) % 3
    once, twice = (
        laplax_kfac.kfac(*SMALL, batches, loss_fn="cross_entropy").to_dense()
        for batches in ([data], [data, data])
    )
    np.testing.assert_allclose(twice, 2 * once, **tolerance(jnp.float64))


def test_batches_may_have_sequences_of_different_lengths():
    # With one output a token, a token of any sequence counts the same.
    params, lengths = layers(4, 3), (2, 5, 3)
    data = [(normal(6, n, 4, seed=n), np.zeros((6, n, 3))) for n in lengths]
    found = laplax_kfac.kfac(chain(), params, data, loss_fn="mse").to_dense()
    expected = sum(dense_ggn(chain(), params, batch, "mse") for batch in data)
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_transform_brings_batches_into_form():
    x, y = normal(5, 4, seed=1), np.arange(5) % 3
    found, expected = (
        laplax_kfac.kfac(*SMALL, data, loss_fn="cross_entropy", transform=transform).to_dense()
        for data, transform in [([(y, x)], lambda batch: batch[::-1]), ((x, y), None)]
    )
    np.testing.assert_array_equal(found, expected)


def test_a_model_of_batches_gives_the_same():
    x, y = normal(5, 4, seed=1), np.arange(5) % 3
    found, expected = (
        laplax_kfac.kfac(
            *SMALL, (x, y), loss_fn="cross_entropy", vmap_over_data=vmap_over_data
        ).to_dense()
        for vmap_over_data in (False, True)
    )
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_ragged_batches_trace_the_model_and_the_loss_no_more_often_than_one_batch():
    def traces(data):
        counts = {"model": 0, "loss": 0}

        def model_fn(input, params):
            counts["model"] += 1
            return SMALL[0](input, params)

        def loss(f: Any, y: Any) -> Any:
            counts["loss"] += 1
            return jnp.sum((f - y) ** 2)

        laplax_kfac.kfac(model_fn, SMALL[1], data, loss_fn=loss)
        return counts

    x, y = normal(10, 4, seed=1), normal(10, 3, seed=2)
    found = traces((x[:4], y[:4]))
    assert found == traces(cuts(x, y, 4, 8))
    assert found["model"] == 1
    assert found["loss"] >= 1


def test_progress_is_shown_on_demand(capsys):
    data = cuts(normal(4, 4, seed=1), np.zeros(4, int), 2)
    laplax_kfac.kfac(*SMALL, data, loss_fn="cross_entropy")
    assert capsys.readouterr().err == ""
    laplax_kfac.kfac(*SMALL, data, loss_fn="cross_entropy", progress=True)
    shown = capsys.readouterr().err
    assert "factors: 100%" in shown
    assert "2/2 [" in shown
    assert "2 examples each" in shown
    assert "eigenvectors: 100%" in shown


class Sizeless:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("form", "total"),
    [("one batch", 4), ("list", 4), ("transform", 4), ("unknown", None), ("split", 4)],
)
def test_progress_has_a_total_wherever_the_number_of_batches_is_known(form, total, capsys):
    x, y = normal(8, 4, seed=1), np.zeros(8, int)
    data = {
        "one batch": (x, y), "list": cuts(x, y, 2, 4, 6), "unknown": Sizeless(cuts(x, y, 2, 4, 6)),
        "transform": [{"x": x, "y": y}], "split": cuts(x, y, 4),
    }[form]  # fmt: skip
    options: Any = {"batch_size": 2, "progress": True, "loss_fn": "cross_entropy"}
    if form == "transform":
        options["transform"] = lambda batch: (batch["x"], batch["y"])
    laplax_kfac.ekfac(*SMALL, data, **options)
    shown = capsys.readouterr().err
    for name in ("factors", "eigenvalues"):
        assert re.search(rf"{name}: .*\b4{'/4 ' if total else 'batch '}", shown)


# -- accumulator -------------------------------------------------------------------------------


def accumulator(params=SMALL[1]):
    return laplax_kfac.accumulator(SMALL[0], params, loss_fn="cross_entropy")


def dense(acc, state):
    return acc.finalize(state).to_dense()


def test_merging_is_independent_of_the_order():
    acc = accumulator()
    parts = [acc.update(acc.init(), b) for b in cuts(normal(9, 4), np.arange(9) % 3, 2, 6)]
    a, b, c = parts
    expected = laplax_kfac.kfac(*SMALL, (normal(9, 4), np.arange(9) % 3), loss_fn="cross_entropy")
    for merged in (
        acc.merge(acc.merge(a, b), c),
        acc.merge(a, acc.merge(c, b)),
        acc.merge(acc.merge(c, acc.init()), acc.merge(acc.init(), acc.merge(b, a))),
    ):
        assert merged.num_examples == 9
        np.testing.assert_allclose(
            dense(acc, merged), expected.to_dense(), **tolerance(jnp.float64)
        )


def test_examples_of_weight_zero_do_not_count():
    acc = accumulator()
    x, y = normal(6, 4), np.arange(6) % 3
    weights = np.asarray([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    kept = weights == 1.0
    state = acc.update(acc.init(), (x, y), weights)
    assert state.num_examples == 3
    expected = acc.update(acc.init(), (x[kept], y[kept]))
    np.testing.assert_allclose(dense(acc, state), dense(acc, expected), **tolerance(jnp.float64))


def test_states_are_immutable_and_an_update_leaves_the_old_one_valid():
    acc = accumulator()
    first = acc.update(acc.init(), (normal(3, 4), np.arange(3)))
    before = dense(acc, first)
    acc.update(first, (normal(3, 4, seed=1), np.arange(3)))
    np.testing.assert_array_equal(dense(acc, first), before)
    assert acc.init().num_examples == 0


def test_a_state_without_data_cannot_be_finalized():
    acc = accumulator()
    with pytest.raises(ValueError, match="needs statistics of some data; call `update` first"):
        acc.finalize(acc.init())


def test_states_of_different_models_cannot_be_merged():
    acc, other = (
        accumulator(),
        laplax_kfac.accumulator(chain(), layers(4, 2), loss_fn="cross_entropy"),
    )
    batch = normal(2, 4), np.zeros(2, int)
    with pytest.raises(ValueError, match="statistics of one model; the layers of these two differ"):
        acc.merge(acc.update(acc.init(), batch), other.update(other.init(), batch))


# -- transformations and dtypes ----------------------------------------------------------------

DATA = normal(3, 4, seed=1), np.arange(3)


def curvature(params, x=DATA[0], y=DATA[1], **options):
    options = {"loss_fn": "cross_entropy"} | options
    return laplax_kfac.kfac(SMALL[0], params, (x, y), **options)


def test_a_whole_fit_works_under_jit():
    expected = curvature(SMALL[1])
    found = jax.jit(curvature)(SMALL[1], *DATA)
    assert isinstance(found, laplax_kfac.Curvature)
    assert found.layers == expected.layers
    np.testing.assert_allclose(found.to_dense(), expected.to_dense(), **tolerance(jnp.float64))


def test_a_whole_fit_works_under_vmap_over_parameters():
    members = [layers(4, 3, 3, seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    found = jax.vmap(lambda p: curvature(p).to_dense())(stacked)
    for member, matrix in zip(members, found, strict=True):
        np.testing.assert_allclose(matrix, curvature(member).to_dense(), **tolerance(jnp.float64))


FUNCTIONALS = {
    "trace": (lambda c, _: c.trace(), lambda m, _: jnp.trace(m)),
    "logdet": (
        lambda c, _: c.logdet(prior_prec=0.5),
        lambda m, _: jnp.linalg.slogdet(m + 0.5 * jnp.eye(len(m)))[1],
    ),
    "product": (
        lambda c, v: ravel_pytree(v)[0] @ ravel_pytree(c.inverse_mv(v, prior_prec=0.5))[0],
        lambda m, v: v @ jnp.linalg.solve(m + 0.5 * jnp.eye(len(m)), v),
    ),
}
DEAD = layers(4, 3, 3) | {"l0": {"b": np.asarray([5.0, -9.0, -9.0]), "w": normal(4, 3)}}


@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize(
    ("activation", "params"), [("tanh", SMALL[1]), ("relu", DEAD)], ids=["tanh", "dead units"]
)
@pytest.mark.parametrize("loss_fn", ["mse", "cross_entropy"])
def test_functions_of_the_curvature_are_differentiable_in_the_parameters(
    functional, activation, params, loss_fn
):
    # For one datapoint the blocks are exact.
    model_fn, (ours, reference) = ACTIVATIONS[activation], FUNCTIONALS[functional]
    data = DATA[0][:1], (DATA[1] if loss_fn == "cross_entropy" else np.zeros((1, 3)))[:1]
    mask, v = block_mask(params, groups(params, separate=False)), layers(4, 3, 3, seed=5)

    def found(p):
        return ours(laplax_kfac.kfac(model_fn, p, data, loss_fn=loss_fn), v)

    def expected(p):
        exact = jnp.where(mask, dense_ggn(model_fn, p, data, loss_fn), 0.0)
        return reference(exact, ravel_pytree(v)[0])

    gradients = jax.jit(jax.grad(found))(params), jax.jit(jax.grad(expected))(params)
    for got, want in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(got, want, **tolerance(jnp.float64))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_low_precision_is_accumulated_in_float32(dtype):
    with jax.enable_x64(False):
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), SMALL[1])
        x = jnp.asarray(DATA[0], dtype)
        found = curvature(params, x)
        rounded = found.to_dense()
        assert {b.eigenvalues.dtype for b in found.blocks} == {jnp.dtype(jnp.float32)}
        # Of many examples, too: 1,000 more ones would be lost in a bfloat16 sum.
        acc = accumulator(params)
        state: Any = acc.update(acc.init(), (jnp.ones((1000, 4), dtype), jnp.zeros(1000, int)))
        np.testing.assert_allclose(state.sums[0].inputs, 1000.0)
    exact = curvature(*jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x)))
    error = np.linalg.norm(rounded - exact.to_dense()) / np.linalg.norm(exact.to_dense())
    assert error < {16: 5e-2, 32: 1e-5}[jnp.finfo(dtype).bits]


# -- parameters without a Kronecker form -------------------------------------------------------


def normalized(input, params):
    """Weight norm, LayerNorm and a linear layer."""
    v = params["norm"]["v"]
    weight = params["norm"]["g"] * v / jnp.linalg.norm(v, axis=0)
    x = jnp.tanh(input @ weight)
    x = (x - x.mean()) / x.std() * params["scale"] + params["shift"]
    return x @ params["out"]["w"] + params["out"]["b"]


@pytest.mark.parametrize("fisher_type", ORACLES)
@pytest.mark.parametrize("target", ["mse", "classes"])
def test_fallback_blocks_are_exact_for_all_data(target, fisher_type):
    loss_fn, make_target = TARGETS[target]
    rng = np.random.default_rng(0)
    params = {
        "norm": {"g": rng.normal(size=13), "v": rng.normal(size=(20, 13))},
        "out": {"b": rng.normal(size=3), "w": rng.normal(size=(13, 3))},
        "scale": rng.normal(size=13),
        "shift": rng.normal(size=13),
    }
    data = normal(7, 20, seed=1), make_target(7, 3)
    curv = laplax_kfac.kfac(
        normalized,
        params,
        data,
        loss_fn=loss_fn,
        fisher_type=fisher_type,
        batch_size=4,
        fallback={"norm/v": "diagonal"},
    )
    kinds = {path: layer.block for layer in curv.layers for path in layer.params}
    assert kinds == {
        "['norm']['g']": "dense",
        "['norm']['v']": "diagonal",
        "['out']['b']": "kronecker",
        "['out']['w']": "kronecker",
        "['scale']": "dense",
        "['shift']": "dense",
    }
    exact = ORACLES[fisher_type](normalized, params, data, loss_fn)
    mask = block_mask(params, [[path] for path in kinds])
    v, out = slice(13, 273), slice(273, 315)
    mask[v, v] = np.eye(260, dtype=bool)
    mask[out, out] = False
    expected, found = (np.where(mask, matrix, 0.0) for matrix in (exact, curv.to_dense()))
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


def test_a_branch_counts_only_the_examples_that_took_it():
    params = layers(4, 3) | {"other": layers(4, 3, seed=1)["l0"]}

    def taken(x, layer):
        return jnp.tanh(x @ layer["w"] + layer["b"])

    def model_fn(input, params):
        branches = [lambda x, k=k: taken(x, params[k]) for k in ("l0", "other")]
        return jax.lax.cond(input[0] > 0, *branches, input)

    x, y = normal(9, 4, seed=1), normal(9, 3, seed=2)
    positive = x[:, 0] > 0
    assert 0 < positive.sum() < 9
    found = laplax_kfac.kfac(model_fn, params, (x, y), loss_fn="mse").to_dense()
    expected = np.zeros((30, 30))
    for k, (name, mine) in enumerate({"l0": positive, "other": ~positive}.items()):
        block = slice(15 * k, 15 * k + 15)
        alone = laplax_kfac.kfac(
            lambda input, params: taken(input, params), params[name], (x[mine], y[mine]),
            loss_fn="mse",
        )  # fmt: skip
        expected[block, block] = alone.to_dense()
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float64))


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher_type": "exact"}, "`fisher_type` must be one of 'type2', 'mc', 'empirical'"),
        ({"kfac_approx": "sum"}, "`kfac_approx` must be one of 'expand', 'reduce'; found 'sum'"),
        ({"mc_samples": 0}, "`mc_samples` must be a positive integer, found 0"),
        ({"mc_samples": 1.5}, "`mc_samples` must be a positive integer, found 1.5"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer, found 0"),
        ({"batch_size": 2.0}, r"`batch_size` must be a positive integer, found 2\.0"),
        ({"loss_fn": "l1"}, "`loss_fn` is 'l1'; expected one of"),
        (
            {"y": np.zeros((3, 2))},
            r"integer classes of shape \(\) or probabilities of",
        ),
        ({"y": np.zeros(2, int)}, "same leading axis"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        curvature(SMALL[1], **({"fisher_type": "empirical"} | options))


def test_mc_of_a_callable_is_refused():
    with pytest.raises(ValueError, match="use 'type2' or 'empirical', or a named loss"):
        curvature(SMALL[1], loss_fn=lambda f, y: jnp.sum(f) * y, fisher_type="mc")


def test_a_loss_that_is_no_loss_is_refused():
    with pytest.raises(TypeError, match="must be a laplax LossFn, its string, or a callable"):
        curvature(SMALL[1], loss_fn=1)


# -- bounded memory ----------------------------------------------------------------------------


def gained(input, params):
    """Two linear layers, and gains without a Kronecker form between them."""
    first, second, gain = params["l0"], params["l1"], params["gain"]
    return (jnp.tanh(input @ first["w"] + first["b"]) * gain) @ second["w"] + second["b"]


GAINED = {"gain": normal(3, seed=4)} | layers(4, 3, 3)
# For one example: inputs and two columns, 5 + 2 x 3 and 4 + 2 x 3 numbers, and 2 x 3 for the gains.
NUMBERS = {"type2": 27, "empirical": 18, "mc": 18}


def bounded(monkeypatch, examples, fisher_type="type2"):
    """Let the records of so many examples fit in memory."""
    tune_machine(monkeypatch, record_bytes=4 * examples * NUMBERS[fisher_type])


@jax.jit
def to_dense(curvature):
    return curvature.to_dense()


def gained_fit(data, **options):
    return laplax_kfac.kfac(gained, GAINED, data, loss_fn="cross_entropy", **options)


@pytest.mark.parametrize(
    ("fisher_type", "examples"), [("type2", 1), ("type2", 3), ("empirical", 2)]
)
def test_working_in_parts_changes_nothing(fisher_type, examples, monkeypatch):
    data = normal(7, 4, seed=1), np.arange(7) % 3  # parts of 2 or 3 need padding
    options = {"fisher_type": fisher_type, "eigenvalue_correction": True}
    whole = gained_fit(data, **options)
    bounded(monkeypatch, examples, fisher_type)
    found = gained_fit(data, **options)
    assert found.layers == whole.layers
    for got, expected in zip(*(to_dense(c) for c in (found, whole)), strict=True):
        assert np.abs(got).max() > 0
        np.testing.assert_allclose(got, expected, **tolerance(jnp.float64))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others work on whole batches")
def test_a_cpu_works_on_records_that_are_a_few_times_as_large_as_the_sums(monkeypatch):
    examples = 65
    data = normal(examples, 4, seed=1), np.arange(examples) % 3

    def largest():
        return max(sizes(jax.make_jaxpr(lambda *data: gained_fit(data))(*data).jaxpr))

    whole = gained_fit(data)
    assert largest() >= 2 * 3 * examples  # two columns, three outputs
    # The sums have 5^2 + 3^2 and 4^2 + 3^2 numbers: 5/2 times as many are records of 5 examples.
    tune_machine(monkeypatch, reused_bytes=0)
    assert largest() <= 4 * (examples + 3)  # inputs, padded for parts of 4
    np.testing.assert_allclose(
        to_dense(gained_fit(data)), to_dense(whole), **tolerance(jnp.float64)
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others form the patches")
def test_a_cpu_works_on_more_examples_where_no_patches_are_formed(monkeypatch):
    """Factors of a convolution are summed up without patches, but for `reduce` and EKFAC."""
    tune_machine(monkeypatch, reused_bytes=2**17)
    tune_machine(monkeypatch, least_moment_work=0)
    kernel = {"w": normal(3, 3, 2, 4)}
    dimensions = ("NHWC", "HWIO", "NHWC")
    data = normal(64, 8, 8, 2), np.zeros(64, int)

    def convolved(input, params):
        images = jax.lax.conv_general_dilated(
            input[None], params["w"], (1, 1), "SAME", dimension_numbers=dimensions
        )
        return jnp.mean(images, axis=(0, 1, 2))

    def at_once(kfac_approx, **options):
        """Examples in the smallest part: with EKFAC, of the second pass."""
        found = []

        def noted(*args):
            found.append(examples_at_once(*args))
            return found[-1]

        monkeypatch.setattr("laplax_kfac.curvature.passes.examples_at_once", noted)
        curvature = laplax_kfac.kfac(
            convolved,
            kernel,
            data,
            loss_fn="cross_entropy",
            fisher_type="empirical",
            kfac_approx=kfac_approx,
            **options,
        )
        return min(found), curvature

    examples_at_once = memory.examples_at_once
    records, images = 4 * 64 * (9 * 2 + 4), 4 * 64 * (3 * 2 + 4)
    assert at_once("reduce")[0] == 16 <= 2**17 // records
    few, curvature = at_once("expand")
    assert few == 32 <= 2**17 // images
    assert at_once("expand", eigenvalue_correction=True)[0] == 16
    tune_machine(monkeypatch, reused_bytes=2**25)
    whole = at_once("expand")[1]
    np.testing.assert_allclose(to_dense(curvature), to_dense(whole), **tolerance(jnp.float64))


TIED = {"embedding": normal(5, 3, seed=6), "w": normal(3, 3, seed=7)}


def tied(input, params):
    """An embedding of two tokens that is used once more, transposed, for the logits."""
    tokens = params["embedding"][input]
    return jnp.mean(jnp.tanh(tokens @ params["w"]), axis=0) @ params["embedding"].T


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "options",
    [
        {"fisher_type": "type2"},
        {"fisher_type": "type2", "eigenvalue_correction": True},
        {"fisher_type": "mc", "mc_samples": 5},
    ],
    ids=["type2", "ekfac", "mc"],
)
@pytest.mark.parametrize("at_once", [1, 2])
def test_working_in_some_columns_of_an_example_changes_nothing(
    options, kfac_approx, at_once, monkeypatch
):
    data = np.asarray([[0, 1], [4, 2], [3, 3]]), np.asarray([1, 0, 4])
    weights = np.asarray([1.0, 2.0, 0.5])

    def fit():
        return laplax_kfac.kfac(
            tied,
            TIED,
            {"input": data[0], "target": data[1], "weight": weights},
            loss_fn="cross_entropy",
            kfac_approx=kfac_approx,
            **options,
        )

    whole = fit()  # five or four columns: of the last window some are zeros
    monkeypatch.setattr("laplax_kfac.curvature.passes.columns_at_once", lambda *_: at_once)
    tune_machine(monkeypatch, record_bytes=2**20)  # not compiled before
    for got, expected in zip(*(to_dense(c) for c in (fit(), whole)), strict=True):
        assert np.abs(got).max() > 0
        np.testing.assert_allclose(got, expected, **tolerance(jnp.float64))


@pytest.mark.parametrize("columns", [1, 4])
def test_records_of_one_example_are_bounded_too(columns, monkeypatch):
    tokens, width, classes = 50, 20, 10
    params = layers(3, width, classes)

    def pooled(input, params):
        hidden = jnp.tanh(input @ params["l0"]["w"] + params["l0"]["b"])
        return jnp.mean(hidden, axis=0) @ params["l1"]["w"] + params["l1"]["b"]

    def largest():
        fit = jax.make_jaxpr(
            lambda *data: laplax_kfac.kfac(pooled, params, data, loss_fn="cross_entropy")
        )
        return max(sizes(fit(normal(1, tokens, 3), np.zeros(1, int)).jaxpr))

    assert largest() >= (classes - 1) * tokens * width
    inputs, column = tokens * 4 + width + 1, tokens * width + classes
    tune_machine(monkeypatch, record_bytes=4 * (inputs + columns * column))
    assert largest() <= columns * tokens * width


def test_parts_and_batches_and_weights_go_together(monkeypatch):
    x, y = normal(7, 4, seed=1), np.arange(7) % 3
    weights = np.asarray([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    kept = weights == 1.0
    expected = gained_fit((x[kept], y[kept]))
    bounded(monkeypatch, 2)
    acc = laplax_kfac.accumulator(gained, GAINED, loss_fn="cross_entropy")
    state: Any = acc.update(acc.init(), (x, y), jnp.asarray(weights))
    assert (state.num_examples, state.num_updates) == (5, 1)
    padded = gained_fit(cuts(x[kept], y[kept], 3), batch_size=3)  # of 3 and 2, each in 2 parts
    for found in (acc.finalize(state), padded):
        np.testing.assert_allclose(to_dense(found), to_dense(expected), **tolerance(jnp.float64))


def test_every_part_draws_anew_and_both_passes_the_same(monkeypatch):
    bounded(monkeypatch, 1, "mc")
    # Equal examples with equal draws would give a matrix B of rank 1.
    acc = laplax_kfac.accumulator(*SMALL, loss_fn="mse", fisher_type="mc")
    state: Any = acc.update(acc.init(), (np.ones((2, 4)), np.zeros((2, 3))))
    assert jnp.linalg.matrix_rank(state.sums[-1].outputs[0, 0]) == 2
    # An example of weight zero adds a part but nothing to the sums: one draw of one example is
    # exact, and so unchanged by the correction if that draws the same.
    batch, weights = {"input": np.ones((2, 4)), "target": np.zeros((2, 3))}, jnp.asarray([1.0, 0.0])
    curv = acc.finalize(acc.update(acc.init(), batch, weights))
    corrected = acc.correct(curv, [(batch, weights)])
    assert curv.trace() > 0
    np.testing.assert_allclose(to_dense(corrected), to_dense(curv), **tolerance(jnp.float64))


@pytest.mark.parametrize("correction", [False, True], ids=["kfac", "ekfac"])
def test_no_array_holds_the_records_of_all_examples(correction, monkeypatch):
    n = 211
    data = normal(n, 4, seed=1), np.arange(n) % 3
    records = n * 2 * 3  # the cotangents of any one layer: two columns of three outputs

    def largest():
        fit = jax.make_jaxpr(lambda *data: gained_fit(data, eigenvalue_correction=correction))
        return max(sizes(fit(*data).jaxpr))

    assert largest() >= records
    bounded(monkeypatch, 4)
    # The inputs themselves are n x 4 numbers, and a few more with padding.
    assert largest() < (n + 4) * 5 < records


# -- derivative rules of the user's own --------------------------------------------------------


@jax.custom_vjp
def _clipped(x):
    return jnp.tanh(x)


_clipped.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@pytest.mark.parametrize("target", ["mse", "classes"])
@pytest.mark.parametrize("fisher_type", ORACLES)
def test_rules_that_are_not_linear_give_the_jacobian_of_jacrev(target, fisher_type):
    """The Jacobian is what unit vectors are pulled back to; a gradient is one pullback."""
    model_fn, params = chain(_clipped), layers(4, 5, 3)
    loss_fn, make = TARGETS[target]
    data = normal(1, 4, seed=1), make(1, 3)
    curvature = laplax_kfac.kfac(model_fn, params, data, loss_fn=loss_fn, fisher_type=fisher_type)
    exact = ORACLES[fisher_type](model_fn, params, data, loss_fn)
    if fisher_type == "empirical":  # the oracle goes through the Jacobian
        gradient = ravel_pytree(
            jax.grad(lambda p: LOSSES[loss_fn](model_fn(data[0][0], p), data[1][0]))(params)
        )[0]
        exact = jnp.outer(gradient, gradient)
    mask = block_mask(params, groups(params, separate=False))
    np.testing.assert_allclose(curvature.to_dense(), exact * mask, **tolerance(jnp.float64))
