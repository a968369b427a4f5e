"""Training with a lookup that does not depend on the batch, as of positions, in three ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp

LENGTH = 4


class Net(keras.Model):
    """Tokens and their positions, both with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = keras.layers.Embedding(11, 6)
        self.places = keras.layers.Embedding(LENGTH, 6)
        self.top = keras.layers.Dense(3)

    def call(self, tokens: Any) -> Any:
        return self.top(self.tokens(tokens) + self.places(keras.ops.arange(LENGTH)))


class Own(Net):
    """The same with a step of its own."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 11, (12, LENGTH)), rng.normal(size=(12, LENGTH, 3)).astype("float32")


def fitted(kind: type[Net], wrap: Callable[[Any], Any]) -> list[float]:
    """Losses of `fit`; the last batch is smaller and divided unevenly."""
    keras.utils.set_random_seed(0)
    model = wrap(kind())
    model.compile(keras.optimizers.Adam(0.1), "mse")
    x, y = data()
    history = model.fit(x, y, batch_size=7, epochs=4, shuffle=False, verbose=0).history
    return [float(loss) for loss in history["loss"]]


def stepped() -> list[float]:
    """Losses of a loop over `smp.step`, with gradients summed over replicas."""
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(Net())
    optimizer = keras.optimizers.Adam(0.1)

    @smp.step
    def gradients_of(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def step(x: Any, y: Any) -> Any:
        gradients, loss = gradients_of(x, y)
        sums = [smp.allreduce(each.accumulate()) for each in gradients]
        optimizer.apply_gradients(zip(sums, model.trainable_variables, strict=True))
        return smp.allreduce(loss.reduce_mean())

    x, y = data()
    if smp.dp_size() > 1:
        half = len(x) // smp.dp_size()
        x, y = (each[smp.dp_rank() * half :][:half] for each in (x, y))
    return [float(step(tf.constant(x), tf.constant(y))) for _ in range(4)]


def plain_loop() -> list[float]:
    """What `stepped` must give: plain Keras on whole batches."""
    keras.utils.set_random_seed(0)
    model, optimizer = Net(), keras.optimizers.Adam(0.1)
    x, y = data()

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return [float(step()) for _ in range(4)]
