"""One model of the zoo: how to make it, what to feed it, how exact it has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Tensor = Any
Nest = Any
Batch = Callable[[np.random.Generator, int], tuple[Nest, Nest]]
Loss = Callable[[Nest, Nest], Tensor]

SIZES = ("small", "medium", "large")
MICROBATCHES = 2


@dataclass(frozen=True)
class Entry:
    """A model of the zoo with random weights and small inputs.

    Attributes:
        name: Name of the function or class that makes it.
        family: "keras.applications" or "keras_hub".
        build: Makes the model; nothing is downloaded.
        batch: Random inputs and labels for a number of examples.
        loss: The loss of a microbatch from its labels and the model's outputs.
        size: How long a comparison takes: "small" some seconds, "large" minutes.
        per_microbatch: Examples in a microbatch.
    """

    name: str
    family: str
    build: Callable[[], keras.Model]
    batch: Batch
    loss: Loss
    size: str = "small"
    per_microbatch: int = 2

    def __str__(self) -> str:
        return self.name


def distance_to_noise(labels: Nest, outputs: Nest) -> Tensor:
    """Mean squared distance of every output to noise that is always the same.

    A loss for outputs of any structure. Unlike a plain mean it has a gradient behind a
    normalisation layer, whose outputs have the same mean and variance whatever comes in.
    """
    del labels
    total = 0.0
    for i, output in enumerate(tf.nest.flatten(outputs)):
        noise = tf.random.stateless_normal(tf.shape(output), seed=(i, 7), dtype=output.dtype)
        total += tf.reduce_mean(tf.math.squared_difference(output, noise))
    return total


def cross_entropy(labels: Nest, probabilities: Nest) -> Tensor:
    """The loss that `compile` would make of "sparse_categorical_crossentropy"."""
    losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
    return tf.reduce_mean(losses)
