"""What programs are made of: small data, small models, and numbers to compare."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

ROWS = 12
"""Divisible by any number of microbatches from 1 to 4, also in two replicas of two."""


def points(rows: int = ROWS, columns: int = 6, seed: int = 0) -> Any:
    """Normal numbers."""
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    return values.astype(keras.config.floatx())


def images(rows: int = ROWS, size: int = 8, channels: int = 1, seed: int = 0) -> Any:
    """Pictures with numbers from 0 to 1."""
    values = np.random.default_rng(seed).uniform(size=(rows, size, size, channels))
    return values.astype(keras.config.floatx())


def labels(rows: int = ROWS, classes: int = 4, seed: int = 1) -> Any:
    """Whole numbers."""
    return np.random.default_rng(seed).integers(0, classes, rows).astype("int32")


def words(rows: int = ROWS, length: int = 5, vocabulary: int = 11, seed: int = 2) -> Any:
    """Sequences of numbers of words, none of them 0."""
    return np.random.default_rng(seed).integers(1, vocabulary, (rows, length)).astype("int32")


def mlp(columns: int, *sizes: int, name: str | None = None, activation: str = "tanh") -> Any:
    """A Sequential model whose last layer is linear."""
    *hidden, last = sizes
    layers = [keras.layers.Dense(size, activation=activation) for size in hidden]
    return keras.Sequential([keras.Input((columns,)), *layers, keras.layers.Dense(last)], name=name)


def sums(*models: Any) -> list[float]:
    """Sum and sum of squares of each weight."""
    weights = [np.asarray(w, "float64") for model in models for w in model.get_weights()]
    return [float(value) for w in weights for value in (w.sum(), (w * w).sum())]


def only_x(data: Any) -> Any:
    """The inputs of what `train_step` gets."""
    return data[0] if isinstance(data, tuple) else data
