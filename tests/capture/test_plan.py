"""A plan names the equations of uses, wherever these are nested, and one zero for each output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import models

from laplax_kfac import jaxprs
from laplax_kfac.capture.plan import (
    is_fallback,
    members_of,
    perturbations_of_parameters,
    perturbations_of_uses,
    perturbed,
    plan_of,
)
from laplax_kfac.parsing.program import parse

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, LENGTH = 3, 4
X = np.ones(WIDTH)


def scanned(input, params):
    def body(h, _):
        return jnp.tanh(h @ params["w"]), None

    return lax.scan(body, input, None, length=LENGTH)[0] @ params["out"]


def branched(input, params):
    taken = lax.cond(
        input[0] > 0, lambda h: h @ params["w"], lambda h: jnp.tanh(h @ params["w"]), input
    )
    return taken @ params["out"]


def rematerialised(input, params):
    return jax.checkpoint(lambda h: jnp.tanh(h @ params["w"]))(input) @ params["out"]


def squared(input, params):
    return input * jnp.sum(params["w"][:2] ** 2) + jnp.sum(params["out"] ** 3)


WEIGHTS = {"w": np.ones((WIDTH, WIDTH)), "out": np.ones((WIDTH, 2))}
NESTED = [scanned, branched, rematerialised]


def uses_in(plan):
    here = [number for uses in plan.uses.values() for number, _ in uses]
    inside = [n for plans in plan.inside.values() for p in plans.values() for n in uses_in(p)]
    return [*here, *inside]


@pytest.mark.parametrize("model_fn", NESTED)
def test_every_use_is_planned_once_where_its_site_says(model_fn):
    program = parse(model_fn, WEIGHTS, X)
    plan = plan_of(program)
    assert sorted(uses_in(plan)) == sorted({m.claim.use for m in members_of(program)})
    for number, use in program.uses.items():
        here, (*path, last) = plan, use.site
        for equation, branch in zip(path[::2], path[1::2], strict=True):
            here = here.inside[equation][branch]
        assert number in [n for n, _ in here.uses[last]]
        assert last in here.perturbations


@pytest.mark.parametrize("model_fn", NESTED)
def test_zeros_are_like_the_outputs_with_an_axis_for_every_scan_around_them(model_fn):
    program = parse(model_fn, WEIGHTS, X)
    zeros = perturbations_of_uses(program)
    assert sorted(zeros) == sorted(set(plan_of(program).all_perturbations()))
    for number, zero in zeros.items():
        use = program.uses[number]
        assert zero.shape == (*use.scans, *jaxprs.spec(use.eqn.outvars[0]).shape)
        assert not zero.any()
    lengths = {use.scans for use in program.uses.values()}
    assert lengths == ({(LENGTH,), ()} if model_fn is scanned else {()})


def test_bodies_that_hold_a_rewrite_alone_are_planned_to_be_entered():
    def pooled(input, params):
        def pool(x):
            window = (1, 2, 2, 1)
            return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")

        return jax.checkpoint(pool)(input[None]).ravel() @ params["w"]

    params, image = {"w": jnp.ones((4, 2))}, jnp.ones((4, 4, 1))
    plan = plan_of(parse(pooled, params, image))
    (inside,) = [p for plans in plan.inside.values() for p in plans.values()]
    assert not inside.uses
    assert not inside.perturbations


def test_only_layers_without_uses_are_perturbed_themselves():
    program = parse(squared, WEIGHTS, X)
    zeros = perturbations_of_parameters(program)
    assert zeros
    for number, zero in zeros.items():
        assert is_fallback(program.resolved[number])
        assert zero.shape == (program.layers[number].size,)


@pytest.mark.parametrize(("name", "moved"), [("w", 2 * WIDTH), ("out", 2 * WIDTH)])
def test_a_perturbation_of_a_fallback_is_added_to_its_entries_alone(name, moved):
    program = parse(squared, WEIGHTS, X)
    zeros = perturbations_of_parameters(program)
    (number,) = [n for n in zeros if program.layers[n].name.startswith(name)]
    step = models.normal(zeros[number], seed=1)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(WEIGHTS)]
    after = perturbed(program, leaves, {number: step})
    for path, old, new in zip(program.space.names, leaves, after, strict=True):
        if path == name:
            np.testing.assert_allclose((new - old).ravel()[:moved], step, rtol=1e-6)
            np.testing.assert_array_equal(new.ravel()[moved:], old.ravel()[moved:])
        else:
            assert new is old
