"""The report tells the truth about layers, shares and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models

import laplax_kfac
from laplax_kfac.factors import KroneckerSums
from laplax_kfac.report import LayerReport, memory

NAMES = [m.name for m in models.MODELS]


def report_of(name, **options):
    model_fn, params, inputs, _ = models.by_name(name).make()
    one = jax.tree.map(lambda x: x[0], inputs)
    return laplax_kfac.find_layers(model_fn, params, one, **options)


def rows_of(report):
    """The printed table, by columns; cells are read by where the header says they begin.

    Reasons are in the place of the numbers that refer to them.
    """
    lines = str(report).splitlines()
    header = lines[0]
    names = header.split()
    starts = [header.index(f"{n}") if k == 0 else header.index(f" {n}") + 1
              for k, n in enumerate(names)]  # fmt: skip
    ends = [*starts[1:], None]
    body = lines[2 : lines.index("")]
    notes = dict(line.split(" ", 1) for line in lines if line.startswith("["))
    rows = [
        {n: line[a:b].strip() for n, a, b in zip(names, starts, ends, strict=True)} for line in body
    ]
    return [{**row, "why": notes[row["why"]] if row["why"] else ""} for row in rows]


def test_columns():
    report = report_of("nnx_layer_norm")
    assert str(report).splitlines()[0].split() == [
        "layer", "use", "block", "shape", "S", "stack", "params", "memory", "why"
    ]  # fmt: skip
    rows = rows_of(report)
    assert rows[0] == {
        "layer": "lin", "use": "product", "block": "kronecker", "shape": "4+1 x 5", "S": "1",
        "stack": "1", "params": "25", "memory": "200 B", "why": "",
    }  # fmt: skip
    scale = rows[2]
    assert scale["layer"] == "norm/scale"
    assert (scale["shape"], scale["params"], scale["memory"]) == ("5", "5", "100 B")
    assert "elementwise" in scale["why"]


def test_positions_and_stacks_have_columns():
    (row,) = rows_of(report_of("grouped_einsum"))
    assert (row["shape"], row["S"], row["stack"], row["params"]) == ("3+1 x 4", "5", "2", "32")


def test_several_uses_are_told():
    (row,) = rows_of(report_of("tied"))
    assert "nearest Kronecker product of the sum of 2 uses" in row["why"]


@pytest.mark.parametrize("name", NAMES)
def test_shares_are_those_of_all_parameters(name):
    report = report_of(name)
    kinds = ("kronecker ", "dense ", "diagonal ", "none ")
    table = str(report).splitlines()
    lines = [line for line in table[table.index("") :] if line.startswith(kinds)]
    counts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines}
    shares = [float(line.split()[-1].rstrip("%")) for line in lines]
    _, params, *_ = models.by_name(name).make()
    assert sum(counts.values()) == models.num_parameters(params)
    assert sum(shares) == pytest.approx(100.0, abs=0.05 * len(shares) + 1e-9)
    for block, count in counts.items():
        assert count == sum(layer.size for layer in report if layer.block == block)
    assert 0 not in counts.values()


@pytest.mark.parametrize(
    "name",
    ["mlp", "grouped_einsum", "scan_over_layers", "nnx_layer_norm", "leaves_that_do_not_count",
     "embedding", "tied_autoencoder"],
)  # fmt: skip
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_memory_is_that_of_the_statistics(name, separate):
    """In float32, counted on the arrays that an accumulation holds."""
    model_fn, params, inputs, _ = models.by_name(name).make()
    report = report_of(name, separate_weight_and_bias=separate)
    accumulator = laplax_kfac.accumulator(
        model_fn, params, loss_fn="mse", separate_weight_and_bias=separate
    )
    output = jax.eval_shape(
        jax.vmap(lambda x: model_fn(input=x, params=params)), inputs
    )  # fmt: skip
    statistics = accumulator.update(
        accumulator.init(), (inputs, jnp.zeros(output.shape, output.dtype))
    )
    expected = 0
    for layer, sums in zip(statistics.layers, statistics.sums, strict=True):
        arrays = jax.tree.leaves(sums)
        if isinstance(sums, KroneckerSums):
            arrays = [sums.inputs, sums.outputs]  # and the counts, a number each
        held = sum(a.size for a in arrays) * 4
        assert memory(layer) == held, layer.name
        expected += held
    assert sum(map(memory, report)) == expected


def test_total_memory_is_readable():
    def line(*sizes):
        layer = report_of("mlp_without_bias")[0]
        layers = [
            laplax_kfac.Layer(
                f"l{k}", layer.pattern, layer.params, "diagonal", size, 1, segments=layer.segments
            )
            for k, size in enumerate(sizes)
        ]
        lines = str(LayerReport(layers, num_outputs=3)).splitlines()
        return next(line for line in lines if line.startswith("memory of the factors"))

    assert line(10) == "memory of the factors: 40 B"
    assert line(249, 1) == "memory of the factors: 1 kB"
    assert line(10_000) == "memory of the factors: 40 kB"
    assert line(1_000_000, 500_000) == "memory of the factors: 6 MB"
    assert line(10**12) == "memory of the factors: 4 TB"


def test_memory_of_the_whole_fit():
    report = report_of("mlp_without_bias")
    eigenvectors = sum(ly.rows**2 + ly.out_features**2 + ly.size for ly in report)
    *_, second, third, fourth = str(report).splitlines()
    assert second == f"memory of their eigenvectors and eigenvalues: {4 * eigenvectors} B"
    assert third.startswith("peak of their decomposition: ")
    assert report.finalization_bytes > report.factor_bytes + report.basis_bytes
    columns = report.num_outputs - 1
    assert fourth.startswith("peak of a pass: about ")
    assert fourth.endswith(f" (batches of 256, {columns} columns pulled back for every example)")


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, 2),
        ({"fisher_type": "mc", "mc_samples": 5}, 5),
        ({"fisher_type": "empirical"}, 1),
        ({"sketches": 1}, 1),
        ({"fisher_type": "forward_only"}, 0),
    ],
    ids=str,
)
def test_the_report_follows_the_fisher_type(options, columns):
    report = report_of("mlp_without_bias", batch_size=7, **options)
    assert report.work.columns == columns
    assert f"(batches of 7, {columns} columns pulled back" in str(report)
    sides = {layer.sides[1] for layer in report}
    assert sides == ({"identity"} if columns == 0 else {"dense"})


def test_layers_by_name_and_by_number():
    layers = report_of("mlp")
    assert layers["lin2"] is layers[1]
    assert layers[-1] is layers[1]
    assert [layer.name for layer in layers] == ["lin1", "lin2"]
    assert len(layers[:1]) == 1
    assert repr(layers) == str(layers)


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(
        KeyError, match=r"no layer is named 'lin3'; the names are \['lin1', 'lin2'\]"
    ):
        report_of("mlp")["lin3"]


def test_example_may_be_numpy_or_a_pytree():
    model_fn, params, inputs, _ = models.by_name("two_inputs_and_two_outputs").make()
    one = jax.tree.map(lambda x: np.asarray(x[0]), inputs)
    assert [layer.name for layer in laplax_kfac.find_layers(model_fn, params, one)] == [
        "one", "out", "two"
    ]  # fmt: skip


def repeated(names, size=3):
    layer = report_of("mlp_without_bias")[0]
    return [
        laplax_kfac.Layer(
            name, "dense", layer.params, "kronecker", size, 4, segments=layer.segments
        )
        for name in names
    ]


def test_repeated_layers_are_one_row():
    names = [f"block_{k}/attention/query" for k in range(12)]
    (row,) = rows_of(LayerReport(repeated(names), num_outputs=2))
    assert row["layer"] == "block_*/attention/query (x 12)"
    assert row["params"] == "144"
    assert row["memory"] == "1.2 kB"


def test_only_numbers_that_differ_are_masked_and_pairs_stay():
    layers = [*repeated([f"h{k}/w2" for k in range(3)]), *repeated(["a1", "a2"])]
    rows = rows_of(LayerReport(layers, num_outputs=2))
    assert [row["layer"] for row in rows] == ["h*/w2 (x 3)", "a1", "a2"]


def test_layers_of_other_shapes_are_rows_of_their_own():
    layers = [*repeated(["l0", "l1", "l2"]), *repeated(["l3", "l4", "l5"], size=7)]
    rows = rows_of(LayerReport(layers, num_outputs=2))
    assert [(row["layer"], row["shape"]) for row in rows] == [
        ("l* (x 3)", "3 x 4"), ("l* (x 3)", "7 x 4")
    ]  # fmt: skip


def test_legend_only_where_it_explains_something():
    assert "stack:" in str(report_of("grouped_einsum"))
    assert "S:" not in str(report_of("mlp_without_bias"))


def test_advice_on_large_diagonals():
    def model_fn(input, params):
        return jnp.tanh(input * params["scale"]).reshape(-1, 4).sum(0) @ params["out"]

    params = {"scale": jnp.ones(400), "out": jnp.ones((4, 3))}
    report = laplax_kfac.find_layers(model_fn, params, jnp.ones(400))
    (advice,) = report.advice()
    assert "97% of the parameters have a diagonal" in advice
    assert "'scale'" in advice
    assert advice in str(report)
    assert not report_of("mlp").advice()


def test_advice_on_many_columns():
    report = laplax_kfac.find_layers(
        lambda input, params: params["e"][input] @ params["h"],
        {"e": jax.ShapeDtypeStruct((32000, 2048), jnp.float32),
         "h": jax.ShapeDtypeStruct((2048, 32000), jnp.float32)},
        jax.ShapeDtypeStruct((128,), jnp.int32),
    )  # fmt: skip
    assert "TB, more than there is (batches of 256, 4095872 columns" in str(report)
    (advice,) = report.advice()
    assert "sketches=32" in advice
