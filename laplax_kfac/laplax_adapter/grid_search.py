"""laplax's grid search, with what does not depend on the prior worked out once for the grid.

``laplax.calibration`` builds an objective, a function of prior and data, by a function that knows
the model and the posterior, ``_build_calibration_objective``. Its grid search is given a function
of the prior alone. Where we find the noted objective within it, the search runs over an objective
whose priors carry the linearised model: as an argument, for as a constant of what is compiled it
would take seconds to compile.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import jax
import laplax.api
from jaxtyping import Array, Float, PyTree

from laplax_kfac.blocks.blocks import BlockDiagonal
from laplax_kfac.capture.batches import Batch
from laplax_kfac.laplax_adapter.curvature_types import PriorArguments
from laplax_kfac.laplax_adapter.dataset import LINEARISED, PosteriorFn
from laplax_kfac.laplax_adapter.objectives import CLASS_NLL, class_nll
from laplax_kfac.laplax_adapter.predictions import Arguments, dataset_of
from laplax_kfac.posterior.posterior import Posterior

Objective: TypeAlias = Callable[[PriorArguments, Batch], Float[Array, ""]]

ANY_PRIOR: PriorArguments = {"prior_prec": 1.0}
"""For what does not depend on the prior."""


@dataclass(frozen=True, eq=False)
class NotedObjective:
    """laplax's objective, and what it was built of.

    Attributes:
        own: laplax's.
        build: Builds it, given other arguments.
        arguments: The arguments.
    """

    own: Objective
    build: Callable[..., Objective]
    arguments: Arguments

    def __call__(self, prior_arguments: PriorArguments, data: Batch) -> Float[Array, "..."]:
        """What laplax's does."""
        return self.own(prior_arguments, data)

    def of_dataset(self, data: Batch) -> Callable[[PriorArguments], Float[Array, "..."]] | None:
        """The objective for these data as a function of the prior; None if it is laplax's own."""
        predictive = self.arguments["set_prob_predictive"]
        posterior_fn = predictive.keywords["posterior_fn"]
        if not is_ours(posterior_fn, ANY_PRIOR):
            return None
        dataset = dataset_of(predictive.keywords, data, posterior_fn(ANY_PRIOR))
        if dataset is None or not same_bases(dataset.matrix, self.arguments["curv_estimate"]):
            return None
        own = {**predictive.keywords, **dataset.in_place_of_own()}
        predict = functools.partial(predictive.func, **own)
        objective = jax.jit(self.build(**{**self.arguments, "set_prob_predictive": predict}))
        linearised, numbered = dataset.linearise(), dataset.numbered
        return lambda prior: objective({**prior, LINEARISED: linearised}, numbered)


def is_ours(posterior_fn: PosteriorFn, prior_arguments: PriorArguments) -> bool:
    """Whether a posterior function makes a posterior of this package; nothing is computed."""
    try:
        state = jax.eval_shape(lambda: posterior_fn(prior_arguments).state)
    except Exception:  # whatever it raises, it raises again where laplax calls it
        return False
    return isinstance(state, Posterior)


def same_bases(matrix: BlockDiagonal, other: object) -> bool:
    """Whether both have the very same arrays as bases, so that no prior changes them."""
    if not isinstance(other, BlockDiagonal) or len(other.blocks) != len(matrix.blocks):
        return False
    pairs = zip(matrix.blocks, other.blocks, strict=True)
    leaves = [(jax.tree.leaves(b.sides), jax.tree.leaves(c.sides)) for b, c in pairs]
    return all(len(us) == len(vs) and all(map(operator.is_, us, vs)) for us, vs in leaves)


def calibration_objective(
    original: Callable[..., Objective], objective_type: object, **arguments: PyTree
) -> Objective:
    """What ``laplax.api._build_calibration_objective`` is bound to.

    It knows one objective more, ``"class_nll"``. The marginal likelihood asks for no predictions,
    and other pushforwards are not linearised.
    """
    build: Callable[..., Objective] = functools.partial(original, objective_type)
    if str(objective_type).lower() == CLASS_NLL:
        build = class_nll
    objective = build(**arguments)
    predictive = arguments.get("set_prob_predictive")
    linearised = getattr(predictive, "func", None) is laplax.api.set_lin_pushforward
    if not linearised or str(objective_type).lower() == "marginal_log_likelihood":
        return objective
    return NotedObjective(objective, build, arguments)


def search_grid(
    original: Callable[..., PyTree],
    objective: Callable[[PriorArguments], Float[Array, "..."]],
    **options: PyTree,
) -> PyTree:
    """What ``laplax.api.calibration_options["grid_search"]`` is."""
    plain = inspect.unwrap(objective)  # `calibration` compiles it
    within: Mapping[str, object] = {}
    if inspect.isfunction(plain):
        within = inspect.getclosurevars(plain).nonlocals
    noted, data = within.get("objective_fn"), within.get("data")
    if isinstance(noted, NotedObjective) and isinstance(data, dict):
        objective = noted.of_dataset(data) or objective
    return original(objective=objective, **options)
