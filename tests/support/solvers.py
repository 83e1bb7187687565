"""Models of the catalogue with solvers and rules: implicit layers, adjoints, linear solves.

Libraries of solvers need not be installed: these are functions of the same structure.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.ode import odeint

from support.models import Built, dense, fallback, inputs, model, normal

# -- solvers, implicit layers, and rules -------------------------------------------------------

RULE = "derivative of its own"
SOLVER = (fallback("u", "other", 12, RULE), fallback("w", "other", 16, RULE), dense("out", 4, 2))
SHAPES = {"u": (3, 4), "w": (4, 4), "out": (4, 2)}
STEPS = 60


def _step(z: Array, params: Any, x: Array) -> Array:
    """A map that contracts: its fixed point is the output of a deep equilibrium."""
    return jnp.tanh(z @ (0.2 * params["w"]) + x @ params["u"])


def _solve(params: Any, x: Array) -> Array:
    return lax.fori_loop(0, STEPS, lambda _, z: _step(z, params, x), jnp.zeros(4))


@jax.custom_vjp
def _equilibrium(params: Any, x: Array) -> Array:
    return _solve(params, x)


def _equilibrium_forward(params: Any, x: Array) -> Any:
    z = _solve(params, x)
    return z, (params, x, z)


def _equilibrium_backward(kept: Any, g: Array) -> Any:
    params, x, z = kept
    _, pull = jax.vjp(lambda z: _step(z, params, x), z)
    u = lax.fori_loop(0, STEPS, lambda _, u: g + pull(u)[0], g)
    return jax.vjp(lambda p, x: _step(z, p, x), params, x)[1](u)


_equilibrium.defvjp(_equilibrium_forward, _equilibrium_backward)


@model(*SOLVER)
def deep_equilibrium() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _equilibrium(params, input) @ params["out"]

    return model_fn, normal(SHAPES), inputs(3)


@jax.custom_vjp
def _root(params: Any, x: Array) -> Array:
    return _solve(params, x)


def _root_backward(kept: Any, g: Array) -> Any:
    """Of the root of ``z - step(z)``, by a linear solve, as jaxopt's `implicit_diff` does."""
    params, x, z = kept
    _, pull = jax.vjp(lambda z: z - _step(z, params, x), z)
    u, _ = jax.scipy.sparse.linalg.gmres(lambda u: pull(u)[0], g, tol=1e-12, atol=1e-12)
    return jax.vjp(lambda p, x: _step(z, p, x), params, x)[1](u)


_root.defvjp(_equilibrium_forward, _root_backward)


@model(*SOLVER)
def implicit_differentiation_of_a_root() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _root(params, input) @ params["out"]

    return model_fn, normal(SHAPES), inputs(3)


@jax.custom_jvp
def _minimum(params: Any, x: Array) -> Array:
    return lax.while_loop(
        lambda state: state[0] < STEPS,
        lambda state: (state[0] + 1, _step(state[1], params, x)),
        (0, jnp.zeros(4)),
    )[1]


@_minimum.defjvp
def _minimum_jvp(primals: tuple[Any, Array], tangents: tuple[Any, Array]) -> tuple[Array, Array]:
    """The implicit function theorem in forward mode, as optimistix applies it."""
    params, x = primals
    z = _minimum(params, x)
    _, along = jax.jvp(lambda p, x: _step(z, p, x), primals, tangents)
    jacobian = jnp.eye(4) - jax.jacfwd(lambda z: _step(z, params, x))(z)
    return z, jnp.linalg.solve(jacobian, along)


@model(*SOLVER)
def forward_rule_of_a_while_loop() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _minimum(params, input) @ params["out"]

    return model_fn, normal(SHAPES), inputs(3)


@model(fallback("w", "other", 16, RULE), dense("u", 3, 4), dense("out", 4, 2))
def linear_solve_layer() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        def matvec(z: Array) -> Array:
            return 3.0 * z + params["w"] @ z

        def solve(matvec: Any, b: Array) -> Array:
            return lax.fori_loop(0, STEPS, lambda _, z: (b - matvec(z) + 3.0 * z) / 3.0, b)

        def transposed(vecmat: Any, b: Array) -> Array:
            return solve(vecmat, b)

        z = lax.custom_linear_solve(matvec, input @ params["u"], solve, transposed)
        return jnp.tanh(z) @ params["out"]

    params = normal(SHAPES)
    return model_fn, {**params, "w": 0.3 * params["w"]}, inputs(3)


def _euler(params: Any, x: Array) -> Array:
    """A neural ordinary differential equation by steps of fixed length."""

    def step(y: Array, _: None) -> tuple[Array, None]:
        return y + 0.25 * jnp.tanh(y @ params["w"] + params["b"]), None

    return lax.scan(step, x, None, length=4)[0]


FIELD = {"w": (4, 4), "b": (4,), "out": (4, 2)}


@model(dense("w", 4, 4, 4, bias=True), dense("out", 4, 2))
def neural_ode_with_fixed_steps() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _euler(params, input) @ params["out"]

    return model_fn, normal(FIELD), inputs(4)


@jax.custom_vjp
def _recomputed(params: Any, x: Array) -> Array:
    return _euler(params, x)


_recomputed.defvjp(
    lambda params, x: (_euler(params, x), (params, x)),
    lambda kept, g: jax.vjp(_euler, *kept)[1](g),
)


@model(dense("w", 4, 4, 4, bias=True), dense("out", 4, 2))
def adjoint_that_recomputes_its_steps() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _recomputed(params, input) @ params["out"]

    return model_fn, normal(FIELD), inputs(4)


@model(fallback("b", "other", 4, RULE), fallback("w", "other", 16, RULE), dense("out", 4, 2))
def adjoint_of_a_solver_with_the_whole_tree() -> Built:
    def field(y: Array, _: Array, params: Any) -> Array:
        return jnp.tanh(y @ params["w"] + params["b"])

    def model_fn(input: Array, params: Any) -> Array:
        times = jnp.asarray([0.0, 1.0])
        return odeint(field, input, times, params, rtol=1e-10, atol=1e-10)[-1] @ params["out"]

    return model_fn, normal(FIELD), inputs(4)


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    return jnp.tanh(x @ w)


_product.defvjp(
    lambda x, w: (_product(x, w), (x, w, jnp.tanh(x @ w))),
    lambda kept, g: (
        (g * (1.0 - kept[2] ** 2)) @ kept[1].T,
        jnp.outer(kept[0], g * (1.0 - kept[2] ** 2)),
    ),
)


@model(dense("one", 4, 5), dense("two", 5, 3))
def rule_that_is_the_derivative_written_out() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        return _product(_product(input, params["one"]), params["two"])

    return model_fn, normal({"one": (4, 5), "two": (5, 3)}), inputs(4)


@jax.custom_vjp
def _handed_on(params: Any, x: Array) -> tuple[Any, Array]:
    return params, jnp.exp(x * params["gain"])


_handed_on.defvjp(
    lambda params, x: (_handed_on(params, x), (x, params["gain"])),
    lambda kept, g: (
        {
            "gain": g[0]["gain"] + 0.5 * jnp.sum(g[1] * kept[0]),
            "w": g[0]["w"],
        },
        0.5 * g[1] * kept[1],
    ),
)


@model(fallback("gain", "other", 1, RULE), dense("w", 4, 3))
def weights_that_a_rule_hands_on() -> Built:
    def model_fn(input: Array, params: Any) -> Array:
        params, h = _handed_on(params, input)
        return jnp.tanh(h) @ params["w"]

    return model_fn, normal({"gain": (), "w": (4, 3)}), inputs(4)


@model(fallback("flat[0:28]", "other", 28, RULE), dense("flat[28:36]", 4, 2))
def flat_vector_of_which_a_rule_reads_a_part() -> Built:
    @jax.custom_vjp
    def solve(flat: Array, x: Array) -> Array:
        return _solve({"u": flat[:12].reshape(3, 4), "w": flat[12:28].reshape(4, 4)}, x)

    def backward(kept: Any, g: Array) -> Any:
        def read(flat: Array) -> Any:
            return {"u": flat[:12].reshape(3, 4), "w": flat[12:28].reshape(4, 4)}

        flat, x, z = kept
        params, into = jax.vjp(read, flat)
        moved, along = _equilibrium_backward((params, x, z), g)
        return into(moved)[0], along

    def forward(flat: Array, x: Array) -> Any:
        z = solve(flat, x)
        return z, (flat, x, z)

    solve.defvjp(forward, backward)

    def model_fn(input: Array, params: Any) -> Array:
        return solve(params["flat"], input) @ params["flat"][28:].reshape(4, 2)

    return model_fn, normal({"flat": (36,)}), inputs(3)
