"""The evaluator computes what the model computes, and keeps what its uses saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import models

from laplax_kfac.capture.evaluator import run
from laplax_kfac.capture.plan import perturbations_of_uses, plan_of
from laplax_kfac.parsing.program import parse

pytestmark = pytest.mark.usefixtures("x64")

WIDTH, LENGTH = 3, 4
SHAPES = {"w": (WIDTH, WIDTH), "out": (WIDTH, 2)}
PARAMS = {name: np.random.default_rng(0).normal(size=shape) for name, shape in SHAPES.items()}
X = np.random.default_rng(1).normal(size=WIDTH)


def scanned(input, params):
    def body(h, _):
        return jnp.tanh(h @ params["w"]), h

    last, seen = lax.scan(body, input, None, length=LENGTH)
    return (last + jnp.sum(seen, axis=0)) @ params["out"]


def reversed_scan(input, params):
    def body(h, x):
        return jnp.tanh(h @ params["w"] + x), None

    xs = input * jnp.arange(LENGTH)[:, None]
    return lax.scan(body, input, xs, reverse=True, unroll=2)[0] @ params["out"]


def branched(input, params):
    branches = [
        lambda h: h @ params["w"],
        lambda h: jnp.tanh(h @ params["w"]),
        lambda h: 2 * h,
    ]
    taken = lax.switch(jnp.where(input[0] > 0, 1, 2), branches, input)
    return taken @ params["out"]


def rematerialised(input, params):
    return jax.checkpoint(lambda h: jnp.tanh(h @ params["w"]))(input) @ params["out"]


def called(input, params):
    return jax.jit(lambda h, w: jnp.tanh(h @ w))(input, params["w"]) @ params["out"]


MODELS = [scanned, reversed_scan, branched, rematerialised, called]


def evaluated(model_fn, x, perturbed_by=None):
    program = parse(model_fn, PARAMS, x)
    perturbations = perturbations_of_uses(program)
    if perturbed_by is not None:
        perturbations = models.normal(perturbations, seed=perturbed_by)
    arguments = [*program.consts, *jax.tree.leaves(jax.tree.map(jnp.asarray, PARAMS)), x]
    (output,), inputs = run(program.jaxpr, arguments, plan_of(program), perturbations)
    return program, output, inputs


@pytest.mark.parametrize("model_fn", MODELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_zeros_change_nothing(model_fn, sign):
    x = sign * jnp.abs(X)
    _, output, _ = evaluated(model_fn, x)
    assert jnp.allclose(output, model_fn(x, PARAMS), rtol=1e-14)


@pytest.mark.parametrize("model_fn", MODELS)
def test_a_perturbation_moves_the_output(model_fn):
    _, before, _ = evaluated(model_fn, jnp.abs(X))
    _, after, _ = evaluated(model_fn, jnp.abs(X), perturbed_by=3)
    assert not jnp.allclose(before, after)


@pytest.mark.parametrize("model_fn", [scanned, reversed_scan])
def test_inputs_of_a_scan_come_stacked_in_the_order_of_its_iterations(model_fn):
    program, _, inputs = evaluated(model_fn, X)
    number = next(n for n, use in program.uses.items() if use.scans)
    seen, active, _ = inputs[number]
    order = range(LENGTH) if model_fn is scanned else reversed(range(LENGTH))
    h, wanted = jnp.asarray(X), {}
    for k in order:
        wanted[k] = h
        h = jnp.tanh(h @ PARAMS["w"] + (0 if model_fn is scanned else k * X))
    assert jnp.allclose(seen.reshape(LENGTH, WIDTH), jnp.stack([wanted[k] for k in range(LENGTH)]))
    assert jnp.all(active == 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_branches_that_are_not_taken_have_inputs_of_zero_and_are_not_active(sign):
    x = sign * jnp.abs(X)
    program, _, inputs = evaluated(branched, x)
    inside = [n for n, use in program.uses.items() if len(use.site) > 1]
    taken = [n for n in inside if bool(jnp.any(inputs[n][1] != 0))]
    assert len(inside) == 2
    assert len(taken) == (1 if sign > 0 else 0)
    for number in inside:
        wanted = x if number in taken else jnp.zeros_like(x)
        assert jnp.allclose(inputs[number][0].ravel(), wanted)
