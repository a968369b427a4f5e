"""Models and data of the tests of `fit` and its like, and comparisons with plain Keras."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

import opensmp as smp

BY_TWO = {"partitions": 2, "microbatches": 4}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def data(rows: int = 22, seed: int = 0) -> tuple[Any, Any]:
    """Rows of 6 numbers, and labels from 0 to 3."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 6)).astype("float32"), rng.integers(0, 4, rows)


def classifier(**first: Any) -> keras.Model:
    """Two dense layers with the same initial weights each time."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh", name="hidden", **first)(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, activation="softmax", name="top")(hidden))


def both(make: Callable[[], keras.Model], use: Callable[[keras.Model], Any]) -> tuple[Any, Any]:
    """What `use` gives for a plain model and for its distributed twin."""
    results = []
    for wrap in (lambda model: model, smp.DistributedModel.from_keras):
        model = wrap(make())
        keras.utils.set_random_seed(2)
        results.append(use(model))
    return results[0], results[1]


def assert_close(plain: Any, ours: Any, **tolerance: float) -> None:
    """Compares nests of numbers."""
    tolerance = {**TOLERANCE, **tolerance}
    if isinstance(plain, Mapping):
        assert list(plain) == list(ours)
        plain, ours = list(plain.values()), list(ours.values())
    if isinstance(plain, (list, tuple)):
        assert len(plain) == len(ours)
        for one, other in zip(plain, ours, strict=True):
            assert_close(one, other, **tolerance)
        return
    np.testing.assert_allclose(ours, plain, **tolerance)


def assert_same(make: Callable[[], keras.Model], use: Callable[[keras.Model], Any]) -> None:
    """Compares what `use` gives, and the weights afterwards."""

    def with_weights(model: keras.Model) -> Any:
        result = use(model)
        return result, model.get_weights()

    plain, ours = both(make, with_weights)
    assert_close(plain, ours)
