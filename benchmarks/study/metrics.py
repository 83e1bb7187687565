"""Scores of predictions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score, roc_curve

Floats = NDArray[Any]
BINS = 15


def of_classes(probabilities: Floats, labels: NDArray[Any]) -> dict[str, float]:
    """Accuracy, NLL, Brier score and expected calibration error."""
    p = np.clip(np.asarray(probabilities, "float64"), 1e-12, 1.0)
    at_label = p[np.arange(len(p)), labels]
    one_hot = np.eye(p.shape[1])[labels]
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        abs(np.sum(confidence[bins == b]) - np.sum(correct[bins == b])) for b in np.unique(bins)
    ]
    return {
        "accuracy": float(correct.mean()),
        "nll": float(-np.log(at_label).mean()),
        "brier": float(((p - one_hot) ** 2).sum(axis=1).mean()),
        "ece": float(np.sum(gaps) / len(p)),
        "confidence": float(confidence.mean()),
    }


def of_strangeness(known: Floats, strange: Floats) -> dict[str, float]:
    """How well the confidence tells known inputs from strange ones.

    FPR95: the share of strange inputs that pass where 95 % of the known ones do.
    """
    labels = np.repeat([1, 0], [len(known), len(strange)])
    scores = np.concatenate([known.max(axis=1), strange.max(axis=1)])
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    fpr95 = float(false[np.searchsorted(true, 0.95)])
    return {"auroc": float(roc_auc_score(labels, scores)), "fpr95": fpr95}


def of_gaussians(mean: Floats, variance: Floats, targets: Floats) -> dict[str, float]:
    """Mean NLL, root of the mean squared error, and the share within the 95 % interval."""
    errors = np.asarray(targets - mean, "float64")
    return {
        "nll": float(np.mean(0.5 * (np.log(2 * np.pi * variance) + errors**2 / variance))),
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "inside": float(np.mean(np.abs(errors) < 1.96 * np.sqrt(variance))),
    }


def temperature(logits: Floats, labels: NDArray[Any]) -> float:
    """The temperature with the least NLL on data that were held out (Guo et al. 2017)."""

    def nll(log: float) -> float:
        logs = log_softmax(np.asarray(logits, "float64") / np.exp(log), axis=1)
        return float(-logs[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(nll, bounds=(-3.0, 3.0), method="bounded").x))


def total_variation(first: Floats, second: Floats) -> float:
    """Mean over inputs of half the summed differences of probabilities."""
    return float(np.abs(first - second).sum(axis=1).mean() / 2)
