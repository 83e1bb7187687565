"""Jacobians of layers in the bases of their blocks, and the order in which they are summed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import models
from support.matrices import basis_of
from support.tolerances import tolerance

from laplax_kfac.bases import UNROTATED
from laplax_kfac.blocks.blocks import Block
from laplax_kfac.capture.capture import capture, unit_vectors
from laplax_kfac.parsing.program import parse
from laplax_kfac.predictive import jacobians
from laplax_kfac.predictive.jacobians import DenseJacobian, FactoredJacobian, PickedJacobian

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("mlp", [FactoredJacobian, FactoredJacobian]),
        ("nnx_cnn", [DenseJacobian, FactoredJacobian]),
        ("mixer", [DenseJacobian, FactoredJacobian]),
        ("embedding", [FactoredJacobian, PickedJacobian]),
        ("tied_autoencoder", [DenseJacobian, DenseJacobian, DenseJacobian]),
        ("nnx_layer_norm", [FactoredJacobian, DenseJacobian, DenseJacobian]),
    ],
)
def test_the_cheaper_order_of_summation_is_taken(name, forms):
    model_fn, params, inputs, outputs = models.by_name(name).make()
    program = parse(model_fn, params, jax.tree.map(lambda x: x[0], inputs))
    assert [jacobians.form_of(r, outputs) for r in program.resolved] == forms


@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_a_layer_with_uses_may_have_a_block_without_kronecker_form(kind):
    model_fn, params, inputs, _ = models.by_name("mixer").make()
    program = parse(model_fn, params, inputs[0])
    layer, p = program.layers[0], program.layers[0].size
    leaves = jax.tree.leaves(params)
    record = capture(program, (leaves, program.consts), inputs[0], unit_vectors)[1][0]
    basis = jnp.linalg.qr(models.normal((p, p)))[0]
    bases = (basis_of(basis),) if kind == "dense" else (UNROTATED, UNROTATED)
    resolved = replace(program.resolved[0], layer=replace(layer, block=kind))
    found = jacobians.layer_jacobian(
        resolved, record, Block(bases, jnp.ones(p if kind == "dense" else layer.shape))
    )
    assert isinstance(found, DenseJacobian)
    exact = jax.jacrev(lambda w: model_fn(inputs[0], params | {"lin1": w}))(params["lin1"])
    rows = [exact["w"].reshape(-1, 20), exact["b"].reshape(-1, 5)]  # the bias is the last row
    expected = np.concatenate(rows, axis=1) @ (basis if kind == "dense" else np.eye(p))
    np.testing.assert_allclose(found.entries, expected, **tolerance(jnp.float64))
