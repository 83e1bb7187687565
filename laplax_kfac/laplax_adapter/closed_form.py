"""The covariance of the outputs at one input in closed form, where laplax asks for it.

laplax's linearised pushforward asks for the covariance as a product with vectors: the generic one
pulls every output through a product with the covariance of all parameters. Here the Jacobian of
each layer is contracted in the eigenbasis of its block. `lin_setup` makes the product by
``set_output_mv``, which is given the model's derivative but not the model; so ``get_dist_state``
hands on a derivative that knows the model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import laplax.eval.pushforward
from jaxtyping import PyTree

from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.curvature.matching import parse_like
from laplax_kfac.laplax_adapter.output_covariance import Numbered, OutputCovariance, Tabulated
from laplax_kfac.parsing.program import ModelFn, Program
from laplax_kfac.posterior.posterior import Posterior
from laplax_kfac.predictive.jacobians import linearise, output_covariance, output_variance

Entries: TypeAlias = dict[str, PyTree]


def closed_form(
    posterior: Posterior, model_fn: ModelFn, params: PyTree, x: PyTree
) -> OutputCovariance | None:
    """Covariance of the outputs at one input.

    Args:
        posterior: The posterior.
        model_fn: ``model_fn(input=, params=)``, for one example.
        params: The trained parameters.
        x: One input.

    Returns:
        None if there is no closed form: the model has not the layers of the posterior (it may be
        another function of the same parameters), or not one array as its output.
    """
    program = program_of(posterior.precision, model_fn, params, x)
    if program is None:
        return None
    blocks = posterior.precision.blocks
    leaves = program.space.flatten(params, name="params")
    of_one = functools.partial(linearise, program, leaves, program.consts, blocks)
    try:
        linear = of_one(x)
    except NotImplementedError:  # a primitive of the model has no rule for vmap
        linear = of_one(x, sequential=True)
    variances = [1.0 / block.eigenvalues for block in blocks]
    return OutputCovariance(
        tuple(program.output.shape),
        lambda: output_variance(linear, variances),
        lambda: output_covariance(linear, linear, variances),
    )


def program_of(
    matrix: BlockDiagonal, model_fn: ModelFn, params: PyTree, x: PyTree
) -> Program | None:
    """The model with the layers of a matrix and one output array; None if it is another."""
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), x)
    try:
        program = parse_like(matrix, model_fn, params, example)
    except ValueError:
        return None
    return program if hasattr(program.output, "shape") else None


# -- what names of laplax are bound to ---------------------------------------------------------


@dataclass(frozen=True)
class ModelDerivative:
    """laplax's derivative of the model at the trained parameters, with both of them.

    Attributes:
        jvp: laplax's, a function of an input and a direction.
        model_fn: ``model_fn(input=, params=)``, for one example.
        params: The trained parameters.
    """

    jvp: Callable[[PyTree, PyTree], PyTree]
    model_fn: ModelFn
    params: PyTree

    def __call__(self, input: PyTree, vector: PyTree) -> PyTree:
        """What laplax's does."""
        return self.jvp(input, vector)


def distribution_state(
    original: Callable[..., Entries],
    mean_params: PyTree,
    model_fn: ModelFn,
    posterior_state: object,
    **options: object,
) -> Entries:
    """What ``get_dist_state`` is bound to: with one of our posteriors, the model goes along."""
    state = original(mean_params, model_fn, posterior_state, **options)
    if "jvp" in state and isinstance(posterior_of(posterior_state), Posterior | Tabulated):
        state["jvp"] = ModelDerivative(state["jvp"], model_fn, mean_params)
    return state


def output_products(
    original: Callable[..., Entries],
    posterior_state: object,
    input: PyTree,
    jvp: Callable[..., PyTree],
    vjp: Callable[..., PyTree],
) -> Entries:
    """What ``set_output_mv`` is bound to: the covariance in closed form where there is one."""
    products = original(posterior_state, input, jvp, vjp)
    if isinstance(jvp, ModelDerivative):
        closed = covariance_at(posterior_of(posterior_state), jvp.model_fn, jvp.params, input)
        products["cov_mv"] = closed or products["cov_mv"]
    return products


def posterior_of(posterior_state: object) -> object:
    """What laplax's posterior has as its state; None if it is no posterior."""
    return getattr(posterior_state, "state", None)


def covariance_at(
    state: object, model_fn: ModelFn, params: PyTree, x: PyTree
) -> OutputCovariance | None:
    """Covariance of the outputs at one input, or at a number of one; None if not in closed form."""
    if isinstance(state, Tabulated):
        if isinstance(x, Numbered):
            return state.at(x)
        state = state.posterior
    return closed_form(state, model_fn, params, x) if isinstance(state, Posterior) else None


def setup_linearised(
    results: Entries, aux: Entries, input: PyTree, dist_state: Entries, **kwargs: object
) -> tuple[Entries, Entries]:
    """The first of laplax's linearised ``pushforward_fns``; output covariances in closed form.

    Goes where laplax's ``lin_setup`` goes, before ``lin_pred_mean``, ``lin_pred_var`` and the
    others, which it leaves as they are. Other curvature types get the generic setup, and so does a
    model whose layers are not those of the curvature.

    With the package imported, ``lin_setup`` finds the closed form as well; this function does so
    with any ``dist_state``, also one that was not made by laplax's ``get_dist_state``.

    Args:
        results: Predictions so far.
        aux: What pushforward functions hand on to each other.
        input: One input.
        dist_state: laplax's distribution state.
        **kwargs: Ignored, as by ``lin_setup``.
    """
    results, aux = laplax.eval.pushforward.lin_setup(
        results, aux, input=input, dist_state=dist_state, **kwargs
    )
    if not isinstance(aux["cov_mv"], OutputCovariance):
        state = posterior_of(dist_state["posterior_state"])
        closed = covariance_at(state, aux["model_fn"], aux["mean_params"], input)
        aux["cov_mv"] = closed or aux["cov_mv"]
    return results, aux
