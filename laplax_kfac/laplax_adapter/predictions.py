"""laplax's evaluation, with the predictions for all examples of a dataset worked out together.

Two names that ``laplax.evaluation`` looks up carry it: ``set_lin_pushforward`` notes on its
predictive what it was made of, and ``evaluate_metrics_on_dataset`` is given that predictive and the
data. Each does what laplax's own does unless the posterior is one of ours, and every pushforward
function one that `needs_covariance` knows.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import laplax.api
import laplax.eval.pushforward
from jaxtyping import PyTree

from laplax_kfac.capture.batches import Batch, batch_size
from laplax_kfac.laplax_adapter.closed_form import (
    Entries,
    posterior_of,
    program_of,
    setup_linearised,
)
from laplax_kfac.laplax_adapter.dataset import Dataset
from laplax_kfac.laplax_adapter.output_covariance import Tabulated
from laplax_kfac.posterior.posterior import Posterior

Predict: TypeAlias = Callable[[PyTree], Entries]
Arguments: TypeAlias = Mapping[str, PyTree]

NOTES = "laplax_kfac_notes"
"""Attribute of a predictive with one of our posteriors: what it was made of."""


@dataclass(frozen=True)
class Notes:
    """What a predictive was made of.

    Attributes:
        make: laplax's ``set_lin_pushforward``.
        arguments: Its arguments.
        posterior: laplax's posterior.
    """

    make: Callable[..., Predict]
    arguments: Arguments
    posterior: object


NEEDS_COVARIANCE = {
    "lin_setup": False,
    "lin_pred_mean": False,
    "lin_pred_var": False,
    "lin_pred_std": False,
    "lin_pred_cov": True,
    "get_pred_act": False,
}
"""laplax's pushforward functions that work without samples, and which needs more than variances."""

SPECIAL_NEEDS_COVARIANCE = {"mean_field_0": False, "mean_field_1": False, "mean_field_2": True}
"""The same of its approximate integrals of the softmax; the others fail in laplax."""


def needs_covariance(functions: Sequence[Callable[..., object]]) -> bool | None:
    """Whether pushforward functions need covariances; None if variances may not be enough either.

    So it is with functions that draw samples, and with functions that are not laplax's.
    """
    modules = (laplax.eval.pushforward, laplax.api)
    known = [
        (getattr(module, name, None), covariance)
        for module in modules
        for name, covariance in NEEDS_COVARIANCE.items()
    ]
    special = [module.lin_special_pred_act for module in modules]
    needs: list[bool | None] = []
    for function in functions:
        if isinstance(function, functools.partial) and function.func in special:
            kind = str(function.keywords.get("special_pred_type")).lower()
            needs.append(SPECIAL_NEEDS_COVARIANCE.get(kind))
        elif function is setup_linearised:
            needs.append(False)
        else:  # by identity: a user's function need have no hash
            needs.append(next((need for f, need in known if f is function), None))
    return None if None in needs else any(needs)


def dataset_of(arguments: Arguments, data: Batch, posterior: object) -> Dataset | None:
    """The predictions for a dataset; None where laplax is to work on it as it does.

    Args:
        arguments: Those of ``set_lin_pushforward``.
        data: The data, as laplax takes them.
        posterior: laplax's posterior for any prior.
    """
    functions = arguments.get("pushforward_fns")
    covariance = needs_covariance(functions) if functions else None
    state = posterior_of(posterior)
    if covariance is None or not isinstance(state, Posterior):
        return None
    try:
        batch_size(data)
    except ValueError:
        return None  # laplax says what is wrong
    model_fn, params = arguments["model_fn"], arguments["mean_params"]
    batch = {**data, "input": jax.tree.map(jnp.asarray, data["input"])}
    first = jax.tree.map(lambda x: x[0], batch["input"])
    program = program_of(state.precision, model_fn, params, first)
    if program is None:
        return None
    dataset = Dataset(
        arguments["posterior_fn"], model_fn, params, batch, state.precision, program,
        diagonal=not covariance,
    )  # fmt: skip
    return dataset if dataset.fits else None


def linearised_pushforward(
    original: Callable[..., Predict], *args: PyTree, **kwargs: PyTree
) -> Predict:
    """What ``laplax.api.set_lin_pushforward`` is bound to: notes what a predictive is made of.

    laplax draws samples of the weights before anyone asks for them; with one of our posteriors, and
    pushforward functions that need none, it is told to draw none.
    """
    functions = kwargs.get("pushforward_fns")
    if args or not functions or needs_covariance(functions) is None:
        return original(*args, **kwargs)  # laplax's own calls name all arguments
    scale = kwargs.get("loss_scaling_factor", 1.0)
    posterior = kwargs["posterior_fn"](kwargs["prior_arguments"], scale)
    if not isinstance(posterior_of(posterior), Posterior | Tabulated):
        return original(**{**kwargs, "posterior_fn": lambda *_: posterior})
    predict = original(**{**kwargs, "posterior_fn": lambda *_: posterior, "num_samples": 0})
    setattr(predict, NOTES, Notes(original, kwargs, posterior))
    return predict


def metrics_on_dataset(
    original: Callable[..., Entries], pred_fn: Predict, data: Batch, **options: PyTree
) -> Entries:
    """What ``laplax.api.evaluate_metrics_on_dataset`` is bound to."""
    plain = getattr(pred_fn, "__wrapped__", pred_fn)  # `evaluation` compiles it
    notes: Notes | None = getattr(plain, NOTES, None)
    dataset = dataset_of(notes.arguments, data, notes.posterior) if notes else None
    if notes is None or dataset is None:
        return original(pred_fn=pred_fn, data=data, **options)
    predict = notes.make(**{**notes.arguments, **dataset.in_place_of_own()})
    return original(pred_fn=jax.jit(predict), data=dataset.numbered, **options)
