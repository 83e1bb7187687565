"""What must not grow: programs with the depth of a scan, memory with the size of a weight.

Nothing runs here: parameters are shapes, and the programs are read, not executed.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

import laplax_kfac
from laplax_kfac.machine import MACHINE


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mlp(input, params):
    for layer in params[:-1]:
        input = jnp.tanh(input @ layer["w"] + layer["b"])
    return input @ params[-1]["w"] + params[-1]["b"]


def mlp_params(*widths):
    return [{"w": shaped(m, n), "b": shaped(n)} for m, n in itertools.pairwise(widths)]


def norm(x, params):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True)) * params["scale"]


def block(x, params):
    y = norm(x, params["norm"])
    q, k, v = (jnp.einsum("td,dhk->htk", y, params[n]["w"]) for n in "qkv")
    weights = jax.nn.softmax(q @ k.swapaxes(1, 2))
    x = x + jnp.einsum("htk,hkd->td", weights @ v, params["out"]["w"]) + params["out"]["b"]
    return x + jax.nn.gelu(x @ params["up"]["w"] + params["up"]["b"]) @ params["down"]["w"]


def transformer(input, params):
    """Tokens through a scan over stacked blocks; the embedding is tied to the output."""
    x = params["embed"]["w"][input]
    x, _ = lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
    return (x @ params["embed"]["w"].T)[-1]


def unrolled(input, params):
    x = params["embed"]["w"][input]
    for p in params["blocks"]:
        x = block(x, p)
    return (x @ params["embed"]["w"].T)[-1]


def transformer_params(depth, width, heads=2, vocabulary=50):
    head = (heads, width // heads)
    blocks = {
        "norm": {"scale": (width,)},
        **{n: {"w": (width, *head)} for n in "qkv"},
        "out": {"w": (*head, width), "b": (width,)},
        "up": {"w": (width, 4 * width), "b": (4 * width,)},
        "down": {"w": (4 * width, width)},
    }
    blocks = jax.tree.map(
        lambda s: shaped(depth, *s), blocks, is_leaf=lambda s: isinstance(s, tuple)
    )
    return {"blocks": blocks, "embed": {"w": shaped(vocabulary, width)}}


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def equations(jaxpr):
    """All equations of a jaxpr, with those of its sub-jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from equations(getattr(inner, "jaxpr", inner))


def largest(jaxpr):
    return max(math.prod(v.aval.shape) for eqn in equations(jaxpr) for v in eqn.outvars)


def statistics(model_fn, **options):
    """The sums of one batch as a function of parameters and batch."""

    def sums(params, batch):
        accumulator = laplax_kfac.accumulator(model_fn, params, **options)
        return accumulator.update(accumulator.init(), batch).sums

    return sums


TOKENS = shaped(16, dtype=jnp.int32)


def batched(examples, shape):
    return jax.ShapeDtypeStruct((examples, *shape.shape), shape.dtype)


# -- memory ------------------------------------------------------------------------------------


MLP = (mlp, mlp_params(784, 2048, 2048, 2048, 10), shaped(784), 7)
TRANSFORMER = (transformer, transformer_params(depth=4, width=480), TOKENS, 31)


@pytest.mark.parametrize(
    ("case", "fisher_type"),
    [
        (MLP, "type2"),
        (MLP, "mc"),
        (MLP, "empirical"),
        # Of many tokens and words, the cotangents of all columns are larger than any gradient.
        (TRANSFORMER, "mc"),
        (TRANSFORMER, "empirical"),
    ],
    ids=["mlp-type2", "mlp-mc", "mlp-empirical", "transformer-mc", "transformer-empirical"],
)
def test_no_gradient_of_a_weight_is_formed(case, fisher_type):
    """A gradient per example of the smallest of the large weights would be the largest array."""
    model_fn, params, x, examples = case
    assert count(params) > 10_000_000
    layers = laplax_kfac.find_layers(model_fn, params, x)
    large = [layer for layer in layers if layer.size > 500_000]
    assert large
    assert all(layer.block == "kronecker" for layer in large)
    batch = (batched(examples, x), shaped(examples, dtype=jnp.int32))
    options = {"loss_fn": "cross_entropy", "fisher_type": fisher_type}
    program = jax.make_jaxpr(statistics(model_fn, **options))(params, batch)
    # The factors themselves are there, and the weights with a probe of the fallbacks added.
    factors = max(layer.stack * max(layer.rows, layer.out_features) ** 2 for layer in large)
    assert largest(program.jaxpr) <= max(
        factors, max(leaf.size for leaf in jax.tree.leaves(params))
    )
    assert largest(program.jaxpr) < examples * min(layer.size for layer in large)


def test_gradients_of_probed_parameters_are_formed_for_a_part_of_the_batch():
    """Without parts, the exact gradients of the gain alone would take three times the limit."""
    size, outputs = 2**20, 8
    params = {"gain": shaped(size)}

    def model_fn(input, params):
        return (input * jnp.exp(params["gain"])).reshape(outputs, -1).sum(axis=1)

    examples = 3 * MACHINE.record_bytes // (4 * size * outputs)
    batch = (batched(examples, shaped(size)), batched(examples, shaped(outputs)))
    sums = statistics(model_fn, loss_fn="mse", fallback="diagonal")
    program = jax.make_jaxpr(sums)(params, batch)
    gradients = [
        math.prod(v.aval.shape)
        for eqn in equations(program.jaxpr)
        for v in eqn.outvars
        if {size, outputs} <= set(v.aval.shape)
    ]
    assert gradients
    assert max(gradients) <= MACHINE.record_bytes // 4


# -- depth -------------------------------------------------------------------------------------


def test_a_scanned_stack_has_the_layers_of_an_unrolled_one():
    depth = 48
    params = transformer_params(depth, width=16)
    one = jax.tree.map(lambda p: shaped(*p.shape[1:]), params["blocks"])
    layers = laplax_kfac.find_layers(transformer, params, TOKENS)
    copies = laplax_kfac.find_layers(unrolled, {**params, "blocks": [one] * depth}, TOKENS)
    for name in ("q", "k", "v", "out", "up", "down"):
        stacked = layers[f"blocks/{name}"]
        assert (stacked.block, stacked.stack) == ("kronecker", depth)
        for number in (0, depth - 1):
            layer = copies[f"blocks/{number}/{name}"]
            assert (layer.block, layer.stack) == ("kronecker", 1)
            assert (layer.rows, layer.out_features) == (stacked.rows, stacked.out_features)
            assert layer.positions == stacked.positions == TOKENS.size
    assert len(copies) - 1 == depth * (len(layers) - 1)


def test_the_program_of_a_scanned_stack_does_not_grow_with_its_depth():
    def lowered(depth):
        params = transformer_params(depth, width=16)
        # One example: more would be worked on in more parts the more memory they take.
        batch = (batched(1, TOKENS), shaped(1, dtype=jnp.int32))
        sums = statistics(transformer, loss_fn="cross_entropy", fallback="diagonal")
        update = jax.jit(sums).lower(params, batch)
        curvature = jax.make_jaxpr(
            lambda p, b: (
                laplax_kfac.kfac(
                    transformer, p, b, loss_fn="cross_entropy", fallback="diagonal"
                ).blocks
            )
        )(params, batch)
        return update.as_text().count("\n"), sum(1 for _ in equations(curvature.jaxpr))

    assert lowered(4) == lowered(48)
