"""Lookups keep the contract, at indices out of bounds too."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.models import normal
from support.patterns import ATOL, both_sides, pattern_of

from laplax_kfac import patterns

pytestmark = pytest.mark.usefixtures("x64")


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
