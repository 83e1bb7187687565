"""The six functions that laplax's register asks of a curvature type, for each of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from laplax_kfac.arguments import listed, nearest, no_type_check, require_positive, shown
from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.curvature.curvature import Curvature
from laplax_kfac.curvature.kfac import ekfac, kfac, kfoc
from laplax_kfac.laplax_adapter.problem import problem_of
from laplax_kfac.parsing.layout import ParameterSpace
from laplax_kfac.posterior.posterior import Posterior, make_posterior
from laplax_kfac.posterior.prior import Scalar, log_prior

CURVATURE_TYPES: dict[str, Callable[..., Curvature]] = {"kfac": kfac, "ekfac": ekfac, "kfoc": kfoc}

PriorArguments: TypeAlias = Mapping[str, PyTree]
PRIOR_ARGUMENTS = ("prior_prec", "sigma_squared", "sigma")
"""Those of laplax's dictionary that anyone reads; ``sigma`` belongs to its marginal likelihood."""
Flat: TypeAlias = Float[Array, " P"]


@dataclass(frozen=True)
class CurvatureType:
    """``create_curvature_fn`` of one of our types: reads the layers off the model.

    Attributes:
        name: The curvature type.
    """

    name: str

    def __call__(self, mv: object = None, layout: PyTree = None, **options: object) -> Curvature:
        """Curvature for `laplax.curv.cov.estimate_curvature`.

        Args:
            mv: What ``laplax.api.GGN`` returns, which carries the model, the data and the loss. Of
                another matrix-vector product nothing can be read.
            layout: The parameters.
            **options: ``model_fn``, ``data`` and ``loss_fn``, where ``mv`` does not carry them, and
                the other arguments of `kfac`.

        Raises:
            TypeError: If the model, the data, the loss or the parameters are missing.
            ValueError: If parameters are complex.
        """
        problem = problem_of(mv)
        given = {**(problem.options() if problem else {}), **options}
        missing = [name for name in ("model_fn", "data", "loss_fn") if name not in given]
        if missing or layout is None:
            msg = (
                f"curv_type={self.name!r} reads the layers off the model, which a matrix-vector "
                f"product does not show; missing: {', '.join(missing or ['layout'])}. Call "
                f"laplax.laplace(model_fn, params, data, loss_fn=..., curv_type={self.name!r}), or "
                f"pass them on: estimate_curvature({self.name!r}, mv=None, layout=params, "
                "model_fn=model_fn, data=data, loss_fn=loss_fn)."
            )
            raise TypeError(msg)
        space = ParameterSpace.of(layout)
        pairs = [name for leaf, name in enumerate(space.names) if space.is_complex(leaf)]
        if pairs:
            msg = (
                f"`params` has the complex leaves {listed(pairs)}, and laplax's vectors of "
                "parameters are real. Make real and imaginary part leaves of their own, which "
                "`model_fn` puts together by jax.lax.complex, or call laplax_kfac.kfac and "
                "laplax_kfac.make_posterior, which take complex leaves."
            )
            raise ValueError(msg)
        model_fn, data = given.pop("model_fn"), given.pop("data")
        curvature = CURVATURE_TYPES[self.name](model_fn, layout, data, **given)
        factor = problem.factor if problem else 1.0
        if factor != 1.0:
            name = "`num_curv_samples` / `num_total_samples`, the factor of the curvature,"
            require_positive(name, factor, shape=())
        if factor == 1.0:  # each product is a compilation
            return curvature
        return curvature.map(lambda eigenvalues: factor * eigenvalues)


def require_prior_arguments(prior_arguments: object) -> None:
    """Refuse prior arguments that lack the prior precision, or that nobody reads.

    Raises:
        TypeError: If they are no dictionary.
        ValueError: If there are such.
    """
    if not isinstance(prior_arguments, Mapping):
        msg = (
            "`prior_arguments` must be a dictionary such as {'prior_prec': 1.0}, found "
            f"{shown(prior_arguments)}."
        )
        raise TypeError(msg)
    unknown = [name for name in prior_arguments if name not in PRIOR_ARGUMENTS]
    if unknown or "prior_prec" not in prior_arguments:
        near = "".join(nearest(name, PRIOR_ARGUMENTS) for name in unknown[:1])
        msg = (
            "`prior_arguments` must have the key 'prior_prec', and may have "
            f"{listed(PRIOR_ARGUMENTS[1:])}; found {listed(prior_arguments)}.{near}"
        )
        raise ValueError(msg)


@no_type_check
def curvature_to_precision(
    curv_estimate: Curvature,
    prior_arguments: PriorArguments,
    loss_scaling_factor: Scalar | int = 1.0,
) -> BlockDiagonal:
    """Posterior precision ``(sigma_squared * curvature + prior_prec) / loss_scaling_factor``.

    Raises:
        TypeError: If the prior arguments are no dictionary.
        ValueError: If one is missing, unknown, or not as `make_posterior` takes it.
    """
    require_prior_arguments(prior_arguments)
    return make_posterior(
        curv_estimate,
        prior_arguments["prior_prec"],
        sigma_squared=prior_arguments.get("sigma_squared", 1.0),
        loss_scaling_factor=loss_scaling_factor,
    ).precision


def precision_to_posterior(precision: BlockDiagonal) -> Posterior:
    """The state of laplax's posterior: eigenvalues serve covariance and scale alike."""
    return Posterior(precision)


def posterior_to_scale(state: Posterior) -> Callable[[Flat], Flat]:
    """Product with a square root of the covariance, on flat parameters."""
    return on_flat(state, state.scale_mv)


def posterior_to_covariance(state: Posterior) -> Callable[[Flat], Flat]:
    """Product with the covariance, on flat parameters."""
    return on_flat(state, state.covariance_mv)


def on_flat(state: Posterior, method: Callable[[PyTree], PyTree]) -> Callable[[Flat], Flat]:
    """A product with pytrees like the parameters, as one with flat vectors."""
    space = state.precision.space

    def mv(vector: Flat) -> Flat:
        return space.ravel(space.flatten(method(space.unflatten(space.unravel(vector)))))

    return mv


def marginal_log_likelihood(
    posterior_precision: BlockDiagonal,
    prior_arguments: PriorArguments,
    full_fn: Callable[..., Array],
    params: PyTree,
    data: Mapping[str, PyTree],
) -> Float[Array, "..."]:
    """Evidence in laplax's conventions, as for ``"full"``: they belong to the likelihood alone."""
    scale = 2 * prior_arguments.get("sigma", 1.0)
    fit = -full_fn(data["input"], data["target"], params) / scale
    prior = log_prior(prior_arguments["prior_prec"], posterior_precision, params)
    volume = posterior_precision.num_free() * jnp.log(2 * jnp.pi)
    return fit + prior + 0.5 * (volume - posterior_precision.log_determinant())
