"""Every pattern keeps its contract, outputs = inputs @ weight; and users can add patterns."""

import inspect
import itertools
import math
import textwrap
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from support import oracles
from support.models import normal
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac import patterns
from laplax_kfac.patterns import contract as module

pytestmark = pytest.mark.usefixtures("x64")

ATOL = tolerance(jnp.float64)["atol"]


@pytest.fixture
def registry(monkeypatch):
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))


def pattern_of(eqn):
    """The pattern of an equation that has one."""
    pattern = patterns.find(eqn)
    assert pattern is not None
    return pattern


def both_sides(function, operand, *values):
    """outputs and inputs @ weight of a function of one equation, compiled once."""
    (eqn,) = jax.make_jaxpr(function)(*values).eqns
    pattern = pattern_of(eqn)
    others = tuple(v for k, v in enumerate(values) if k != operand)

    @jax.jit
    def sides(values, others):
        weight = pattern.weight(eqn, operand, values[operand])
        inputs = pattern.inputs(eqn, operand, others)
        if pattern.indexed:
            inputs = patterns.one_hot(inputs, weight.shape[1])
        outputs = pattern.outputs(eqn, operand, function(*values))
        return outputs, jnp.einsum("tki,kio->tko", inputs, weight)

    return sides(values, others)


# -- dense -------------------------------------------------------------------------------------

SIZES = {"b": 2, "c": 3, "i": 4, "j": 5, "o": 3, "p": 2, "s": 5, "t": 3}
# Axes of the weight and of the data: b, c of both (stack), i, j contracted, o, p and s, t free.
PRODUCTS = [("io", "si"), ("bio", "bsi"), ("ijo", "sij"), ("iop", "ist"), ("bcio", "sbci"),
            ("bijo", "tbisj"), ("ijop", "sij")]  # fmt: skip


def numbers_of(operands):
    """dot_general's dimension numbers and einsum's equation of two operands given by letters."""
    first, second = operands
    batch = [a for a in "bc" if a in first and a in second]
    inner = [a for a in "ij" if a in first and a in second]
    free = [a for a in first + second if a not in batch + inner]
    numbers = [[tuple(d.index(a) for a in axes) for d in operands] for axes in (inner, batch)]
    return numbers, f"{first},{second}->{''.join(batch + free)}"


@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
@pytest.mark.parametrize(("weight", "data"), PRODUCTS, ids="_".join)
def test_dense_with_every_order_of_axes(weight, data, side):
    for shift, w in enumerate(map("".join, itertools.permutations(weight))):
        x = data[shift % len(data) :] + data[: shift % len(data)]
        operands = [w, x] if side == 0 else [x, w]
        numbers, equation = numbers_of(operands)
        rng = np.random.default_rng(shift)
        values = [rng.normal(size=[SIZES[a] for a in d]) for d in operands]
        (eqn,) = jax.make_jaxpr(lambda a, b, n=numbers: lax.dot_general(a, b, n))(*values).eqns
        pattern = pattern_of(eqn)
        # The pattern only rearranges, so that numpy can do it.
        outputs = pattern.outputs(eqn, side, np.einsum(equation, *values))
        matrices = pattern.weight(eqn, side, values[side])
        inputs = pattern.inputs(eqn, side, (values[1 - side],))
        size = {a: math.prod(SIZES[b] for b in weight if b in a) for a in ("bc", "ij", "op")}
        assert matrices.shape == tuple(size.values())
        products = np.einsum("tki,kio->tko", inputs, matrices)
        np.testing.assert_allclose(outputs, products, atol=ATOL, err_msg=equation)


def test_dense_reads_the_axes_of_its_weight():
    """In einsum's letters: stack of the batch axes, in of the contracted, out of the free ones."""
    x, w = normal((2, 5, 4)), normal((4, 3, 2), seed=1)  # b s i, i o b
    (eqn,) = jax.make_jaxpr(lambda x, w: lax.dot_general(x, w, (((2,), (0,)), ((0,), (2,)))))(
        x, w
    ).eqns
    pattern = pattern_of(eqn)
    np.testing.assert_array_equal(pattern.weight(eqn, 1, w), np.einsum("iob->bio", w))
    np.testing.assert_array_equal(pattern.inputs(eqn, 1, (x,)), np.einsum("bsi->sbi", x))
    np.testing.assert_array_equal(pattern.weight(eqn, 0, x), np.einsum("bsi->bis", x))
    np.testing.assert_array_equal(pattern.inputs(eqn, 0, (w,)), np.einsum("iob->obi", w))
    assert patterns.check(lambda x, w: eqn.primitive.bind(x, w, **eqn.params), 0, x, w) < ATOL


# -- conv --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """Options of a convolution of two channels in (for each group) and three out."""

    name: str
    space: tuple[int, ...] = (5, 6)
    kernel: tuple[int, ...] = (2, 3)
    strides: tuple[int, ...] = (1, 1)
    padding: Any = "VALID"
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    groups: int = 1
    channels: int = 2  # per group
    layout: tuple[str, str, str] = ("NCHW", "OIHW", "NCHW")
    batch: int = 1

    def operands(self):
        """The function, and its operands in the layout."""
        letters = "".join(a for a in self.layout[1] if a not in "OI")
        sizes = dict(zip(letters, zip(self.space, self.kernel, strict=True), strict=True))
        x_size = {"N": self.batch, "C": self.channels * self.groups}
        w_size = {"O": 3 * self.groups, "I": self.channels}
        x = tuple(x_size.get(a) or sizes[a][0] for a in self.layout[0])
        w = tuple(w_size.get(a) or sizes[a][1] for a in self.layout[1])

        def function(x, w):
            return lax.conv_general_dilated(
                x, w, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation,
                self.layout, self.groups,
            )  # fmt: skip

        return function, normal(x), normal(w, seed=1)


LINE: dict[str, Any] = {
    "space": (7,),
    "kernel": (3,),
    "strides": (1,),
    "layout": ("NCW", "OIW", "NCW"),
}
CUBE: dict[str, Any] = {
    "space": (3, 4, 3),
    "kernel": (2, 1, 3),
    "strides": (1, 2, 1),
    "layout": ("NDHWC", "DHWIO", "NDHWC"),
}
CONVS = [
    Conv("plain"),
    Conv("same", padding="SAME"),
    Conv("strided", strides=(2, 3)),
    Conv("uneven_padding", padding=((1, 0), (0, 2))),
    Conv("negative_padding", padding=((-1, 0), (2, -1))),
    Conv("dilated", rhs_dilation=(2, 2), padding=((1, 2), (0, 1))),
    Conv("transposed", lhs_dilation=(2, 3), padding=((1, 1), (2, 2))),
    Conv(
        "both_dilated",
        lhs_dilation=(2, 1),
        rhs_dilation=(1, 2),
        strides=(2, 1),
        padding=((0, 1), (2, 0)),
    ),
    Conv("grouped", groups=2, strides=(2, 1)),
    Conv("depthwise", groups=3, channels=1, padding="SAME"),
    Conv("channels_last", layout=("NHWC", "HWIO", "NHWC"), strides=(2, 1)),
    Conv("grouped_channels_last", layout=("NHWC", "HWIO", "NHWC"), groups=2),
    Conv("odd_layout", layout=("HWNC", "IOHW", "CWNH"), padding=((1, 0), (0, 0))),
    Conv("odd_grouped_layout", layout=("CHNW", "WOHI", "WCNH"), groups=2),
    Conv("several_examples", batch=3, layout=("HNWC", "HWIO", "HWNC")),
    Conv("one_entry_of_the_kernel", kernel=(1, 1)),
    Conv("as_large_as_the_image", kernel=(5, 6)),
    Conv("line", **LINE),
    Conv(
        "line_dilated_in_groups",
        **LINE,
        rhs_dilation=(2,),
        lhs_dilation=(2,),
        groups=2,
        padding=((1, 1),),
    ),
    Conv("cube", **CUBE),
    Conv("cube_transposed", **CUBE, lhs_dilation=(1, 2, 2), padding=((0, 1), (1, 0), (1, 1))),
    Conv("no_space", space=(), kernel=(), strides=(), layout=("NC", "OI", "NC")),
]


@pytest.mark.parametrize("case", CONVS, ids=lambda c: c.name)
def test_conv(case):
    function, x, w = case.operands()
    outputs, products = both_sides(function, 1, x, w)
    assert outputs.size > 0
    np.testing.assert_allclose(outputs, products, atol=ATOL)


@pytest.mark.parametrize(
    "case", [c for c in CONVS if c.groups == 1 and len(c.space) < 3], ids=lambda c: c.name
)
def test_conv_with_the_weight_on_the_left(case):
    """As `jnp.convolve` has it where the filter is longer than the signal."""
    function, w, x = case.operands()
    outputs, products = both_sides(function, 0, w, x)
    assert outputs.size > 0
    np.testing.assert_allclose(outputs, products, atol=ATOL)


def test_conv_has_a_position_for_every_pixel_and_a_stack_for_the_groups():
    function, x, w = Conv("", groups=2, strides=(2, 1), batch=3).operands()
    (eqn,) = jax.make_jaxpr(function)(x, w).eqns
    pattern = pattern_of(eqn)
    pixels = 3 * 2 * 4
    assert pattern.inputs(eqn, 1, (x,)).shape == (pixels, 2, 2 * 6)
    assert pattern.weight(eqn, 1, w).shape == (2, 2 * 6, 3)
    assert pattern.outputs(eqn, 1, function(x, w)).shape == (pixels, 2, 3)


on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="from the inputs elsewhere")
WITH_MOMENTS = [
    c for c in CONVS
    if c.groups == 1 and c.kernel and c.strides[0] < c.kernel[0] < c.space[0]
]  # fmt: skip


@pytest.fixture
def moments_of_any_size(monkeypatch):
    monkeypatch.setattr("laplax_kfac.patterns.convolution._LEAST_WORK", 0)


@on_a_cpu
@pytest.mark.usefixtures("moments_of_any_size")
@pytest.mark.parametrize("case", WITH_MOMENTS, ids=lambda c: c.name)
def test_moments_of_a_conv_are_those_of_its_inputs(case):
    function, x, w = case.operands()
    (eqn,) = jax.make_jaxpr(function)(x, w).eqns
    pattern = pattern_of(eqn)
    assert pattern.moments is not None
    moments = pattern.moments(eqn, 1)
    assert moments is not None
    x, weights = normal((4, *x.shape)), jnp.asarray([1.0, 0.0, 0.5, 2.0])

    @jax.jit
    def both(x):
        inputs = jax.vmap(lambda x: pattern.inputs(eqn, 1, (x,)))(x)
        second = jnp.einsum("n,ntki,ntkj->kij", weights, inputs, inputs)
        return moments((x,), weights), (second, jnp.einsum("n,ntki->ki", weights, inputs))

    for found, expected in zip(*both(x), strict=True):
        np.testing.assert_allclose(found, expected, atol=ATOL)


@on_a_cpu
def test_small_convs_have_no_moments_to_compile():
    for channels, worth in ((2, False), (10, True)):
        function, x, w = Conv("", space=(9, 9), channels=channels).operands()
        (eqn,) = jax.make_jaxpr(function)(x, w).eqns
        moments = pattern_of(eqn).moments
        assert moments is not None
        assert (moments(eqn, 1) is not None) == worth


@on_a_cpu
@pytest.mark.usefixtures("moments_of_any_size")
def test_convs_without_moments_that_are_cheaper_than_their_inputs():
    names = ("grouped", "as_large_as_the_image", "one_entry_of_the_kernel", "no_space")
    for case in (c for c in CONVS if c.name in names):
        function, x, w = case.operands()
        (eqn,) = jax.make_jaxpr(function)(x, w).eqns
        moments = pattern_of(eqn).moments
        assert moments is not None
        assert moments(eqn, 1) is None
    function, w, x = Conv("weight on the left").operands()
    (eqn,) = jax.make_jaxpr(function)(w, x).eqns
    assert patterns.CONV.moments is not None
    assert patterns.CONV.moments(eqn, 0) is None


def test_inputs_of_a_conv_are_in_the_order_of_places_then_channels():
    function, x, w = Conv("", layout=("NHWC", "HWIO", "NHWC")).operands()
    (eqn,) = jax.make_jaxpr(function)(x, w).eqns
    pattern = pattern_of(eqn)
    np.testing.assert_array_equal(pattern.weight(eqn, 1, w)[0], w.reshape(-1, w.shape[-1]))
    np.testing.assert_array_equal(pattern.inputs(eqn, 1, (x,))[0, 0], x[0, :2, :3].ravel())


def test_patches_are_exact():
    """A selection of entries rounds nothing."""
    function, x, w = Conv("").operands()
    x = x.astype(jnp.float32) * 1e6 + 0.123
    (eqn,) = jax.make_jaxpr(function)(x, w.astype(jnp.float32)).eqns
    patches = pattern_of(eqn).inputs(eqn, 1, (x,))
    assert set(np.asarray(patches).ravel().tolist()) <= set(np.asarray(x).ravel().tolist())


def test_conv_with_batch_groups_has_no_weight():
    def function(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", batch_group_count=2)

    x, w = normal((2, 2, 4, 4)), normal((2, 2, 2, 2), seed=1)
    with pytest.raises(ValueError, match="must be one equation of a registered primitive"):
        patterns.check(function, 1, x, w)


# -- embedding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lookup:
    """A gather from a table, by `lax.GatherDimensionNumbers`."""

    name: str
    table: tuple[int, ...]
    indices: tuple[int, ...]
    offset: tuple[int, ...]
    collapsed: tuple[int, ...]
    index_map: tuple[int, ...]
    slices: tuple[int, ...]
    batching: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    mode: str = "clip"

    def operands(self):
        """The function, the table and the indices."""
        numbers = lax.GatherDimensionNumbers(
            self.offset, self.collapsed, self.index_map, *self.batching
        )
        limits = [self.table[d] for d in self.index_map]
        rng = np.random.default_rng(0)
        indices = np.stack([rng.integers(n, size=self.indices) for n in limits], axis=-1)

        def function(table, indices):
            return lax.gather(table, indices, numbers, self.slices, mode=self.mode)

        return function, normal(self.table), jnp.asarray(indices)


LOOKUPS = [
    Lookup("rows", (7, 4), (5,), (1,), (0,), (0,), (1, 4)),
    Lookup("rows_filled", (7, 4), (5,), (1,), (0,), (0,), (1, 4), mode="fill"),
    Lookup("rows_as_promised", (7, 4), (5,), (1,), (0,), (0,), (1, 4), mode="promise_in_bounds"),
    Lookup("rows_of_matrices", (7, 4, 2), (5,), (1, 2), (0,), (0,), (1, 4, 2)),
    Lookup("rows_for_a_grid", (7, 4), (2, 3), (1,), (0,), (0,), (1, 4)),
    Lookup("columns", (4, 7), (5,), (0,), (1,), (1,), (4, 1)),
    Lookup("rows_that_keep_their_axis", (7, 4), (5,), (1, 2), (), (0,), (1, 4)),
    Lookup("two_indices", (3, 5, 4), (6,), (1,), (0, 1), (0, 1), (1, 1, 4)),
    Lookup("two_indices_exchanged", (3, 5, 4), (6,), (1,), (0, 1), (1, 0), (1, 1, 4)),
    Lookup("entries", (7,), (5,), (), (0,), (0,), (1,)),
    Lookup("a_table_each", (2, 7, 4), (2, 5), (2,), (1,), (1,), (1, 1, 4), ((0,), (0,))),
]


@pytest.mark.parametrize("case", LOOKUPS, ids=lambda c: c.name)
def test_gather(case):
    function, table, indices = case.operands()
    outputs, products = both_sides(function, 0, table, indices)
    np.testing.assert_allclose(outputs, products, atol=ATOL)
    np.testing.assert_array_equal(
        np.sort(outputs.ravel()), np.sort(function(table, indices).ravel())
    )


@pytest.mark.parametrize("start", [0, 3, 6, 99, -2])
@pytest.mark.parametrize("axis", [0, 1])
def test_dynamic_slice_clamps_its_start(axis, start):
    def function(table, *starts):
        sizes = [1 if d == axis else 7 for d in range(2)]
        return lax.dynamic_slice(table, starts, sizes, allow_negative_indices=False)

    starts = [jnp.asarray(start if d == axis else 0) for d in range(2)]
    outputs, products = both_sides(function, 0, normal((7, 7)), *starts)
    np.testing.assert_allclose(outputs, products, atol=ATOL)


@pytest.mark.parametrize(("mode", "rows"), [("fill", [-1, 6, -1]), ("clip", [0, 6, 6])])
def test_row_numbers_out_of_bounds(mode, rows):
    function, table, _ = replace(LOOKUPS[0], mode=mode).operands()
    indices = jnp.asarray([[-1], [6], [7]])
    (eqn,) = jax.make_jaxpr(function)(table, indices).eqns
    found = pattern_of(eqn).inputs(eqn, 0, (indices,))
    np.testing.assert_array_equal(found, np.asarray(rows)[:, None, None])
    one_hot = patterns.one_hot(found, 7)
    assert one_hot.shape == (3, 1, 7)
    np.testing.assert_array_equal(one_hot.sum(-1)[:, 0], np.asarray(rows) >= 0)


def test_a_window_of_several_rows_is_no_lookup():
    case = Lookup("", (7, 4), (5,), (1, 2), (), (0,), (2, 4))
    function, table, indices = case.operands()
    with pytest.raises(ValueError, match="with operand 0 as its weight"):
        patterns.check(function, 0, table, indices % 5)


# -- check -------------------------------------------------------------------------------------


def test_check_finds_a_violation(registry):
    del registry
    dense = pattern_of(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns[0])
    operands = normal((5, 3)), normal((3, 4), seed=1)
    assert patterns.check(jnp.dot, 1, *operands) < ATOL
    doubled = replace(dense, inputs=lambda eqn, k, others: 2.0 * dense.inputs(eqn, k, others))
    patterns.register("dot_general", doubled)
    expected = float(jnp.max(jnp.abs(operands[0] @ operands[1])))
    np.testing.assert_allclose(patterns.check(jnp.dot, 1, *operands), expected)


@pytest.mark.parametrize(
    ("function", "found"),
    [(lambda x, w: jnp.sin(x) @ w, r"\['sin', 'dot_general'\]"), (jnp.add, r"\['add'\]"),
     (lambda x, _: x, r"\[\]")],
    ids=["two_equations", "not_registered", "no_equation"],
)  # fmt: skip
def test_check_names_what_it_found(function, found):
    x = jnp.ones((3, 3))
    with pytest.raises(ValueError, match=f"found the equations {found}; registered are .*dot_gen"):
        patterns.check(function, 1, x, x)


def test_check_wants_a_weight():
    function, x, w = Conv("", groups=2).operands()
    with pytest.raises(ValueError, match="with operand 0 as its weight"):
        patterns.check(function, 0, x, w)


# -- register ----------------------------------------------------------------------------------


def test_register_wants_a_name_and_a_pattern(registry):
    del registry
    dense = module._REGISTRY["dot_general"]
    with pytest.raises(TypeError, match="must be the primitive's name as a string, got Primitive"):
        patterns.register(Primitive("scaled_matmul"), dense)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a laplax_kfac\.patterns\.Pattern, got dict"):
        patterns.register("scaled_matmul", {})  # type: ignore[arg-type]


def make_scaled_matmul():
    """A primitive of a user: ``scale * x @ w``, with all its rules, by public JAX alone."""
    primitive = Primitive("scaled_matmul")

    def compute(x, w, *, scale):
        return scale * jnp.matmul(x, w)

    def batch(args, axes, *, scale):
        (x, w), (x_axis, w_axis) = args, axes
        assert w_axis is None, "the weights of a batch are the same"
        x = jnp.moveaxis(x, x_axis, 0)
        y = primitive.bind(x.reshape(-1, x.shape[-1]), w, scale=scale)
        return y.reshape(*x.shape[:-1], -1), 0

    primitive.def_impl(compute)
    primitive.def_abstract_eval(
        lambda x, w, **_: jax.core.ShapedArray((*x.shape[:-1], w.shape[1]), x.dtype)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    batching.primitive_batchers[primitive] = batch
    ad.defbilinear(
        primitive,
        lambda g, _, w, *, scale: scale * g @ w.T,
        lambda g, x, _, *, scale: scale * x.T @ g,
    )
    return primitive


def documented_example():
    """The lines of the module's docstring that register a pattern."""
    _, _, example = inspect.cleandoc(patterns.__doc__).partition("\n\n    register(")
    return textwrap.dedent("    register(" + example)


def test_a_users_pattern(registry):
    """The ten lines of the documentation make layers of a primitive that JAX does not know."""
    del registry
    primitive = make_scaled_matmul()

    def product(x, w):
        return primitive.bind(x, w, scale=3.0)

    def model_fn(input, params):
        h = jnp.tanh(product(input, params["user"]["w"]) + params["user"]["b"])
        return h @ params["head"]

    params = normal({"user": {"w": (4, 3), "b": (3,)}, "head": (3, 2)})
    inputs, cotangents = normal((6, 5, 4), seed=1), normal((6, 1, 5, 2), seed=2)
    before = laplax_kfac.find_layers(model_fn, params, inputs[0])
    assert "used by `scaled_matmul`, which no pattern covers" in before["user/w"].reason
    with pytest.raises(ValueError, match=r"found the equations \['scaled_matmul'\]"):
        patterns.check(product, 1, inputs[0], params["user"]["w"])

    exec(documented_example(), vars(patterns).copy())

    assert patterns.check(product, 1, inputs[0], params["user"]["w"]) < ATOL
    layer = laplax_kfac.find_layers(model_fn, params, inputs[0])["user"]
    assert (layer.pattern, layer.block, layer.bias) == ("scaled_matmul", "kronecker", True)
    assert (layer.in_features, layer.out_features, layer.positions) == (4, 3, 5)

    def loss(f, y):
        return jnp.sum(f * y)

    @jax.jit
    def records(params):
        return laplax_kfac.intermediates_and_gradients(
            model_fn, params, (inputs, cotangents[:, 0]), loss_fn=loss
        )

    found = records(params)["user"]
    exact = oracles.per_example_gradients(
        lambda p, x: model_fn(x, p), params, inputs, cotangents
    )["user"]  # fmt: skip
    products = jnp.einsum("nsi,nso->nio", found.inputs, found.gradients)
    np.testing.assert_allclose(products, exact["w"][:, 0], **tolerance(jnp.float64))
    sums = jnp.sum(found.gradients, axis=1)
    np.testing.assert_allclose(sums, exact["b"][:, 0], **tolerance(jnp.float64))
    assert math.prod(found.inputs.shape) == 6 * 5 * 4


def test_the_last_registration_wins(registry):
    del registry
    dense = module._REGISTRY["dot_general"]
    patterns.register("dot_general", replace(dense, name="mine"))
    params = {"w": jnp.ones((3, 2))}
    layers = laplax_kfac.find_layers(lambda input, params: input @ params["w"], params, jnp.ones(3))
    assert layers["w"].pattern == "mine"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", [(2, 3, 1), (0, 6, 0), (1, 2, 1)], ids=str)
def test_ragged_products_use_the_matrix_of_the_group(sizes):
    """Tokens behind the last group have no matrix: their outputs are zero."""
    x, w = normal((6, 4)), normal((3, 4, 2), seed=1)
    error = patterns.check(lax.ragged_dot, 1, x, w, jnp.asarray(sizes, jnp.int32))
    assert error < 1e-12
