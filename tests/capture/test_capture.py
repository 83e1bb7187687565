"""What is captured is exact: checked against JAX's own gradients, and against flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from support import models, oracles
from support.tolerances import tolerance

import laplax_kfac
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.capture import capture, capture_batch
from laplax_kfac.capture.layer_io import ParameterIO
from laplax_kfac.fisher import Columns, fisher_type_of
from laplax_kfac.likelihood.named import resolve_likelihood
from laplax_kfac.parsing.program import parse, per_example
from laplax_kfac.parsing.selection import Selection

pytestmark = pytest.mark.usefixtures("x64")

COLUMNS = 2
CLOSE = tolerance(jnp.float64)

JOINT_OR_SEPARATE = [
    *[pytest.param(m, False, id=m.name) for m in models.MODELS],
    *[
        pytest.param(m, True, id=f"{m.name}-separate")
        for m in models.MODELS
        if any(layer.bias for layer in m.layers)
    ],
]


def summed_over_positions(resolved, record, columns):
    """The gradient that a layer's record stands for: sum_t a_t g_t^T, for R cotangents."""
    if record is None:
        return jnp.zeros((columns, *resolved.layer.shape))
    if isinstance(record, ParameterIO):
        return record.gradients
    layer = resolved.layer
    total = jnp.zeros((columns, layer.stack, layer.rows, layer.out_features))
    for use in record:  # one of its sides is the same for all columns: einsum repeats it
        a, g = use.inputs.features(), use.gradients.features()
        total += jnp.einsum("rski,rsko->rkio", a, g)
    return total.reshape(columns, *layer.shape)


def captured_gradients(program, params, inputs, cotangents):
    """What `capture` says the per-example gradients are, like the parameters."""
    blocks = BlockDiagonal((), program.layers, program.space)

    def of_one_example(x, vectors):
        leaves = program.space.flatten(params)
        _, records = capture(program, (leaves, program.consts), x, lambda _: vectors)
        columns = len(jax.tree.leaves(vectors)[0])
        pairs = zip(program.resolved, records, strict=True)
        return jax.vmap(blocks.write)([summed_over_positions(*pair, columns) for pair in pairs])

    return jax.vmap(of_one_example)(inputs, cotangents)


def random_cotangents(program, columns=COLUMNS):
    shape = (models.NUM_EXAMPLES, columns)
    return models.normal(jax.tree.map(lambda o: (*shape, *o.shape), program.output), seed=9)


# -- every model of the catalogue --------------------------------------------------------------


@pytest.mark.parametrize(("model", "separate"), JOINT_OR_SEPARATE)
def test_records_are_the_gradient_of_every_example(model, separate):
    model_fn, params, inputs, _ = model.make()
    example = jax.tree.map(lambda x: x[0], inputs)
    program = parse(
        model_fn, params, example, selection=Selection(separate_weight_and_bias=separate)
    )
    function = per_example(model_fn, vmap_over_data=True)

    @jax.jit
    def both(params, inputs, cotangents):
        return (
            captured_gradients(program, params, inputs, cotangents),
            oracles.per_example_gradients(function, params, inputs, cotangents),
        )

    captured, exact = both(params, inputs, random_cotangents(program))
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, **CLOSE, err_msg=jax.tree_util.keystr(path)
        ),
        captured,
        exact,
    )


def chosen_and_attended(input, params):
    """A scan, attention, a parameter without a product, and an output of integers."""

    def step(x, w):
        q, k, v = jnp.split(x @ w, 3, axis=1)
        return x + jax.nn.softmax(q @ k.T) @ v, None

    y = lax.scan(step, input * params["gain"], params["layers"])[0] @ params["out"]
    return {"largest": jnp.argmax(y), "values": y}


def test_one_vector_is_pulled_back_without_an_axis_for_it():
    params = models.normal({"gain": (4,), "layers": (2, 4, 12), "out": (4, 3)})
    inputs = models.normal((models.NUM_EXAMPLES, 5, 4), seed=1)
    program = parse(chosen_and_attended, params, inputs[0])
    cotangents = random_cotangents(program, 1)
    function = per_example(chosen_and_attended, vmap_over_data=True)
    values = lambda params, x: function(params, x)["values"]  # noqa: E731
    capture_all = jax.jit(lambda x: captured_gradients(program, params, x, cotangents))
    exact = oracles.per_example_gradients(values, params, inputs, cotangents["values"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), capture_all(inputs), exact)
    shapes = set(shapes_inside(jax.make_jaxpr(capture_all)(inputs).jaxpr))
    assert (models.NUM_EXAMPLES, 5, 5) in shapes
    assert (models.NUM_EXAMPLES, 1, 5, 5) not in shapes


@pytest.mark.parametrize(("model", "separate"), JOINT_OR_SEPARATE)
def test_every_parameter_is_in_exactly_one_layer(model, separate):
    model_fn, params, inputs, _ = model.make()
    example = jax.tree.map(lambda x: x[0], inputs)
    program = parse(
        model_fn, params, example, selection=Selection(separate_weight_and_bias=separate)
    )
    ids = [program.space.ids(s).ravel() for layer in program.layers for s in layer.segments]
    size = models.num_parameters(params)
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(size))


def test_branches_that_are_not_taken_see_nothing():
    """Not even the constant 1 that a joint bias sees: it would count in the input factor."""
    model_fn, params, inputs, _ = models.by_name("cond_branches").make()
    program = parse(model_fn, params, inputs[0])
    taken = np.asarray(inputs[:, 0] > 0)
    assert taken.any()
    assert not taken.all()

    @jax.jit
    @jax.vmap
    def records(x, vectors):
        return capture(program, (jax.tree.leaves(params), []), x, lambda _: vectors)[1]

    left, right, shared = records(inputs, random_cotangents(program))
    names = [layer.name for layer in program.layers]
    assert names == ["left", "right", "shared"]
    uses = [(left[0], taken), (right[0], ~taken)]
    # Which of the two uses of the shared weight is in which branch shows in their inputs.
    first_is_left = bool((np.asarray(shared[0].active)[:, 0, 0] == taken).all())
    uses += zip(shared, (taken, ~taken) if first_is_left else (~taken, taken), strict=True)
    for use, here in uses:
        np.testing.assert_array_equal(use.active[:, 0, 0], here)
        inputs, gradients = (np.asarray(x.features()) for x in (use.inputs, use.gradients))
        np.testing.assert_array_equal(inputs[:, 0, 0, 0, -1], here)
        np.testing.assert_array_equal(inputs.any(axis=(1, 2, 3, 4)), here)
        np.testing.assert_array_equal(gradients.any(axis=(1, 2, 3, 4)), here)


# -- no parameter-sized gradients --------------------------------------------------------------

N = 7  # no model has an axis of this length


def shapes_inside(jaxpr):
    """Shapes of all arrays of a jaxpr and of the jaxprs inside it."""

    def is_jaxpr(value):
        return isinstance(value, Jaxpr | ClosedJaxpr)

    for eqn in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in (*eqn.invars, *eqn.outvars))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from shapes_inside(getattr(value, "jaxpr", value))


def per_example_weights(function, args, weights):
    """Shapes inside a function that end like a weight, its transpose, or its raveled entries.

    Only those with room for all examples before that.
    """
    endings = {e for w in weights for e in (w, (*w[:-2], w[-1], w[-2]), (int(np.prod(w)),))}
    return {
        shape
        for shape in shapes_inside(jax.make_jaxpr(function)(*args).jaxpr)
        for ending in endings
        if shape[-len(ending) :] == ending and np.prod(shape[: -len(ending)]) % N == 0
    }


def wide_mlp():
    def model_fn(input, params):
        h = jnp.tanh(input @ params["a"]["w"] + params["a"]["b"])
        return jax.jit(lambda h: h @ params["b"]["w"])(h)

    params = {"a": {"w": (11, 13), "b": (13,)}, "b": {"w": (13, 5)}}
    return model_fn, models.normal(params), (11,), [(11, 13), (12, 13), (13, 5)]


def wide_attention():
    def model_fn(input, params):
        q, k, v = jnp.einsum("si,iko->kso", input, params["qkv"])
        return jnp.mean(jax.nn.softmax(q @ k.T) @ v @ params["out"], axis=0)

    params = {"qkv": (11, 3, 17), "out": (17, 5)}
    return model_fn, models.normal(params), (6, 11), [(11, 3, 17), (11, 51), (17, 5)]


def wide_scan():
    def model_fn(input, params):
        def step(h, x):
            return jax.checkpoint(jnp.tanh)(h @ params["h"] + x @ params["x"]), None

        return lax.scan(step, jnp.zeros(13), input)[0]

    return model_fn, models.normal({"h": (13, 13), "x": (11, 13)}), (4, 11), [(13, 13), (11, 13)]


def wide_conv():
    def model_fn(input, params):
        y = lax.conv_general_dilated(input[None], params["conv"], (1, 1), "SAME")
        return jnp.mean(jnp.tanh(y), axis=(0, 2, 3)) @ params["out"]

    params = {"conv": (13, 11, 3, 3), "out": (13, 5)}
    return model_fn, models.normal(params), (11, 4, 4), [(13, 11, 3, 3), (99, 13), (13, 5)]


@pytest.mark.parametrize("make", [wide_mlp, wide_attention, wide_scan, wide_conv])
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_no_gradient_of_a_kronecker_layer_is_formed(make, fisher_type):
    model_fn, params, shape, weights = make()
    inputs = models.normal((N, *shape), seed=1)
    program = parse(model_fn, params, inputs[0])
    assert all(layer.block == "kronecker" for layer in program.layers)
    targets = jnp.zeros((N, *program.output.shape))

    def captured(leaves, inputs):
        batch = {"input": inputs, "target": targets}
        columns = Columns(resolve_likelihood("mse"), fisher_type_of(fisher_type), mc_samples=2)
        keys = jax.random.split(jax.random.key(0), N)
        return capture_batch(program, (leaves, program.consts), batch, columns, keys=keys)

    def gradients(leaves, inputs):
        return oracles.per_example_gradients(
            per_example(model_fn, vmap_over_data=True),
            jax.tree.unflatten(jax.tree.structure(params), leaves),
            inputs,
            targets[:, None],
        )

    args = (jax.tree.leaves(params), inputs)
    assert per_example_weights(gradients, args, weights)  # the search finds them where they are
    assert not per_example_weights(captured, args, weights)


# -- the public function -----------------------------------------------------------------------


# -- the public function -----------------------------------------------------------------------


class Shown(nnx.Module):
    """A module that can show a layer's input, and the gradient at its output, to flax."""

    def layer(self, name, x, shown):
        if not shown:
            return getattr(self, name)(x)
        self.sow(nnx.Intermediate, name, x)
        return self.perturb(name, getattr(self, name)(x))


class Mlp(Shown):
    def __init__(self, rngs):
        self.lin1 = nnx.Linear(4, 5, rngs=rngs)
        self.lin2 = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, shown=False):
        return self.layer("lin2", nnx.relu(self.layer("lin1", x, shown)), shown)


class Cnn(Shown):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs)
        self.lin = nnx.Linear(18, 3, rngs=rngs)

    def __call__(self, x, shown=False):
        h = jnp.tanh(self.layer("conv", x, shown))
        return self.layer("lin", h.reshape(x.shape[0], -1), shown)


def patches(x):
    """What a 3 x 3 filter of stride 2 sees of images (N, 5, 4, C) padded as "SAME" does."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))  # the larger part of a pad is at the end
    rows = [padded[:, i : i + 3, j : j + 3] for i in (0, 2, 4) for j in (0, 2)]
    return np.stack([r.reshape(len(x), -1) for r in rows], axis=1)


def losses(n):
    """loss_fn, targets, and the sum of the losses by optax or by hand."""
    real = jnp.asarray(np.random.default_rng(4).normal(size=(n, 3)))
    classes = jnp.arange(n) % 3
    soft = jax.nn.softmax(real)
    return {
        "mse": ("mse", real, lambda f: jnp.sum((f - real) ** 2)),
        "classes": (
            "cross_entropy", classes,
            lambda f: jnp.sum(optax.softmax_cross_entropy_with_integer_labels(f, classes)),
        ),
        "probabilities": (
            "cross_entropy", soft, lambda f: jnp.sum(optax.softmax_cross_entropy(f, soft))
        ),
        "callable": (
            lambda f, y: jnp.sum(jnp.abs(f - y) ** 3), real,
            lambda f: jnp.sum(jnp.abs(f - real) ** 3),
        ),
    }  # fmt: skip


def from_flax(graph, params, x, loss):
    """Inputs of the layers, and gradients of the summed loss at their outputs."""

    @jax.jit
    def run(params, x):
        _, zeros = nnx.capture(nnx.merge(graph, params), nnx.Perturbation)(x, True)

        def of_perturbations(zeros):
            module = nnx.merge(graph, params)
            f, sowed = nnx.capture(module, nnx.Intermediate, init=zeros)(x, True)
            return loss(f), sowed

        gradients, sowed = jax.grad(of_perturbations, has_aux=True)(zeros)
        return nnx.to_pure_dict(sowed), nnx.to_pure_dict(gradients)

    sowed, gradients = run(params, x)
    return {name: values[0] for name, values in sowed.items()}, gradients


@pytest.mark.parametrize("case", ["mse", "classes", "probabilities", "callable"])
@pytest.mark.parametrize("make", [Mlp, Cnn])
def test_records_are_those_of_flax(make, case):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    params = models.normal(shapes, seed=3)
    x = models.normal((4, 4) if make is Mlp else (4, 5, 4, 2), seed=1)
    loss_fn, targets, loss = losses(4)[case]
    inputs, gradients = from_flax(graph, params, x, loss)

    def model_fn(input, params):
        return nnx.merge(graph, params)(input[None])[0]

    records = laplax_kfac.intermediates_and_gradients(
        model_fn, params, (x, targets), loss_fn=loss_fn
    )
    assert set(records) == set(inputs)
    for name, record in records.items():
        expected = patches(inputs[name]) if name == "conv" else inputs[name][:, None]
        np.testing.assert_allclose(record.inputs, expected, **CLOSE)
        flat = gradients[name].reshape(4, -1, gradients[name].shape[-1])
        np.testing.assert_allclose(record.gradients, flat, **CLOSE)


def tanh_mlp(input, params):
    return jnp.tanh(input @ params["a"]["w"] + params["a"]["b"]) @ params["b"]


MLP_PARAMS = {"a": {"w": (4, 5), "b": (5,)}, "b": (5, 3)}


def assert_equal_records(found, expected):
    assert set(found) == set(expected)
    for name, record in found.items():
        np.testing.assert_allclose(record.inputs, expected[name].inputs, **CLOSE)
        np.testing.assert_allclose(record.gradients, expected[name].gradients, **CLOSE)


@pytest.fixture
def records():
    """Parameters, a batch, and the records of `tanh_mlp` worked out by hand."""
    params, x, y = models.normal(MLP_PARAMS), models.inputs(4), models.inputs(3, seed=2)
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    g = 2.0 * (h @ params["b"] - y)
    expected = {
        "a": laplax_kfac.LayerRecord(x[:, None], ((g @ params["b"].T) * (1 - h**2))[:, None]),
        "b": laplax_kfac.LayerRecord(h[:, None], g[:, None]),
    }
    return params, (x, y), expected


def intermediates(params, data, **options):
    return laplax_kfac.intermediates_and_gradients(tanh_mlp, params, data, loss_fn="mse", **options)


def test_records_worked_out_by_hand(records):
    params, data, expected = records
    assert_equal_records(intermediates(params, data), expected)


def test_records_under_jit(records):
    params, data, expected = records
    assert_equal_records(jax.jit(intermediates)(params, data), expected)


def test_records_under_vmap_over_parameters(records):
    params, data, expected = records
    other = models.normal(MLP_PARAMS, seed=8)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    found = jax.jit(jax.vmap(intermediates, in_axes=(0, None)))(stacked, data)
    assert_equal_records({k: jax.tree.map(lambda x: x[0], v) for k, v in found.items()}, expected)
    assert_equal_records(
        {k: jax.tree.map(lambda x: x[1], v) for k, v in found.items()}, intermediates(other, data)
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: {"input": x, "target": y},
        lambda x, y: [x, y],
        lambda x, y: (np.asarray(x), np.asarray(y)),
        lambda x, y: {"input": np.asarray(x), "target": y, "id": "a"},
        lambda x, y: {"input": x, "target": y, "weight": np.full(len(y), 3.0)},
    ],
    ids=["mapping", "list", "numpy", "mapping_with_more", "with_weights"],
)
def test_forms_of_a_batch(records, form):
    params, data, expected = records
    assert_equal_records(intermediates(params, form(*data)), expected)


def test_models_of_a_batch(records):
    """A model that takes batches gives the same records, though traced with a batch of one."""
    params, data, expected = records
    found = intermediates(params, data, vmap_over_data=False)
    assert_equal_records(found, expected)


def test_inputs_and_outputs_may_be_pytrees():
    model_fn, params, inputs, _ = models.by_name("two_inputs_and_two_outputs").make()
    targets = {"mean": models.inputs(2, seed=6), "hidden": models.inputs(3, seed=7)}
    records = laplax_kfac.intermediates_and_gradients(
        model_fn, params, (inputs, targets), loss_fn="mse"
    )
    mean = jax.vmap(lambda x: model_fn(x, params)["mean"])(inputs)
    np.testing.assert_allclose(
        records["out"].gradients[:, 0], 2.0 * (mean - targets["mean"]), **CLOSE
    )
    np.testing.assert_allclose(records["two"].inputs[:, 0], inputs["two"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("grouped_einsum", {"mix": ((5, 2, 3), (5, 2, 4))}),
        ("scan_over_layers", {"head": ((1, 4), (1, 2)), "layers": ((1, 3, 4), (1, 3, 4))}),
        ("tied_autoencoder", {"b": ((1, 1), (1, 3)), "c": ((1, 1), (1, 4)), "w": ((2, 4), (2, 3))}),
        ("embedding", {"out": ((1, 4), (1, 3)), "table": ((5, 7), (5, 4))}),
        ("nnx_layer_norm", {"lin": ((1, 4), (1, 5))}),
        ("product_written_as_a_sum", {}),
    ],
)
def test_shapes_of_records(name, shapes):
    """(positions, in) and (positions, out) an example, with an axis for stacks; only Kronecker."""
    model_fn, params, inputs, _ = models.by_name(name).make()
    output = jax.eval_shape(jax.vmap(lambda x: model_fn(input=x, params=params)), inputs)
    found = jax.eval_shape(
        lambda p: laplax_kfac.intermediates_and_gradients(
            model_fn, p, (inputs, jnp.zeros(output.shape)), loss_fn="mse"
        ),
        params,
    )
    assert {k: (r.inputs.shape[1:], r.gradients.shape[1:]) for k, r in found.items()} == shapes


@pytest.mark.parametrize(
    "name", ["tied_autoencoder", "embedding", "nnx_batch_norm_with_its_averages"]
)
def test_records_multiply_to_gradients(name):
    """As documented, whatever the layer: transposed uses, row numbers and own biases included."""
    model_fn, params, inputs, n_out = models.by_name(name).make()
    targets = models.inputs(n_out, seed=6)

    def loss(params, x, y):
        return jnp.sum((model_fn(x, params) - y) ** 2)

    records = laplax_kfac.intermediates_and_gradients(
        model_fn, params, (inputs, targets), loss_fn="mse"
    )
    exact = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, inputs, targets)
    layers = laplax_kfac.find_layers(model_fn, params, jax.tree.map(lambda x: x[0], inputs))
    flat = {jax.tree_util.keystr(p): g for p, g in jax.tree.leaves_with_path(exact)}
    for name, record in records.items():
        layer = layers[name]
        matrix = jnp.einsum("nsi,nso->nio", record.inputs, record.gradients)
        *_, weight = sorted(layer.params, key=lambda path: flat[path].ndim)
        np.testing.assert_allclose(matrix.reshape(flat[weight].shape), flat[weight], **CLOSE)
        if layer.bias:
            bias, _ = sorted(layer.params, key=lambda path: flat[path].ndim)
            np.testing.assert_allclose(record.gradients.sum(1), flat[bias], **CLOSE)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            jnp.ones((3, 4)),
            TypeError,
            "A batch of `data` must be a tuple",
        ),
        ((jnp.ones((3, 4)),), ValueError, r"must be \(input, target\), found a tuple of 1"),
        ({"input": 1, "y": 2}, ValueError, "needs the keys 'input' and 'target', found"),
        ((jnp.ones((3, 4)), jnp.ones((2, 3))), ValueError, "need the same leading axis"),
        ((jnp.ones((0, 4)), jnp.ones((0, 3))), ValueError, "A batch has no examples"),
        ((jnp.ones((3, 4)), 1.0), ValueError, "need the same leading axis"),
    ],
    ids=["array", "one_entry", "other_keys", "other_lengths", "empty", "scalar"],
)
def test_bad_batches_are_clear_errors(data, error, message):
    with pytest.raises(error, match=message):
        intermediates(models.normal(MLP_PARAMS), data)


def test_bad_losses_are_clear_errors():
    params, data = models.normal(MLP_PARAMS), (models.inputs(4), models.inputs(3))
    with pytest.raises(ValueError, match="`loss_fn` is 'hinge'; expected one of"):
        laplax_kfac.intermediates_and_gradients(tanh_mlp, params, data, loss_fn="hinge")
    with pytest.raises(TypeError, match="`loss_fn` must be a laplax LossFn, its string, or a"):
        laplax_kfac.intermediates_and_gradients(tanh_mlp, params, data, loss_fn=3)  # type: ignore[arg-type]


def test_numpy_parameters_in_single_precision():
    """Numpy makes float64 of most numbers; JAX computes in float32 unless told otherwise."""
    with jax.enable_x64(False):
        params = {"w": np.ones((4, 3)), "s": np.ones(3)}
        records = laplax_kfac.intermediates_and_gradients(
            lambda input, params: (input @ params["w"]) * params["s"],
            params, (np.ones((2, 4)), np.ones((2, 3))), loss_fn="mse",
        )  # fmt: skip
        assert records["w"].inputs.dtype == jnp.float32
