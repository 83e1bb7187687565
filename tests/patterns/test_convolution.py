"""Convolutions of every kind keep the contract; their Gram matrices are those of patches."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.machines import tune_machine
from support.models import normal
from support.patterns import ATOL, both_sides, pattern_of

from laplax_kfac import patterns

pytestmark = pytest.mark.usefixtures("x64")


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
    tune_machine(monkeypatch, least_moment_work=0)


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


def test_check_wants_a_weight():
    function, x, w = Conv("", groups=2).operands()
    with pytest.raises(ValueError, match="with operand 0 as its weight"):
        patterns.check(function, 0, x, w)
