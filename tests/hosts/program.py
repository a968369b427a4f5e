"""Trains a small model for some steps, as a rank or alone, and prints the losses.

    python program.py CONFIG STEPS [SECONDS]

Rank 0 prints READY after the second step. All steps take at least so many seconds together.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

ROWS, WIDTH = 32, 8


def net(width: int, layers: int) -> keras.Model:
    keras.utils.set_random_seed(7)
    inputs = hidden = keras.Input((width,))
    for _ in range(layers):
        hidden = keras.layers.Dense(width, activation="tanh")(hidden)
    return keras.Model(inputs, keras.layers.Dense(4)(hidden))


def data(width: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(ROWS, width)).astype("float32")
    return x, generator.integers(0, 4, ROWS)


def plain_losses(steps: int, microbatches: int, layers: int = 3, width: int = WIDTH) -> list[float]:
    """Losses of plain Keras, over the same microbatches."""
    import tensorflow as tf

    model, (x, y) = net(width, layers), data(width)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.5)
    losses = []
    for _ in range(steps):
        sums, total = None, 0.0
        parts = zip(np.split(x, microbatches), np.split(y, microbatches), strict=True)
        for part_x, part_y in parts:
            with tf.GradientTape() as tape:
                loss = loss_of(part_y, model(part_x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            sums = (
                gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
            )
            total += float(loss)
        optimizer.apply([g / microbatches for g in sums], model.trainable_variables)
        losses.append(total / microbatches)
    return losses


def main(config: dict[str, Any], steps: int, seconds: float = 0.0) -> None:
    import tensorflow as tf

    import opensmp as smp

    width = config.pop("width", WIDTH)
    smp.init(config)
    model = smp.DistributedModel.from_keras(net(width, config.get("partitions", 1) + 1))
    x, y = data(width)
    own = slice(smp.dp_rank() * ROWS // smp.dp_size(), (smp.dp_rank() + 1) * ROWS // smp.dp_size())
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.5)

    @smp.step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x: Any, y: Any) -> Any:
        gradients, loss = forward_backward(x, y)
        gradients = [smp.allreduce(gradient.accumulate()) for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return smp.allreduce(loss.reduce_mean())

    losses, times = [], []
    for step in range(steps):
        began = time.monotonic()
        losses.append(float(train(tf.constant(x[own]), tf.constant(y[own]))))
        times.append(time.monotonic() - began)
        if step == 1 and smp.rank() == 0:
            print("READY", flush=True)
        time.sleep(seconds / steps)
    place = {"local": [smp.local_rank(), smp.local_size()], "group": smp.get_mp_group()}
    print(
        "RESULT",
        json.dumps({"rank": smp.rank(), "losses": losses, "times": times, **place}),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:]))
