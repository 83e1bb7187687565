"""Every role of a use keeps the contract: a step of the parameters moves outputs by inputs @ it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal
from support.models import normal

from laplax_kfac import jaxprs, patterns
from laplax_kfac.parsing.biases import Bias
from laplax_kfac.parsing.steps import Scope
from laplax_kfac.parsing.uses import Findings, Weight
from laplax_kfac.parsing.values import PARAMETERS, Symbolic, constant
from laplax_kfac.parsing.walk import walk

pytestmark = pytest.mark.usefixtures("x64")

ROWS = np.asarray([2, 0, 2])
MASK = np.asarray([[1.0, -2.0, 0.5, 3.0]]) * np.asarray([[2.0], [1.0], [-1.0]])


def convolve(w, x):
    return lax.conv(x[None, None], w[None, None], (1, 1), "SAME")


CASES = {
    # The function of the parameter (3, 4) and the data (5, 3), and the role that it has.
    "dense": (lambda w, x: x @ w, Weight),
    "dense_on_the_left": (lambda w, x: w.T @ x.T, Weight),
    "a_part": (lambda w, x: x @ w[:, 1:3], Weight),
    "scaled": (lambda w, x: x @ (MASK * w), Weight),
    "convolution": (convolve, Weight),
    "lookup": (lambda w, x: w[jnp.argmax(x, axis=1)], Weight),
    "bias": (lambda w, x: x @ jnp.ones((3, 4)) * x[:, :1] + w[0], Bias),
    "subtracted": (lambda w, x: x[:, :1] - w[0], Bias),
    "halved": (lambda w, x: x[:3, :1] + 0.5 * w, Bias),
    "same_for_all_rows": (lambda w, x: jnp.sin(x[:, :, None]) + w.reshape(3, 4), Bias),
    "repeated": (lambda w, x: jnp.sin(x) + w[0, :3][None], Bias),
    "scattered": (lambda w, x: jnp.tile(x[:, :1], 4).at[ROWS[:2]].add(w[:2]), Bias),
}


def operands_of(jaxpr, number, arguments):
    """The values of an equation's operands."""
    env = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns[:number]:
        outputs = jaxprs.evaluate(jaxpr, eqn, [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(a) for a in jaxpr.eqns[number].invars]


@pytest.mark.parametrize("name", CASES)
def test_a_role_keeps_the_contract(name):
    function, expected = CASES[name]
    w, step, x = normal((3, 4)), normal((3, 4), seed=1), normal((5, 3), seed=2)
    jaxpr, consts, _ = jaxprs.trace(function, w, x)
    findings = Findings()
    parameter = Symbolic(PARAMETERS, np.arange(12).reshape(3, 4))
    walk(jaxpr, [*map(constant, consts), parameter, None], Scope(findings))
    (use,) = findings.uses
    assert isinstance(use.role, expected)
    assert not use.role.refusal
    (number,) = use.site
    values = operands_of(jaxpr, number, [*consts, w, x])
    others = tuple(v for k, v in enumerate(values) if k != use.operand)
    inputs = use.pattern.inputs(use.eqn, use.operand, others)
    if use.pattern.indexed:
        inputs = patterns.one_hot(inputs, use.ids.shape[-2])

    def output(w):
        values = operands_of(jaxpr, number, [*consts, w, x])
        return jaxprs.evaluate(jaxpr, use.eqn, values)[0]

    moved = jax.jvp(output, (w,), (step,))[1]
    outputs = use.pattern.outputs(use.eqn, use.operand, moved)
    matrices = step.reshape(-1)[use.ids] * (1.0 if use.scale is None else use.scale)
    assert len(outputs) == use.positions
    np.testing.assert_allclose(outputs, jnp.einsum("tki,kio->tko", inputs, matrices), atol=1e-12)


def test_what_has_no_matrices_is_refused():
    def reasons(function):
        jaxpr, consts, _ = jaxprs.trace(function, normal((3, 4)), normal((30, 40)))
        findings = Findings()
        parameter = Symbolic(PARAMETERS, np.arange(12).reshape(3, 4))
        walk(jaxpr, [*map(constant, consts), parameter, None], Scope(findings))
        return [use.role.refusal for use in findings.uses]

    uneven = lambda w, x: x[0, :5] + w[0, np.asarray([0, 1, 1, 2, 3])]  # noqa: E731
    assert reasons(uneven) == ["added to different places unequally often"]
    one = lambda w, x: x[0] + w[0, 0]  # noqa: E731
    assert reasons(one) == ["one number, added in several places"]
    scaled = lambda w, x: x[:2, :4] + w[:1] * np.asarray([[1.0], [2.0]])  # noqa: E731
    assert reasons(scaled) == ["added to different places unequally often"]
    assert reasons(lambda w, x: x[0, :1] + w[0, 0]) == [""]


def test_the_output_of_a_use_that_is_read_twice_takes_no_bias():
    def model(w, x):
        h = x @ w
        return jnp.sin(h) + lax.cumsum(h + w[0])

    jaxpr, consts, _ = jaxprs.trace(model, normal((3, 4)), normal((5, 3)))
    findings = Findings()
    parameter = Symbolic(PARAMETERS, np.arange(12).reshape(3, 4))
    walk(jaxpr, [*map(constant, consts), parameter, None], Scope(findings))
    weight, bias = findings.uses
    assert isinstance(weight.role, Weight)
    assert isinstance(bias.role, Bias)
    assert bias.role.output is None
