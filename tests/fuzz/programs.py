"""Descriptions written as programs: the text that is run is the text that is printed."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fuzz import reference
from fuzz.descriptions import Case, Part

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

PREAMBLE = """\
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import laplax_kfac
"""
ENABLE_X64 = 'jax.config.update("jax_enable_x64", True)\n'


@dataclass(frozen=True)
class Layer:
    """The body of a layer ``f(p, x)``: its parameters, its last expressions, its output."""

    params: Shapes
    lines: tuple[str, ...]
    shape: Shape


LAYERS: dict[str, tuple[int, Callable[[Part, Shape], Layer]]] = {}


def layer(ranks: int) -> Callable[[Callable[[Part, Shape], Layer]], Callable[[Part, Shape], Layer]]:
    """Register a kind of layer that takes inputs of this rank; 0 for any."""

    def register(write: Callable[[Part, Shape], Layer]) -> Callable[[Part, Shape], Layer]:
        LAYERS[write.__name__] = ranks, write
        return write

    return register


def _affine(part: Part, shape: Shape, weight: Shape, *lines: str, **more: Shape) -> Layer:
    """Lines that make ``x`` of this shape, and a bias if there shall be one."""
    bias = {"b": shape[-1:]} if part.bias else {}
    return Layer({"w": weight, **more, **bias}, (*lines, *['x = x + p["b"]'] * part.bias), shape)


@layer(0)
def dense(part: Part, shape: Shape) -> Layer:
    return _affine(part, (*shape[:-1], part.width), (shape[-1], part.width), 'x = x @ p["w"]')


@layer(0)
def dense_left(part: Part, shape: Shape) -> Layer:
    weight = part.width, shape[-1]
    line = 'x = p["w"] @ x' if len(shape) == 1 else 'x = jnp.moveaxis(p["w"] @ x.mT, -1, -2)'
    return _affine(part, (*shape[:-1], part.width), weight, line)


@layer(0)
def dense_einsum(part: Part, shape: Shape) -> Layer:
    """Two axes out, as in attention."""
    weight = shape[-1], 2, part.width
    lines = 'x = jnp.einsum("...i,iho->...ho", x, p["w"])', f"x = x.reshape({(*shape[:-1], -1)})"
    return _affine(part, (*shape[:-1], 2 * part.width), weight, *lines)


@layer(0)
def dense_scaled(part: Part, shape: Shape) -> Layer:
    weight = shape[-1], part.width
    lines = [
        f'x = 0.5 * (x @ p["w"]) / {shape[-1]} ** 0.5',
        'x = x @ (p["w"] * 0.3)',
        f'x = x @ (p["w"] * jnp.arange(1.0, {part.width + 1}).astype(x.dtype))',
    ]
    return _affine(part, (*shape[:-1], part.width), weight, lines[part.variant % 3])


@layer(0)
def dense_masked(part: Part, shape: Shape) -> Layer:
    line = 'x = x @ jnp.tril(p["w"])'
    return _affine(part, (*shape[:-1], part.width), (shape[-1], part.width), line)


@layer(0)
def dense_fused(part: Part, shape: Shape) -> Layer:
    """Two products of one leaf: both halves of it are weights of their own."""
    k = part.width
    lines = f'u, v = p["w"][:, :{k}], p["w"][:, {k}:]', "x = jnp.tanh(x @ u) * (x @ v)"
    return _affine(part, (*shape[:-1], k), (shape[-1], 2 * k), *lines)


@layer(0)
def dense_part(part: Part, shape: Shape) -> Layer:
    """A leaf of which some rows, or columns, are used by nothing."""
    n, k = shape[-1], part.width
    line, weight = [
        (f'x = x @ p["w"][:{n}]', (n + 1, k)),
        ('x = x @ p["w"][1:]', (n + 1, k)),
        (f'x = x @ p["w"][:, :{k}]', (n, k + 2)),
    ][part.variant % 3]
    return _affine(part, (*shape[:-1], k), weight, line)


@layer(0)
def dense_flat(part: Part, shape: Shape) -> Layer:
    """Weight and bias in one vector."""
    n, k = shape[-1], part.width
    bias = f' + p["all"][{n * k}:]' * part.bias
    line = f'x = x @ p["all"][:{n * k}].reshape({n}, {k}){bias}'
    return Layer({"all": (n * k + k * part.bias,)}, (line,), (*shape[:-1], k))


@layer(0)
def dense_summed(part: Part, shape: Shape) -> Layer:
    """A sum of two weights, or two products of one input, or of one weight with two inputs."""
    n, k = shape[-1], part.width
    line = [
        'x = x @ (p["w"] + p["u"])',
        'x = x @ p["w"] + jnp.sin(x) @ p["u"]',
        'x = x @ p["w"] - jnp.sin(x) @ p["w"] + jnp.cos(x) @ p["u"]',
    ][part.variant % 3]
    return _affine(part, (*shape[:-1], k), (n, k), line, u=(n, k))


@layer(0)
def stopped(part: Part, shape: Shape) -> Layer:
    """No derivative in the weight, in the input, or in half of the product."""
    line = [
        'x = x @ lax.stop_gradient(p["w"])',
        'x = lax.stop_gradient(x) @ p["w"]',
        'x = x @ p["w"] + lax.stop_gradient(jnp.sin(x @ p["w"]))',
    ][part.variant % 3]
    return _affine(part, (*shape[:-1], part.width), (shape[-1], part.width), line)


@layer(0)
def low_rank(part: Part, shape: Shape) -> Layer:
    n, k = shape[-1], part.width
    lines = 'x = x @ (p["w"] + p["u"] @ p["v"])', 'x = x @ p["w"] + x @ p["u"] @ p["v"]'
    line = lines[part.variant % 2]
    return _affine(part, (*shape[:-1], k), (n, k), line, u=(n, 1), v=(1, k))


@layer(0)
def weight_norm(part: Part, shape: Shape) -> Layer:
    line = 'x = x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["s"])'
    n, k = shape[-1], part.width
    return _affine(part, (*shape[:-1], k), (n, k), line, s=(k,))


@layer(0)
def tied(part: Part, shape: Shape) -> Layer:
    line = 'x = jnp.tanh(x @ p["w"]) @ p["w"].T'
    return _affine(part, shape, (shape[-1], part.width), line)


@layer(0)
def glu(part: Part, shape: Shape) -> Layer:
    bias = ' + p["b"]' * part.bias
    k = part.width
    lines = f'u, v = jnp.split(x @ p["w"]{bias}, 2, axis=-1)', "x = u * jax.nn.sigmoid(v)"
    params = {"w": (shape[-1], 2 * k), **({"b": (2 * k,)} if part.bias else {})}
    return Layer(params, lines, (*shape[:-1], k))


@layer(2)
def mixer(part: Part, shape: Shape) -> Layer:
    """A product over positions; features share the weight."""
    out = part.width, shape[1]
    return _affine(part, out, (shape[0], part.width), 'x = jnp.einsum("td,ts->sd", x, p["w"])')


@layer(2)
def heads(part: Part, shape: Shape) -> Layer:
    """A weight a position: a stack."""
    t, n = shape
    line = [
        'x = jnp.einsum("ti,tio->to", x, p["w"])',
        'x = jax.vmap(lambda w, r: r @ w)(p["w"], x)',
        'x = jnp.einsum("tio,ti->to", p["w"], x)',
    ][part.variant % 3]
    layer = _affine(part, (t, part.width), (t, n, part.width), line)
    if part.bias and part.variant > 2:
        layer.params["b"] = (t, part.width)
    return layer


@layer(0)
def gain(part: Part, shape: Shape) -> Layer:
    lines = [
        'x = x * p["s"]',
        'x = x * jnp.exp(p["s"])',
        'x = p["s"] * x',
        'x = x / (1 + p["s"]**2)',
    ]
    return Layer({"s": shape[-1:] if part.bias else ()}, (lines[part.variant % 4],), shape)


@layer(0)
def shift(part: Part, shape: Shape) -> Layer:
    lines = ['x = x + p["b"]', 'x = x - p["b"]', 'x = p["b"] - x']
    return Layer({"b": shape[-1:] if part.bias else ()}, (lines[part.variant % 3],), shape)


@layer(0)
def shift_part(part: Part, shape: Shape) -> Layer:
    """A leaf of which the end is used by nothing, and that is added to another one first."""
    n = shape[-1]
    more: Shapes = {"a": (n,)} if part.bias else {}
    other = ' + p["a"]' * part.bias
    line = f'x = x + (p["b"][:{n}]{other})'
    return Layer({"b": (n + 2,), **more}, (line,), shape)


def _norm(part: Part, shape: Shape, line: str) -> Layer:
    shift = part.bias
    lines = (line, 'x = x * p["s"]', *['x = x + p["b"]'] * shift)
    return Layer({"s": shape[-1:], **({"b": shape[-1:]} if shift else {})}, lines, shape)


@layer(0)
def layer_norm(part: Part, shape: Shape) -> Layer:
    line = "x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1)"
    return _norm(part, shape, line)


@layer(0)
def rms_norm(part: Part, shape: Shape) -> Layer:
    return _norm(part, shape, "x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1)")


@layer(2)
def positions(part: Part, shape: Shape) -> Layer:
    t, n = shape
    lines = [
        'x = x + p["table"]',
        f'x = x + p["table"][:{t}]',
        f'x = x + jnp.take(p["table"], jnp.arange({t}), axis=0)',
    ]
    rows = t + (part.variant % 3 > 0)
    return Layer({"table": (rows, n)}, (lines[part.variant % 3],), shape)


@layer(2)
def class_token(part: Part, shape: Shape) -> Layer:
    t, n = shape
    tokens = 'p["token"]', "x"
    first, second = tokens if part.variant % 2 == 0 else tokens[::-1]
    return Layer({"token": (1, n)}, (f"x = jnp.concatenate([{first}, {second}])",), (t + 1, n))


@layer(0)
def lookup(part: Part, shape: Shape) -> Layer:
    """Rows of a table that data pick, beside a path with a derivative."""
    n, pick = shape[-1], "arg" + ["max", "min"][part.variant % 2]
    line = f'x = x + p["table"][jnp.{pick}(x, axis=-1)]'
    return Layer({"table": (n, n)}, (line,), shape)


def _conv(part: Part, shape: Shape, groups: int, width: int) -> Layer:
    *sizes, channels = shape
    dims = len(sizes)
    kernel = tuple([2, 3][:dims][::-1])
    stride, dilation, padding = [
        (1, 1, "SAME"), (2, 1, "SAME"), (1, 2, "SAME"), (1, 1, "VALID"), (2, 1, (1, 1)),
        (1, 2, (2, 1)),
    ][part.variant]  # fmt: skip
    spans = [(k - 1) * dilation + 1 for k in kernel]
    if padding == "VALID" and any(s < span for s, span in zip(sizes, spans, strict=True)):
        padding = "SAME"
    if isinstance(padding, tuple):
        pads = [(min(padding[0], s - 1), s - 1) for s in spans]
        out = [(n + sum(q) - s) // stride + 1 for n, q, s in zip(sizes, pads, spans, strict=True)]
        text = str(pads)
    elif padding == "SAME":
        out, text = [-(-n // stride) for n in sizes], '"SAME"'
    else:
        out, text = [n - s + 1 for n, s in zip(sizes, spans, strict=True)], '"VALID"'
    letters = "HW"[:dims]
    numbers = f"N{letters}C", f"{letters}IO", f"N{letters}C"
    lines = (
        f'x = lax.conv_general_dilated(x[None], p["w"], {(stride,) * dims}, {text},',
        f"    rhs_dilation={(dilation,) * dims}, feature_group_count={groups},",
        f"    dimension_numbers={numbers})[0]",
    )
    return _affine(part, (*out, width), (*kernel, channels // groups, width), *lines)


@layer(2)
def conv1d(part: Part, shape: Shape) -> Layer:
    return _conv(part, shape, 1, part.width)


@layer(3)
def conv2d(part: Part, shape: Shape) -> Layer:
    groups = 2 if shape[-1] % 2 == 0 and part.width % 2 == 0 and part.variant % 2 else 1
    return _conv(part, shape, groups, part.width)


@layer(2)
def depthwise(part: Part, shape: Shape) -> Layer:
    return _conv(part, shape, shape[-1], shape[-1] * (1 + part.bias))


@layer(2)
def conv_transpose(part: Part, shape: Shape) -> Layer:
    t, n = shape
    stride = 1 + part.variant % 2
    line = f'x = lax.conv_transpose(x[None], p["w"], ({stride},), "SAME")[0]'
    return _affine(part, (t * stride, part.width), (2, n, part.width), line)


@layer(2)
def attention(part: Part, shape: Shape) -> Layer:
    _, n = shape
    bias = ' + p["b"]' * part.bias
    lines = (
        f'q = jnp.einsum("td,dhk->thk", x, p["q"]){bias}',
        'k = jnp.einsum("td,dhk->thk", x, p["k"])',
        'v = jnp.einsum("td,dhk->thk", x, p["v"])',
        'weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k), axis=-1)',
        'x = jnp.einsum("hts,shk,hkd->td", weights, v, p["o"])',
    )
    kernel = n, 2, 1
    more: Shapes = {"b": (2, 1)} if part.bias else {}
    return Layer({"q": kernel, "k": kernel, "v": kernel, "o": (2, 1, n), **more}, lines, shape)


@layer(2)
def attention_fused(part: Part, shape: Shape) -> Layer:
    _, n = shape
    bias = ' + p["b"]' * part.bias
    lines = (
        f'q, k, v = jnp.split(x @ p["qkv"]{bias}, 3, axis=-1)',
        'x = jax.nn.softmax(q @ k.T, axis=-1) @ v @ p["o"]',
    )
    more: Shapes = {"b": (6,)} if part.bias else {}
    return Layer({"qkv": (n, 6), "o": (2, n), **more}, lines, shape)


@layer(2)
def rnn(part: Part, shape: Shape) -> Layer:
    t, n = shape
    k = part.width
    bias = ' + p["b"]' * part.bias
    step = [
        f'jnp.tanh(r @ p["w"] + h @ p["u"]{bias})',
        f'jnp.tanh(jnp.concatenate([r, h]) @ jnp.concatenate([p["w"], p["u"]]){bias})',
    ][part.variant % 2]
    start = 'p["h"]' if part.variant > 3 else f"jnp.zeros({k}, x.dtype)"
    last = part.variant % 3 == 2
    lines = (
        "def step(h, r):",
        f"    h = {step}",
        "    return h, h",
        f"h, x = lax.scan(step, {start}, x)",
        *["x = h"] * last,
    )
    params: Shapes = {"w": (n, k), "u": (k, k), **({"b": (k,)} if part.bias else {})}
    if part.variant > 3:
        params["h"] = (k,)
    return Layer(params, lines, (k,) if last else (t, k))


# -- calls of layers -----------------------------------------------------------------------------

CALLS: dict[str, str] = {
    "plain": "{f}({p}, x)",
    "jit": "jax.jit({f})({p}, x)",
    "remat": "jax.checkpoint({f})({p}, x)",
    "residual": "x + {f}({p}, x)",
    "twice": "{f}({p}, {f}({p}, x))",
    "vmap": "jax.vmap({f}, (None, 0))({p}, x)",
    "map": "lax.map(lambda r: {f}({p}, r), x)",
    "cond": 'lax.cond(x.sum() > 0, {f}, {f}, *({p}["u"], x))',
    "switch": 'lax.cond(x.sum() > 0, lambda x: {f}({p}["u"], x), lambda x: {f}({p}["v"], x), x)',
    "branches": 'jnp.concatenate([{f}({p}["u"], x), {f}({p}["v"], x)], axis=-1)',
    "siamese": "{f}({p}, x) - 2.0 * {f}({p}, jnp.flip(x, 0))",
    "scan": "lax.scan(lambda x, p: ({f}(p, x), None), x, {p})[0]",
    "fori": "lax.fori_loop(0, 2, lambda i, x: {f}(jax.tree.map(lambda w: w[i], {p}), x), x)",
    "ensemble": "jax.vmap({f}, (0, None))({p}, x).mean(0)",
    "float32": "{f}(cast({p}, jnp.float32), x.astype(jnp.float32)).astype(x.dtype)",
    "bfloat16": "{f}(cast({p}, jnp.bfloat16), x.astype(jnp.bfloat16)).astype(x.dtype)",
}
KEEP_SHAPE = {"residual", "twice", "scan", "fori"}
STACKED = {"scan", "fori", "ensemble"}
PAIRS = {"cond": ("u",), "switch": ("u", "v"), "branches": ("u", "v")}
CASTS = {"float32", "bfloat16"}
CAST = """\
def cast(p, dtype):
    return jax.tree.map(lambda w: w.astype(dtype), p)
"""


def _to_rank(shape: Shape, rank: int) -> tuple[Shape, list[str]]:
    """Bring an array to a rank: merge leading axes, or split the first one off."""
    if rank in {0, len(shape)}:
        return shape, []
    if len(shape) > rank:
        merged = int_product(shape[: len(shape) - rank + 1])
        new = (merged, *shape[len(shape) - rank + 1 :])
    else:
        new = (*shape, *[1] * (rank - len(shape)))
    return new, [f"x = x.reshape({new})"]


def int_product(numbers: Shape) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


def _written(part: Part, shape: Shape) -> tuple[Layer, list[str], Shape]:
    """A layer for inputs of this shape, lines that bring ``x`` to what it takes, and that shape."""
    rank, write = LAYERS[part.kind]
    shape, lines = _to_rank(shape, rank)
    return write(part, shape), lines, shape


def _parameter_text(shapes: Shapes, *, stacked: bool) -> str:
    sizes = {name: ((2, *s) if stacked else s) for name, s in shapes.items()}
    return "{" + ", ".join(f'"{k}": normal{s}' for k, s in sizes.items()) + "}"


def _call(number: int, part: Part, shape: Shape) -> tuple[Shape, list[str], str, list[str]]:
    """The output's shape, a function's text, parameters' text, and lines that call it."""
    name, call = f"layer{number}", part.call
    layer, lines, inside = _written(part, shape)
    rowwise = call in {"vmap", "map"}
    if rowwise:
        if len(shape) > 1 and LAYERS[part.kind][0] in {0, len(shape) - 1}:
            layer, lines, inside = _written(part, shape[1:])
        else:
            call, rowwise = "plain", False
    if call in KEEP_SHAPE and layer.shape != inside:
        call = "plain"
    out = (shape[0], *layer.shape) if rowwise else layer.shape
    if call == "branches":
        out = (*out[:-1], 2 * out[-1])
    activation = f"x = {ACTIVATIONS[part.activation]}" if part.activation else ""
    body = [*layer.lines, *[activation] * bool(activation)]
    function = [f"def {name}(p, x):", *(f"    {line}" for line in body), "    return x", ""]
    text = _parameter_text(layer.params, stacked=call in STACKED)
    if call in PAIRS:
        text = "{" + ", ".join(f'"{side}": {text}' for side in PAIRS[call]) + "}"
    p = f'params["{name}"]'
    return out, function, f'"{name}": {text}', [*lines, "x = " + CALLS[call].format(f=name, p=p)]


ACTIVATIONS = {
    "tanh": "jnp.tanh(x)", "relu": "jax.nn.relu(x)", "gelu": "jax.nn.gelu(x)", "sin": "jnp.sin(x)"
}  # fmt: skip


def _network(case: Case) -> tuple[Shape, list[str], list[str], list[str]]:
    """The output's shape, functions, parameters, and the lines of the forward pass."""
    shape, functions, lines = case.shape, list[str](), list[str]()
    params: list[str] = []
    if case.vocabulary:
        shape = (*case.shape, case.outputs + 1)
        params.append(f'"table": normal({case.vocabulary}, {case.outputs + 1})')
        lines.append('x = params["table"][x]')
    for number, part in enumerate(case.parts):
        shape, function, parameters, calls = _call(number, part, shape)
        functions += function
        params.append(parameters)
        lines += calls
    if case.pool == "ravel" or (len(shape) > 2 and case.pool == "none"):
        shape = (int_product(shape),)
        lines.append("x = x.ravel()")
    elif len(shape) > 1 and case.pool != "none":
        end = "mean(0)" if case.pool == "mean" else "[0]"
        flat, more = _to_rank(shape, 2)
        lines += [*more, f"x = x.{end}" if case.pool == "mean" else f"x = x{end}"]
        shape = flat[1:]
    if case.head == "embedding" and case.vocabulary and shape[-1] == case.outputs + 1:
        lines.append('x = x @ params["table"].T')
        shape = (*shape[:-1], case.vocabulary)
    elif case.head in {"dense", "dense_bias"} or not params:
        bias = case.head == "dense_bias"
        k = case.outputs
        own = f'"w": normal({shape[-1]}, {k})' + f', "b": normal({k},)' * bias
        params.append(f'"out": {{{own}}}')
        lines.append('x = x @ params["out"]["w"]' + ' + params["out"]["b"]' * bias)
        shape = (*shape[:-1], k)
    return shape, functions, params, lines


def _options(case: Case) -> Iterator[str]:
    names = (
        "fisher_type", "kfac_approx", "curvature", "eigenvalue_correction", "fallback",
        "dense_limit", "separate_weight_and_bias", "vmap_over_data",
    )  # fmt: skip
    for name in names:
        if getattr(case, name) != getattr(Case(), name) or name == "eigenvalue_correction":
            yield f"    {name}={getattr(case, name)!r},"
    if case.chosen == "last_layer" and case.head.startswith("dense"):
        yield '    params_filter="last_layer",'
    elif case.chosen == "some":  # all but the leaf that is first in the tree
        yield "    params_filter=lambda path: path != PATHS[0] or len(PATHS) == 1,"


def _loss(case: Case, shape: Shape) -> str:
    """The loss; a single logit is no distribution over classes."""
    return (
        case.loss
        if shape[-1] > 1
        else case.loss.replace("binary_cross_entropy", "mse").replace("cross_entropy", "mse")
    )


def _targets(case: Case, name: str, shape: Shape) -> list[str]:
    full = (case.examples, *shape)
    loss = name.removeprefix("weighted_")
    if loss == "cross_entropy":
        text = f"jnp.asarray(rng.integers({shape[-1]}, size={full[:-1]}))"
    elif loss == "binary_cross_entropy":
        text = f"jnp.asarray(rng.integers(2, size={full}), dtype)"
    elif loss == "poisson":
        text = f"jnp.asarray(rng.poisson(1.0, size={full}), dtype)"
    else:
        text = f"normal{full}"
    lines = [f"targets = {text}"]
    if name.startswith("weighted"):
        terms = full[:-1]
        lines.append(f"targets = (targets, jnp.asarray(rng.uniform(0, 2, size={terms}), dtype))")
    return lines


LOSSES = {
    "poisson": "laplax_kfac.likelihood.poisson()",
    "callable": "lambda f, y: jnp.sum(jnp.log(jnp.cosh(f - y)))",
    "gaussian": "laplax_kfac.likelihood.gaussian(0.3)",
    "weighted_mse": 'laplax_kfac.likelihood.weighted("mse")',
    "weighted_cross_entropy": 'laplax_kfac.likelihood.weighted("cross_entropy")',
}


def program(case: Case) -> str:
    """The network, its data and its options, as Python text."""
    shape, functions, params, lines = _network(case)
    n, loss = case.examples, _loss(case, shape)
    if case.vocabulary:
        inputs = f"jnp.asarray(rng.integers({case.vocabulary}, size={(n, *case.shape)}))"
    else:
        inputs = f"normal{(n, *case.shape)}"
    text = [
        f"rng, dtype = np.random.default_rng({case.seed}), jnp.{case.dtype}",
        "",
        "def normal(*shape):",
        "    return jnp.asarray(0.7 * rng.normal(size=shape), dtype)",
        "",
        *[CAST] * any(part.call in CASTS for part in case.parts),
        *functions,
        "params = {",
        *(f"    {p}," for p in params),
        "}",
        "",
        "def forward(x, params):",
        *(f"    {line}" for line in lines),
        "    return x",
        "",
        "def model_fn(input, params):",
        "    return forward(input, params)"
        if case.vmap_over_data
        else "    return jax.vmap(forward, (0, None))(input, params)",
        "",
        f"inputs = {inputs}",
        *_targets(case, loss, shape),
        f"weights = {f'jnp.asarray(rng.uniform(0.5, 2, size=({n},)))' if case.weights else None}",
        f"loss = {loss!r}",
        f"loss_fn = {LOSSES.get(loss, repr(loss))}",
        "PATHS = [",
        '    jax.tree_util.keystr(path, simple=True, separator="/")',
        "    for path, _ in jax.tree.leaves_with_path(params)",
        "]",
        "options = dict(",
        *_options(case),
        ")",
    ]
    return "\n".join(text) + "\n"


def run(case: Case) -> dict[str, Any]:
    """The names that the program defines."""
    namespace: dict[str, Any] = {}
    exec(compile(PREAMBLE + program(case), "<fuzzed>", "exec"), namespace)
    return namespace


def source(case: Case) -> str:
    """A script that needs jax and laplax_kfac alone: the program, the reference, the checks."""
    body = inspect.getsource(reference).split("# -- begin", 1)[1].split("\n", 1)[1]
    end = f"check(globals(), tolerance={reference.TOLERANCES[case.precision]})\n"
    return "\n".join([PREAMBLE + ENABLE_X64, program(case), body, end])
