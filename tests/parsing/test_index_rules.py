"""The index rules do to indices what JAX does to numbers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import SingleDeviceSharding

from laplax_kfac import jaxprs
from laplax_kfac.parsing.index_rules import INDEX_RULES, align_scan_axes
from laplax_kfac.parsing.values import FOREIGN


@dataclass(frozen=True)
class Case:
    """A function of one primitive, and the shapes of its arguments."""

    name: str
    primitive: str
    function: Any
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 4),)


CASES = [
    Case("reshape", "reshape", lambda x: x.reshape(4, 6)),
    Case("reshape_transposed", "reshape", lambda x: lax.reshape(x, (6, 4), dimensions=(2, 0, 1))),
    Case("reshape_to_scalar", "reshape", lambda x: lax.reshape(x, ()), ((1, 1),)),
    Case("transpose", "transpose", lambda x: x.transpose(2, 0, 1)),
    Case("squeeze", "squeeze", lambda x: jnp.squeeze(x, (0, 2)), ((1, 3, 1, 2),)),
    Case("broadcast_new_axes", "broadcast_in_dim", lambda x: jnp.broadcast_to(x, (5, 2, 3, 4))),
    Case(
        "broadcast_inner_axis",
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (2, 5, 3), (0, 2)),
        ((2, 3),),
    ),
    Case(
        "broadcast_axis_of_one",
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (2, 3), (0, 1)),
        ((2, 1),),
    ),
    Case("broadcast_scalar", "broadcast_in_dim", lambda x: lax.broadcast(x, (3, 2)), ((),)),
    Case("slice", "slice", lambda x: x[:, 1:, :2]),
    Case("slice_with_strides", "slice", lambda x: lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 3))),
    Case("split", "split", lambda x: jnp.split(x, [1, 3], axis=2)),
    Case("concatenate", "concatenate", lambda *xs: jnp.concatenate(xs, 1), ((2, 3), (2, 1))),
    Case("stack", "stack", lambda *xs: jnp.stack(xs, 1), ((2, 3), (2, 3))),
    Case("unstack", "unstack", lambda x: jnp.unstack(x, axis=1)),
    Case("reverse", "rev", lambda x: lax.rev(x, (0, 2))),
    Case("tile", "tile", lambda x: jnp.tile(x, (2, 1, 3))),
    Case("cast", "convert_element_type", lambda x: x.astype(jnp.bfloat16)),
    Case("reduce_precision", "reduce_precision", lambda x: lax.reduce_precision(x, 8, 10)),
    Case("copy", "copy", jnp.copy),
    Case("name", "name", lambda x: checkpoint_name(x, "x")),
    Case("barrier", "optimization_barrier", lambda *xs: lax.optimization_barrier(xs), ((2,), (3,))),
    Case(
        "sharding",
        "sharding_constraint",
        lambda x: lax.with_sharding_constraint(x, SingleDeviceSharding(jax.devices()[0])),
    ),
]  # fmt: skip

# Primitives of other versions of JAX: this one has no function that makes them.
ELSEWHERE = {"expand_dims", "copy_p"}
NEWER = {"stack", "unstack"}
"""Primitives that the oldest JAX that is supported does without."""


def test_every_rule_has_a_case():
    assert {case.primitive for case in CASES} == set(INDEX_RULES) - ELSEWHERE


@pytest.mark.parametrize("scans", [(), (2,), (3, 2)], ids=["no_scan", "one_scan", "two_scans"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_rules_do_what_jax_does(case, scans):
    rng = np.random.default_rng(0)
    sizes = [int(np.prod(shape)) for shape in case.shapes]
    offsets = np.cumsum([0, *sizes])
    # Ids in another order in every iteration: below 256, so that they are exact in bfloat16.
    arrays = [
        np.stack([rng.permutation(n) + k for _ in range(int(np.prod(scans)))], axis=-1)
        .reshape((*shape, *scans))
        for n, k, shape in zip(sizes, offsets, case.shapes, strict=False)
    ]  # fmt: skip
    examples = [jnp.zeros(shape) for shape in case.shapes]
    eqns = jax.make_jaxpr(case.function)(*examples).eqns
    if case.primitive in NEWER and case.primitive not in {e.primitive.name for e in eqns}:
        pytest.skip("this JAX has no such primitive")
    (eqn,) = eqns
    assert eqn.primitive.name == case.primitive
    found = INDEX_RULES[case.primitive](eqn, arrays)
    for place in np.ndindex(*scans):
        ids = [jnp.asarray(a[(..., *place)], jnp.float32) for a in arrays]
        expected = jax.tree.leaves(case.function(*ids))
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours[(..., *place)], np.asarray(theirs, int))


def test_expand_dims_of_other_versions():
    eqn = jax.make_jaxpr(lambda x: x[None])(jnp.zeros(2)).eqns[0]
    eqn = eqn.replace(params={"dimensions": (0, 2)})
    x = np.arange(6).reshape(2, 3)
    (found,) = INDEX_RULES["expand_dims"](eqn, [x])
    np.testing.assert_array_equal(found, x[None, :, None])


def test_rules_keep_foreign_entries():
    function = lambda x, y: jnp.concatenate([x, y])  # noqa: E731
    jaxpr = jax.make_jaxpr(function)(jnp.zeros(2), jnp.zeros(3))
    (found,) = INDEX_RULES["concatenate"](jaxpr.eqns[0], [np.arange(2), np.full(3, FOREIGN)])
    np.testing.assert_array_equal(found, [0, 1, FOREIGN, FOREIGN, FOREIGN])


def test_scan_axes_are_broadcast_against_each_other():
    x, y = np.arange(6).reshape(2, 3), np.arange(8).reshape(1, 2, 4)
    wide_x, wide_y = align_scan_axes([x.reshape(2, 3, 1), y], [2, 2])
    assert wide_x.shape == (2, 3, 4)
    assert wide_y.shape == (1, 2, 4)
    np.testing.assert_array_equal(wide_x, np.repeat(x[..., None], 4, axis=-1))
    np.testing.assert_array_equal(wide_y, y)


def test_rules_are_those_of_one_equation_of_a_chain():
    """Applied one after the other, the rules follow a parameter through a whole function."""

    def function(w):
        first, second = jnp.split(w.T[::-1].reshape(2, 6), 2, axis=1)
        return jnp.stack([second, first], axis=1)[:, :, None]

    jaxpr = jax.make_jaxpr(function)(jnp.zeros((4, 3))).jaxpr
    env = dict(zip(jaxpr.invars, [np.arange(12).reshape(4, 3)], strict=True))
    for eqn in jaxpr.eqns:
        outputs = INDEX_RULES[eqn.primitive.name](eqn, [env[v] for v in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
    expected = function(jnp.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(env[jaxpr.outvars[0]], expected)
    assert jaxprs.shape(jaxpr.outvars[0]) == expected.shape
