"""The same training with several levels of recomputation, for comparisons to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp
from opensmp import _private

ROWS, STEPS = 8, 3


class Noise(keras.layers.Layer):
    """Numbers that no seed of Keras determines: a second draw gives others."""

    def call(self, x: Any) -> Any:
        return tf.nn.dropout(x * tf.random.uniform(tf.shape(x), 0.5, 1.5, seed=7), 0.25, seed=3)


def normalized() -> keras.Model:
    """Convolutions, moving statistics, dropout of Keras; all is state that the model updates."""
    x = images = keras.Input((8, 8, 3))
    for filters in (8, 12):
        x = keras.layers.Conv2D(filters, 3, padding="same", activation="silu")(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.MaxPooling2D()(keras.layers.ReLU()(x))
        x = keras.layers.SpatialDropout2D(0.2, seed=filters)(x)
    x = keras.layers.Dense(16, activation="gelu")(keras.layers.Flatten()(x))
    return keras.Model(images, keras.layers.Dense(3)(keras.layers.Dropout(0.3, seed=1)(x)))


def drawing() -> keras.Model:
    """Stateful random operations."""
    x = inputs = keras.Input((12,))
    for activation in ("gelu", "softplus", "mish"):
        x = Noise()(keras.layers.Dense(12, activation=activation)(x))
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def attending() -> keras.Model:
    """Attention, whose scores are large and cheap."""
    x = inputs = keras.Input((6, 8))
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(2, 4, dropout=0.2, seed=2)(y, y)
        x = x + keras.layers.Dense(8)(keras.layers.Dense(32, activation="gelu")(x))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))


def looping() -> keras.Model:
    """A loop in the forward pass."""
    x = inputs = keras.Input((4, 5))
    x = keras.layers.LSTM(6, return_sequences=True, recurrent_dropout=0.2, seed=4)(x)
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GRU(5)(x)))


MODELS: Mapping[str, Callable[[], keras.Model]] = {
    "normalized": normalized,
    "drawing": drawing,
    "attending": attending,
    "looping": looping,
}


def data_for(model: keras.Model) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    shape = (ROWS, *model.inputs[0].shape[1:])
    return random.normal(size=shape).astype("float32"), random.integers(0, 3, ROWS)


def by_step(model: Any, x: Any, y: Any, calls: int = 1) -> list[Any]:
    """Losses and gradients of some steps of `smp.step`; calls the model so many times in each."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.1)

    @smp.step
    def forward_backward(x, y):
        with tf.GradientTape() as tape:
            outputs = [model(x * (1 + i), training=True) for i in range(calls)]
            loss = loss_fn(y, tf.add_n(outputs))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x, y):
        gradients, loss = forward_backward(x, y)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss.reduce_mean()

    return [train_step(tf.constant(x), tf.constant(y)).numpy() for _ in range(STEPS)]


def by_fit(model: Any, x: Any, y: Any) -> list[Any]:
    """Losses of `fit`."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    fitted = model.fit(x, y, batch_size=ROWS, epochs=STEPS, shuffle=False, verbose=0)
    return fitted.history["own" if isinstance(model, OwnStep) else "loss"]


class OwnStep(smp.DistributedModel):
    """Calls the model with the whole batch, and takes the gradient, in a step of its own."""

    def __init__(self, inner: keras.Model) -> None:
        super().__init__()
        self.inner = inner

    def call(self, x: Any, training: Any = None) -> Any:
        return self.inner(x, training=training)

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"own": loss}


def trained(
    name: str,
    recompute: Any,
    way: Callable[..., list[Any]] = by_step,
    plan_to: str | None = None,
    **config: Any,
) -> list[Any]:
    """Trains a model of `MODELS`; returns losses, and its variables in this process.

    Saves its plan as the file `plan_to`.
    """
    smp.shutdown()
    tf.random.set_seed(1)
    smp.init({"partitions": 2, "microbatches": 4, "recompute": recompute, **config})
    keras.utils.set_random_seed(0)
    made = MODELS[name]()
    x, y = data_for(made)
    own = way is by_own_step
    model = OwnStep(made) if own else smp.DistributedModel.from_keras(made)
    losses = way(model, x, y)
    if plan_to is not None:
        model.plan.save(plan_to)
    values = [np.asarray(v) for v in model.variables if not _private.is_elsewhere(v)]
    return [np.asarray(losses), *values]


def by_own_step(model: Any, x: Any, y: Any) -> list[Any]:
    """As `by_fit`, for a model with a `train_step` of its own."""
    return by_fit(model, x, y)


def twice(model: Any, x: Any, y: Any) -> list[Any]:
    """As `by_step`, with two calls of the model in each microbatch."""
    return by_step(model, x, y, calls=2)


def assert_equal(one: list[Any], other: list[Any], what: str, bits: bool = True) -> None:
    """Compares to the last bit, or as numbers that are rounded differently."""
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        if bits:
            np.testing.assert_array_equal(a, b, err_msg=what)
        else:
            np.testing.assert_allclose(a, b, 1e-4, 1e-5, err_msg=what)
