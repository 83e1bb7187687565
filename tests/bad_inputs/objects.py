"""Objects of another kind than the argument takes, and models, data and parameters that misfit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import laplax
import numpy as np
from support.matrices import normal

import laplax_kfac as lk
from bad_inputs.fitted import CALLS, CLASSES, LABELS, PARAMS, X, fitted, model
from bad_inputs.rows import Row, rows

FITS = ("kfac", "data_fit", "relative_error", "marglik_training", "laplace")
PREDICTIVES = (
    "predictive_covariance", "predictive_variance", "joint_covariance", "predictive_samples",
)  # fmt: skip
WITH_MODEL = (*FITS, *PREDICTIVES, "find_layers", "intermediates_and_gradients", "ekfac")
WITH_CURVATURE = (
    *PREDICTIVES, "make_posterior", "log_marginal_likelihood", "tune", "relative_error",
)  # fmt: skip
WITH_PARAMS = (*PREDICTIVES, "relative_error", "log_marginal_likelihood", "tune")


# -- models ------------------------------------------------------------------------------------


def params_first(params, inputs):
    return model(inputs, params)


def one_argument(x):
    return x @ PARAMS["first"]["w"]


class Net:
    """Parameters are called variables, as in flax."""

    def apply(self, variables, *args, rngs=None):
        del rngs
        (x,) = args
        return model(x, variables)


def classes(input, params):
    return jnp.argmax(model(input, params))


def nothing(input, params):
    model(input, params)


def number(input, params):
    del input, params
    return 1.0


def of_a_batch(input, params):
    return jax.vmap(lambda x: model(x, params))(input) + 0.0 * input[:, :2]


def mean_of_a_batch(input, params):
    return model(input, params).mean(axis=0)


def branching(input, params):
    return model(input, params) if input[0] > 0 else model(-input, params)


CONVENTION = "must take the keywords `input` and `params`, by laplax's convention"
MODELS: list[Row] = [
    *rows(WITH_MODEL, "model_fn", [params_first], TypeError, CONVENTION),
    *rows(
        ["kfac"],
        "model_fn",
        {"(params, inputs), with a wrapper": params_first},
        TypeError,
        "`lambda input, params: params_first(params, input)`",
    ),
    *rows(
        ["kfac", "find_layers"],
        "model_fn",
        {"net.apply": Net().apply},
        TypeError,
        "`lambda input, params: apply(params, input)`",
    ),
    *rows(
        ["kfac"],
        "model_fn",
        {"(variables, rng, x)": lambda variables, rng, x: model(x, variables)},  # noqa: ARG005
        TypeError,
        "`lambda input, params: f(params, None, input)`",
    ),
    *rows(["kfac", "data_fit"], "model_fn", [one_argument], TypeError, "eqx.combine"),
    *rows(WITH_MODEL, "model_fn", [None], TypeError, "must be a function"),
    *rows(["kfac"], "model_fn", ["model", 3], TypeError, "must be a function"),
    *rows(WITH_MODEL, "model_fn", [classes], TypeError, "which has no derivative"),
    *rows(["kfac", "data_fit"], "model_fn", [nothing, number], TypeError, "must return an array"),
    *rows(["kfac", "predictive_variance"], "model_fn", [branching], TypeError, "TracerBoolConv"),
    *rows(
        ["kfac", "data_fit", "predictive_variance", "find_layers"],
        "model_fn",
        [of_a_batch],
        TypeError,
        "It takes batches: pass `vmap_over_data=False`.",
    ),
    *rows(
        ["kfac"],
        "model_fn",
        [mean_of_a_batch],
        TypeError,
        "must return arrays with the axis of examples in front",
        vmap_over_data=False,
    ),
]

# -- data --------------------------------------------------------------------------------------

FAILS = "`model_fn` fails on one example"
DATA: list[Row] = [
    Row(f"{row.id}, the model said", row.call, row.error, row.text, "model_fn")
    for row in [
        *rows(FITS, "data", {"of 4 features": (normal(8, 4), LABELS)}, TypeError, FAILS),
        *rows(
            ["kfac", "data_fit", "laplace"],
            "data",
            {"(y, x)": (LABELS, X)},
            TypeError,
            "are input and target swapped?",
        ),
        *rows(
            ["kfac", "data_fit"],
            "data",
            {"one example": (X[0], LABELS[:3])},
            TypeError,
            "is the axis of examples missing in front",
        ),
        *rows(
            PREDICTIVES,
            "inputs",
            {"of 4 features": normal(2, 4), "in a dictionary": {"x": X}},
            TypeError,
            FAILS,
        ),
        *rows(
            ["find_layers"],
            "example_input",
            {"4 features": X[0, :2], "None": None, "a number": 1.0},
            TypeError,
            FAILS,
        ),
        *rows(
            ["kfac", "find_layers", "data_fit"],
            "params",
            {
                "of another layer": PARAMS | {"last": {"w": np.zeros((5, 2)), "b": np.zeros(2)}},
                "without a layer": {"first": PARAMS["first"]},
                "renamed": {"frist": PARAMS["first"], "last": PARAMS["last"]},
            },
            TypeError,
            FAILS,
        ),
    ]
]
SHAPES: list[Row] = [
    *rows(
        ["kfac", "data_fit", "intermediates_and_gradients", "laplace", "marglik_training"],
        "data",
        {"one example": (X[0], LABELS[0]), "fewer targets": (X, LABELS[:5])},
        ValueError,
        "need the same leading axis",
    ),
    *rows(["kfac", "data_fit"], "data", {"none": (X[:0], LABELS[:0])}, ValueError, "no examples"),
    *rows(
        ["kfac", "data_fit", "relative_error", "intermediates_and_gradients"],
        "data",
        {"no targets": (X, None), "no inputs": (None, LABELS)},
        ValueError,
        "is None",
    ),
    *rows(
        ["kfac", "data_fit", "laplace"],
        "data",
        {"text": (np.full((8, 3), "a"), LABELS), "objects": (np.full((8, 3), object()), LABELS)},
        TypeError,
        "cannot read as numbers",
    ),
    *rows(
        PREDICTIVES,
        "inputs",
        {"one input": X[0], "an axis more": X[None], "a whole batch": (X, LABELS)},
        ValueError,
        "behind it the axes of the examples that the curvature is of",
    ),
    *rows(PREDICTIVES, "inputs", {"None": None, "a number": 1.0}, ValueError, "leading axis"),
    *rows(PREDICTIVES, "inputs", {"none": X[:0]}, ValueError, "no examples"),
    *rows(PREDICTIVES, "inputs", {"text": np.full((2, 3), "a")}, TypeError, "cannot read"),
    *rows(
        ["joint_covariance"],
        "others",
        {"of 4 features": normal(2, 4), "of another dtype": np.ones((2, 3), int)},
        ValueError,
        "must be like `inputs`",
    ),
    *rows(["joint_covariance"], "others", {"one input": X[0]}, ValueError, "behind it the axes"),
    *rows(["find_layers"], "example_input", ["a"], TypeError, "must be made of arrays"),
    *rows(
        ["find_layers"],
        "example_input",
        {"a number, no batch": 1.0},
        ValueError,
        "must be a batch",
        vmap_over_data=False,
    ),
]

# -- parameters --------------------------------------------------------------------------------

MISFITS: dict[str, Any] = {
    "without a layer": {"first": PARAMS["first"]},
    "renamed": {"frist": PARAMS["first"], "last": PARAMS["last"]},
    "of other shapes": PARAMS | {"last": {"w": np.zeros((5, 2)), "b": np.zeros(2)}},
    "with more": PARAMS | {"scale": np.zeros(2)},
    "None": None,
}
LIKE = "must be a pytree with the structure and shapes of `params`"
NO_ARRAYS = {"text": PARAMS | {"last": {"w": "a", "b": np.zeros(2)}}}
PARAMETERS: list[Row] = [
    *rows(WITH_PARAMS, "params", MISFITS, ValueError, LIKE),
    *rows(["Curvature.sample"], "params", MISFITS, ValueError, LIKE),
    *rows(["sample"], "mean", {k: x for k, x in MISFITS.items() if k != "None"}, ValueError, LIKE),
    *rows(["sample"], "params", [None], ValueError, "does not know its mean", mean=None),
    *rows(["inverse_mv"], "v", MISFITS, ValueError, LIKE),
    *rows(
        ["log_marginal_likelihood", "tune", "marglik_training"],
        "prior_mean",
        {name: MISFITS[name] for name in ("without a layer", "of other shapes")},
        ValueError,
        LIKE,
    ),
    *rows([*WITH_PARAMS, "kfac", "data_fit"], "params", NO_ARRAYS, TypeError, "must hold arrays"),
    *rows(["kfac", "data_fit", "find_layers"], "params", [{}, None], ValueError, "has no leaves"),
    *rows(["kfac", "data_fit"], "params", [{"first": 1.0}], TypeError, "must hold arrays"),
]

# -- curvatures, posteriors, states ------------------------------------------------------------


def kept(name):
    """What is fitted once, fitted when a row is run."""
    return lambda: getattr(fitted(), name)


def passed(function, argument, make):
    """Pass an argument that is made now."""
    return CALLS[function](**{argument: make()})


def lazily(functions, argument, values, error, text):
    """Rows whose values are made when the row is run."""
    return [
        Row(
            f"{function} {argument}: {name}",
            functools.partial(passed, function, argument, make),
            error,
            text,
            argument,
        )
        for function in functions
        for name, make in values.items()
    ]


NO_CURVATURE = {
    "a posterior": kept("posterior"),
    "a state": kept("state"),
    "None": lambda: None,
    "an array": lambda: np.eye(22),
    "what laplace returns": lambda: (None, fitted().curvature),
}
NO_STATE = {"a curvature": kept("curvature"), "None": lambda: None, "a dictionary": dict}
NO_FIT = {"a curvature": kept("curvature"), "a number": lambda: -1.0, "None": lambda: None}


def sampled():
    return lk.kfac(**CLASSES, fisher_type="mc")


def separate():
    return lk.kfac(**CLASSES, separate_weight_and_bias=True)


ACCUMULATOR: Any = lk.accumulator(model, PARAMS, loss_fn="mse")


def posterior_of(prior_arguments):
    posterior_fn, _ = laplax.laplace(**CLASSES, curv_type="kfac")
    return posterior_fn(prior_arguments)


KINDS: list[Row] = [
    *lazily(WITH_CURVATURE, "curvature", NO_CURVATURE, TypeError, "must be a curvature"),
    *lazily(["merge"], "first", NO_CURVATURE, TypeError, "must be a curvature"),
    *lazily(["merge"], "second", NO_CURVATURE, TypeError, "must be a curvature"),
    *lazily(
        ["predictive_variance"],
        "curvature",
        {"a posterior, with a hint": kept("posterior")},
        TypeError,
        "holds its prior, too",
    ),
    *lazily(["merge"], "second", {"of mse": kept("of_regression")}, ValueError, "of one `loss`"),
    *lazily(["merge"], "first", {"of mse": kept("of_regression")}, ValueError, "of one `loss`"),
    *lazily(["merge"], "second", {"of mc": sampled}, ValueError, "of one `fisher_type`"),
    *lazily(["update"], "state", NO_STATE, TypeError, "must be a state of an accumulator"),
    *lazily(["optimise"], "state", NO_STATE, TypeError, "must be a state of an accumulator"),
    *lazily(["log_marginal_likelihood", "tune"], "log_likelihood", NO_FIT, TypeError, "`data_fit`"),
    *lazily(
        ["class_probabilities"],
        "predictive",
        {"an array": lambda: np.zeros((2, 2)), "None": lambda: None} | NO_CURVATURE,
        TypeError,
        "must be what `predictive_covariance` or",
    ),
    *lazily(
        ["class_probabilities"],
        "predictive",
        {"an accumulator": kept("accumulator")},
        TypeError,
        "must be what",
    ),
    *rows(["save"], "x", [None, 1.0, "x"], TypeError, "must be a Curvature or a Posterior"),
    *[
        Row(f"{name} of an accumulator", call, TypeError, "must be a state", argument)
        for name, call, argument in (
            ("finalize None", lambda: ACCUMULATOR.finalize(None), "state"),
            ("finalize a curvature", lambda: ACCUMULATOR.finalize(fitted().curvature), "state"),
            ("merge None", lambda: ACCUMULATOR.merge(fitted().state, None), "second"),
            ("merge with None", lambda: ACCUMULATOR.merge(None, fitted().state), "first"),
            (
                "merge a curvature",
                lambda: ACCUMULATOR.merge(fitted().state, fitted().curvature),
                "second",
            ),
        )
    ],
    Row(
        "merge curvatures of other blocks",
        lambda: lk.merge(fitted().curvature, separate()),
        ValueError,
        "must be of the same layers",
        unnamed="it is about both arguments",
    ),
    Row(
        "finalize without data",
        lambda: fitted().accumulator.finalize(fitted().accumulator.init()),
        ValueError,
        "needs statistics of some data",
        unnamed="nothing was passed",
    ),
    *[
        Row(
            f"prior_arguments {name}",
            functools.partial(posterior_of, value),
            error,
            text,
            "prior_arguments",
        )
        for name, value, error, text in (
            ("prior_arguments {}", {}, ValueError, "must have the key 'prior_prec'"),
            ("prior_arguments prior", {"prior": 1.0}, ValueError, "Did you mean 'prior_prec'?"),
            (
                "prior_arguments temperature",
                {"prior_prec": 1.0, "temperature": 2.0},
                ValueError,
                "'temperature'",
            ),
            (
                "prior_arguments sigma_sq",
                {"prior_prec": 1.0, "sigma_sq": 2.0},
                ValueError,
                "Did you mean 'sigma",
            ),
            ("prior_arguments None", None, TypeError, "must be a dictionary"),
            ("prior_arguments 1.0", 1.0, TypeError, "must be a dictionary"),
        )
    ],
    *rows(["kfac", "accumulator"], "loss_fn", ["mse_loss", "huber"], ValueError, "expected one of"),
    *rows(["kfac", "data_fit"], "loss_fn", [None, 3], TypeError, "must be a laplax LossFn"),
    *rows(
        ["kfac", "find_layers"], "options", [{"mc_samples": 2}], TypeError, "laplax_kfac.Options"
    ),
    *rows(["kfac", "data_fit", "marglik_training"], "transform", [3, "x"], TypeError, "a function"),
    *rows(["marglik_training"], "optimizer", ["adam", 0.1], TypeError, "must be one of optax"),
    *[
        Row(
            f"{function} has no argument mc_sample",
            functools.partial(CALLS[function], mc_sample=2),
            TypeError,
            "did you mean 'mc_samples'?",
            unnamed="it names it in quotes, as Python does",
        )
        for function in ("kfac", "find_layers", "marglik_training")
    ],
]
ROWS: list[Row] = [*MODELS, *DATA, *SHAPES, *PARAMETERS, *KINDS]
