"""Numbers, flags and keys of the wrong value or kind."""

import jax
import jax.numpy as jnp
import numpy as np

from bad_inputs.fitted import KEY
from bad_inputs.rows import Row, rows

FITS = ("kfac", "ekfac", "kfoc")
PREDICTIVES = (
    "predictive_covariance", "predictive_variance", "joint_covariance", "predictive_samples",
)  # fmt: skip
WITH_OPTIONS = ("Options", "kfac", "accumulator", "find_layers", "laplace", "marglik_training")
NO_COUNT = [0, -1, 2.5, True, "8", None, np.float32(2)]
NO_COUNT_OR_NONE = [value for value in NO_COUNT if value is not None]
NOT_POSITIVE = [0, -1.0, float("nan"), float("inf"), 1j, 1e-300, np.float32(0), jnp.asarray(-2.0)]
NO_NUMBER = ["1", True, {}, b"1", np.asarray("1")]
NO_FLAG = ["false", 1, None, "True", 0.0]
NO_KEY = {
    "0": 0,
    "text": "key",
    "two keys": jax.random.split(KEY),
    "floats": jnp.ones(2),
    "an integer array": np.arange(2),
}
POSITIVE = "must be a positive integer"
REAL = "must be a real number"

PRIORS = ("make_posterior", "logdet", "predictive_variance", "log_marginal_likelihood", "tune")
SCALED = ("make_posterior", "predictive_covariance", "predictive_samples")

ROWS: list[Row] = [
    # counts
    *rows([*FITS[:1], "data_fit", "relative_error"], "batch_size", NO_COUNT, ValueError, POSITIVE),
    *rows(["marglik_training"], "batch_size", NO_COUNT, ValueError, POSITIVE),
    *rows([*FITS[1:], "laplace", *PREDICTIVES], "batch_size", NO_COUNT[:4], ValueError, POSITIVE),
    *rows(["Options", "kfac", "laplace"], "mc_samples", NO_COUNT[:4], ValueError, POSITIVE),
    *rows(["Options"], "sketches", NO_COUNT_OR_NONE, ValueError, POSITIVE),
    *rows(["Options"], "dense_limit", [-1, 2.5, True, "8"], ValueError, "an integer of at least 0"),
    *rows(["Options"], "max_factor_size", NO_COUNT[:4], ValueError, "must be a positive integer"),
    *rows(["kfac", "kfoc", "optimise"], "iterations", NO_COUNT[:4], ValueError, POSITIVE),
    *rows(["relative_error"], "num_probes", NO_COUNT, ValueError, POSITIVE),
    *rows(["sample", "predictive_samples"], "num_samples", NO_COUNT, ValueError, POSITIVE),
    *rows(["Curvature.sample"], "n", NO_COUNT[:4], ValueError, POSITIVE),
    *rows(["sample"], "start", [-1, 0.5, "0", True], ValueError, "an integer of at least 0"),
    *rows(["class_probabilities"], "num_samples", NO_COUNT, ValueError, POSITIVE),
    *rows(["class_probabilities"], "num_classes", NO_COUNT_OR_NONE, ValueError, POSITIVE),
    *rows(["class_probabilities"], "num_classes", [3], ValueError, "does not divide"),
    *rows(["marglik_training"], "epochs", NO_COUNT, ValueError, POSITIVE),
    *rows(["marglik_training"], "every", [0, 1.5, True], ValueError, POSITIVE),
    *rows(["marglik_training"], "patience", NO_COUNT_OR_NONE, ValueError, POSITIVE),
    *rows(["marglik_training"], "burn_in", [-1, 0.5, "1"], ValueError, "at least 0"),
    *rows(["marglik_training"], "burn_in", [1, 10], ValueError, "must not exceed `epochs`"),
    *rows(["marglik_training"], "hyper_steps", [-1, 0.5, "1"], ValueError, "at least 0"),
    *rows(["tune", "minimise"], "steps", [0, -1, 2.5, True, "8"], ValueError, POSITIVE),
    *rows(["tune"], "steps", {"4 of a grid": 4}, ValueError, "at least 5", method="grid"),
    # priors
    *rows(PRIORS, "prior_prec", [0, -1.0, float("inf")], ValueError, "must be positive and finite"),
    *rows(PRIORS, "prior_prec", ["1", True], TypeError, "real number"),
    *rows(["make_posterior"], "prior_prec", NOT_POSITIVE[2:3], ValueError, "the posterior is"),
    *rows(["make_posterior"], "prior_prec", [1e-300, 1e-40], ValueError, "float32 cannot hold"),
    *rows(["make_posterior", "tune"], "prior_prec", [1j], ValueError, "real number"),
    *rows(
        ["make_posterior", "log_marginal_likelihood", "predictive_covariance"],
        "prior_prec",
        {
            "one a layer, one negative": np.asarray([1.0, -1.0]),
            "one a layer, one NaN": np.asarray([1.0, np.nan]),
            "a tree, one zero": {"first": 1.0, "last": 0.0},
            "a tree, one negative entry": {
                "first": {"w": -np.ones((3, 4)), "b": np.ones(4)},
                "last": 1.0,
            },
        },
        ValueError,
        "must be positive and finite",
    ),
    *rows(
        ["make_posterior", "logdet"],
        "prior_prec",
        {"a tree of text": {"first": "1", "last": 1.0}},
        TypeError,
        "must be real numbers",
    ),
    *rows(
        ["make_posterior", "logdet", "inverse_mv"],
        "prior_prec",
        {
            "three numbers": np.ones(3),
            "a matrix": np.ones((2, 2)),
            "other names": {"frist": 1.0, "last": 1.0},
            "an entry too few": {"first": 1.0},
            "a list": [1.0, 2.0],
            "None": None,
        },
        ValueError,
        "`params`",
    ),
    *rows(["posterior_fn"], "prior_prec", [0.0, -1.0], ValueError, "must be positive"),
    *rows(["posterior_fn"], "prior_prec", ["1"], TypeError, "real numbers"),
    # factors
    *rows(SCALED, "sigma_squared", NOT_POSITIVE[:4], ValueError, "must be positive and finite"),
    *rows(SCALED[:1], "sigma_squared", NOT_POSITIVE[5:], ValueError, "must be positive"),
    *rows(SCALED[:2], "sigma_squared", [1j], ValueError, REAL),
    *rows(SCALED[:2], "sigma_squared", NO_NUMBER, TypeError, REAL),
    *rows(SCALED[:1], "sigma_squared", [np.ones(2)], ValueError, "must be one number"),
    *rows(["posterior_fn"], "sigma_squared", [0.0, -1.0], ValueError, "must be positive"),
    *rows(["make_posterior"], "loss_scaling_factor", NOT_POSITIVE[:4], ValueError, "positive"),
    *rows(["make_posterior"], "loss_scaling_factor", [*NO_NUMBER, None], TypeError, REAL),
    *rows(["laplace"], "num_curv_samples", [-1, 0, float("nan")], ValueError, "must be positive"),
    *rows(["laplace"], "num_total_samples", [-1, float("inf")], ValueError, "must be positive"),
    # noise
    *rows(
        ["with_noise", "Marginals.with_noise", "log_marginal_likelihood", "tune"],
        "noise_variance",
        [0, -1.0, float("nan"), float("inf"), 1e-300],
        ValueError,
        "must be positive and finite",
    ),
    *rows(
        ["with_noise", "Marginals.with_noise", "log_marginal_likelihood", "marglik_training"],
        "noise_variance",
        ["1", True],
        TypeError,
        "real number",
    ),
    *rows(["with_noise"], "noise_variance", [1j], ValueError, "must be real numbers"),
    *rows(["with_noise", "Marginals.with_noise"], "noise_variance", [None], TypeError, "real"),
    *rows(
        ["with_noise", "Marginals.with_noise"],
        "noise_variance",
        [np.ones(3), np.ones((2, 2))],
        ValueError,
        "one for each of the 2 outputs",
    ),
    *rows(["log_marginal_likelihood"], "noise_variance", [np.ones(2)], ValueError, "one number"),
    *rows(["tune"], "temperature", NOT_POSITIVE[:4], ValueError, "must be positive and finite"),
    *rows(["tune"], "temperature", ["1", True], TypeError, REAL),
    *rows(["tune"], "temperature", [np.ones(2)], ValueError, "one number"),
    *rows(["tune"], "tune_noise", NO_FLAG, TypeError, "must be True or False"),
    *rows(["marglik_training"], "noise_variance", [0.0, -1.0], ValueError, "must be positive"),
    # searches
    *rows(
        ["tune", "minimise", "marglik_training"],
        "bounds",
        [
            (1.0, 0.1),
            (0.0, 1.0),
            (-1.0, 1.0),
            (1.0, float("inf")),
            (1.0,),
            "12",
            None,
            3,
            ("1", "2"),
        ],
        ValueError,
        "must be two positive numbers",
    ),
    *rows(["tune"], "bounds", [(1e-300, 1.0)], ValueError, "float32 cannot hold"),
    *rows(["tune"], "bounds", {"not around the start": (2.0, 3.0)}, ValueError, "outside"),
    *rows(["tune", "minimise"], "tolerance", [0, -1.0, float("nan")], ValueError, "positive"),
    *rows(["tune", "minimise"], "tolerance", ["1", True, None], TypeError, REAL),
    *rows(["tune"], "learning_rate", [0, -1.0, float("nan")], ValueError, "must be positive"),
    *rows(["marglik_training"], "hyper_learning_rate", [0, -1.0], ValueError, "must be positive"),
    *rows(["marglik_training"], "hyper_learning_rate", ["0.1", None], TypeError, REAL),
    *rows(["tune"], "method", ["newton", None, 1, "LBFGS"], ValueError, "must be one of 'lbfgs'"),
    # choices
    *rows(["Options", "kfac", "laplace"], "fisher_type", ["typ2", None, 2], ValueError, "one of"),
    *rows(["Options"], "curvature", ["fulll", "kroneker", None], ValueError, "must be one of"),
    *rows(["class_probabilities"], "link", ["softmax", None, 0, "prbit"], ValueError, "one of"),
    # flags
    *rows(WITH_OPTIONS, "vmap_over_data", NO_FLAG[:1], TypeError, "must be True or False"),
    *rows(["Options"], "vmap_over_data", NO_FLAG[1:], TypeError, "must be True or False"),
    *rows(["Options"], "separate_weight_and_bias", NO_FLAG, TypeError, "must be True or False"),
    *rows(
        [*PREDICTIVES, "data_fit", "relative_error", "intermediates_and_gradients"],
        "vmap_over_data",
        NO_FLAG[:2],
        TypeError,
        "must be True or False",
    ),
    *rows(["predictive_samples"], "linearised", NO_FLAG, TypeError, "must be True or False"),
    *rows(
        ["kfac", "laplace", "marglik_training"],
        "eigenvalue_correction",
        NO_FLAG[:2],
        TypeError,
        "must be True or False",
    ),
    *rows(["kfac"], "optimal_factors", NO_FLAG[:2], TypeError, "must be True or False"),
    *rows(["kfac", "marglik_training"], "progress", NO_FLAG[:2], TypeError, "must be True or"),
    # keys
    *rows(["Options", "sample", "predictive_samples"], "key", NO_KEY, TypeError, "one random key"),
    *rows(["relative_error", "marglik_training"], "key", {"0": 0}, TypeError, "one random key"),
    *rows(["class_probabilities"], "key", {"0": 0}, TypeError, "one random key", link="mc"),
    *rows(["class_probabilities"], "key", [None], ValueError, "draws samples", link="mc"),
    *rows(["sample", "predictive_samples"], "key", [None], TypeError, "one random key"),
    *rows(["kfac"], "key", {"0": 0}, TypeError, "one random key"),
]
