"""Training with a lookup that does not depend on the batch, as of positions, in two ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

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
