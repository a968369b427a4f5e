"""A case: models, data and a step, written once and run as plain Keras and split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from parity.bounds import BIT_EQUAL, Bound
from parity.layout import Layout, Maker

Tensor = Any
Parts = Mapping[str, Any]
StepFunction = Callable[..., Mapping[str, Any]]

TWO = (Layout(2, 4, "interleaved"), Layout(3, 2, "simple"))
FOUR = (Layout(2, 4, "interleaved"), Layout(4, 2, "simple"))
CYCLIC = (
    Layout(2, 4, "interleaved", "cyclic"),
    Layout(3, 2, "simple", "cyclic"),
    Layout(2, 4, "zero_bubble", "cyclic"),
)
AUTO = (Layout(2, 4, "interleaved", "auto"), Layout(3, 2, "simple", "auto"))


@dataclass(frozen=True)
class Case:
    """One thing that must come out as plain Keras has it.

    Attributes:
        name: Name, as in the table of the documentation.
        parts: Makes the models of the case, and metrics, plain variables or modules that
            its step uses: a dict by name, or one model, which is then named "model".
        batch: Random arguments of the step for a number of examples, in order.
        step: Makes the step function from the parts. It returns a dict; under "gradients"
            it has a list of gradients by name of part, which are averaged over the
            microbatches and applied.
        num_stages: How many stages the models put into partitions.
        layouts: Layouts of the default run.
        bound: How far the numbers may differ, and why.
        per_microbatch: Examples in a microbatch.
        dynamic: Leaves the batch size open, and takes another one in the last step.
        evaluate: Makes a step for evaluation from the parts, which runs in the end with
            another batch size.
        optimizer: Makes the optimizer of each part.
        heavy: Takes too long for the sweep over all layouts.
    """

    name: str
    parts: Callable[[Maker], Any]
    batch: Callable[[np.random.Generator, int], tuple[Any, ...]]
    step: Callable[[Parts], StepFunction]
    num_stages: int = 2
    layouts: tuple[Layout, ...] = FOUR
    bound: Bound = BIT_EQUAL
    per_microbatch: int = 3
    dynamic: bool = False
    evaluate: Callable[[Parts], StepFunction] | None = None
    optimizer: Callable[[], Any] = field(default=lambda: keras.optimizers.Adam(0.01))
    heavy: bool = False

    def __str__(self) -> str:
        return self.name


def momentum() -> Any:
    """An optimizer whose steps are as small as the gradients.

    Adam divides a gradient by its own size: where a gradient is zero but for rounding (a bias
    before a BatchNorm, the key bias of attention) it makes a full step of the rounding.
    """
    return keras.optimizers.SGD(0.01, momentum=0.9)


def mean_squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """A loss for any shapes."""
    return tf.reduce_mean(tf.math.squared_difference(tf.cast(target, prediction.dtype), prediction))


def cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """A loss for integer labels."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses)


def supervised(
    loss_of: Callable[[Tensor, Tensor], Tensor] = mean_squared_error, *, training: bool = True
) -> Callable[[Parts], StepFunction]:
    """The usual step of one model: a loss and the gradients of all its trainable variables."""

    def make(parts: Parts) -> StepFunction:
        model = parts["model"]

        def step(x: Any, y: Any) -> dict[str, Any]:
            with tf.GradientTape() as tape:
                prediction = model(x, training=training)
                loss = loss_of(y, prediction)
            gradients = tape.gradient(loss, model.trainable_variables)
            return {"loss": loss, "prediction": prediction, "gradients": {"model": gradients}}

        return step

    return make


def evaluation(
    loss_of: Callable[[Tensor, Tensor], Tensor] = mean_squared_error,
) -> Callable[[Parts], StepFunction]:
    """A step without training: the loss and the prediction."""

    def make(parts: Parts) -> StepFunction:
        def step(x: Any, y: Any) -> dict[str, Any]:
            prediction = parts["model"](x, training=False)
            return {"loss": loss_of(y, prediction), "prediction": prediction}

        return step

    return make


def vectors(
    features: int, targets: int, dtype: str = "float32"
) -> Callable[[np.random.Generator, int], tuple[Any, ...]]:
    """Batches of vectors with vectors as targets."""

    def batch(random: np.random.Generator, size: int) -> tuple[Any, ...]:
        x = random.normal(size=(size, features)).astype(dtype)
        return x, random.normal(size=(size, targets)).astype(dtype)

    return batch


def images(
    side: int, channels: int, num_classes: int, dtype: str = "float32"
) -> Callable[[np.random.Generator, int], tuple[Any, ...]]:
    """Batches of square images with integer labels."""

    def batch(random: np.random.Generator, size: int) -> tuple[Any, ...]:
        x = random.normal(size=(size, side, side, channels)).astype(dtype)
        return x, random.integers(num_classes, size=size).astype("int32")

    return batch


def sequences(
    length: int, vocabulary: int, *target_shape: int, padded: bool = False
) -> Callable[[np.random.Generator, int], tuple[Any, ...]]:
    """Batches of token sequences; with `padded` each ends in some zeros, the first in none."""

    def batch(random: np.random.Generator, size: int) -> tuple[Any, ...]:
        x = random.integers(1, vocabulary, size=(size, length)).astype("int32")
        if padded:
            ends = random.integers(1, length, size=(size, 1))
            x = np.where(np.arange(length) < ends, x, 0).astype("int32")
            x[0] = np.maximum(x[0], 1)
        return x, random.normal(size=(size, *target_shape)).astype("float32")

    return batch


def tokens(length: int, vocabulary: int) -> Callable[[np.random.Generator, int], tuple[Any, ...]]:
    """Batches of token sequences with the next token of each as its label."""

    def batch(random: np.random.Generator, size: int) -> tuple[Any, ...]:
        ids = random.integers(vocabulary, size=(size, length + 1)).astype("int32")
        return ids[:, :-1], ids[:, 1:]

    return batch
