"""Steps of users' own that take gradients in ways that are easy to get wrong.

The model of the closed forms is `v * (w * x)` with w = 2, v = 3 and x = 1, so that all right
values can be found by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Wrap = Callable[[keras.Model], keras.Model]
Step = Callable[[Any, Any], dict[str, Any]]

TRACKED = ("dw", "dv")


def model_of(step: Step, wrap: Wrap) -> keras.Model:
    """The model of the closed forms, with a `train_step`."""

    class Model(keras.Model):
        def train_step(self, data: Any) -> Any:
            return step(self, data)

    inputs = keras.Input((1,))
    hidden = keras.layers.Dense(1, use_bias=False, kernel_initializer=constant(2.0))(inputs)
    outputs = keras.layers.Dense(1, use_bias=False, kernel_initializer=constant(3.0))(hidden)
    model = wrap(Model(inputs, outputs))
    model.compile(keras.optimizers.SGD(1.0))
    return model


def constant(value: float) -> Any:
    return keras.initializers.Constant(value)


def learned(step: Step, wrap: Wrap, rows: int = 4) -> list[float]:
    """How far one step of SGD with a learning rate of 1 moves w and v: their gradients."""
    model = model_of(step, wrap)
    model.fit(np.ones((rows, 1), "float32"), batch_size=rows, verbose=0)
    w, v = (float(np.ravel(value)[0]) for value in model.get_weights())
    return [2.0 - w, 3.0 - v]


def applied(model: Any, gradients: Any, loss: Any) -> dict[str, Any]:
    weights = model.trainable_variables
    gradients = [
        tf.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)
    ]
    model.optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return {"loss": loss}


def penalty_of_inputs(model: Any, x: Any) -> Any:
    """mean(out^2) + mean((d out / d x)^2) = 36 + 36."""
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(x)
            outputs = model(x)
        slope = inner.gradient(outputs, x)
        loss = tf.reduce_mean(outputs**2) + tf.reduce_mean(slope**2)
    return applied(model, outer.gradient(loss, model.trainable_variables), loss)


def penalty_alone(model: Any, x: Any) -> Any:
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(x)
            outputs = model(x)
        loss = tf.reduce_mean(inner.gradient(outputs, x) ** 2)
    return applied(model, outer.gradient(loss, model.trainable_variables), loss)


def gradients_of_weights_in_the_loss(model: Any, x: Any) -> Any:
    """2 v^2 w + 2 v w^2 + v^2 w^2 = 36 + 24 + 36."""
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            loss = tf.reduce_mean(model(x) ** 2)
        gradients = inner.gradient(loss, model.trainable_variables)
        total = tf.add_n([tf.reduce_sum(g) for g in gradients]) + loss
    return applied(model, outer.gradient(total, model.trainable_variables), total)


def third_order(model: Any, x: Any) -> Any:
    """The third derivative of (v w x)^3 with respect to x: 6 (v w)^3 = 1296."""
    with tf.GradientTape() as first:
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as third:
                third.watch(x)
                with tf.GradientTape() as fourth:
                    fourth.watch(x)
                    outputs = tf.reduce_sum(model(x) ** 3)
                slope = fourth.gradient(outputs, x)
            slope = third.gradient(slope, x)
        loss = tf.reduce_mean(second.gradient(slope, x))
    return applied(model, first.gradient(loss, model.trainable_variables), loss)


def weights_change_before(model: Any, x: Any) -> Any:
    """The gradient belongs to the forward pass that was run, at w = 2."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    for weight in model.trainable_variables:
        weight.assign(tf.ones_like(weight) * 10.0)
    gradients = tape.gradient(loss, model.trainable_variables)
    for weight, value in zip(model.trainable_variables, (2.0, 3.0), strict=True):
        weight.assign(tf.ones_like(weight) * value)
    return applied(model, gradients, loss)


def two_updates_from_one_pass(model: Any, x: Any) -> Any:
    """One forward pass, two losses; the first one's update comes before the second's gradient."""
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x)
        first, second = tf.reduce_mean(outputs**2), tf.reduce_mean(outputs)
    applied(model, tape.gradient(first, model.trainable_variables), first)
    return applied(model, tape.gradient(second, model.trainable_variables), second)


CLOSED: dict[str, tuple[Step, list[float]]] = {
    "penalty_of_inputs": (penalty_of_inputs, [72.0, 48.0]),
    "penalty_alone": (penalty_alone, [36.0, 24.0]),
    "gradients_of_weights_in_the_loss": (gradients_of_weights_in_the_loss, [78.0, 56.0]),
    "third_order": (third_order, [1944.0, 1296.0]),
    "weights_change_before": (weights_change_before, [36.0, 24.0]),
    "two_updates_from_one_pass": (two_updates_from_one_pass, [39.0, 26.0]),
}
"""Name to a step and the right gradients of w and v."""


class Penalised(keras.Model):
    """A critic with a penalty on the gradient of its inputs, as WGAN-GP has it."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                if x.dtype.is_floating:
                    inner.watch(x)
                    sources: Any = x
                else:
                    sources = self.trainable_variables
                outputs = self(x, training=True)
                error = tf.reduce_mean((outputs - y) ** 2)
            slopes = [g for g in tf.nest.flatten(inner.gradient(error, sources)) if g is not None]
            norm = tf.add_n([tf.reduce_sum(tf.convert_to_tensor(g) ** 2) for g in slopes])
            loss = error + 0.3 * (tf.sqrt(norm + 1e-6) - 1.0) ** 2 + tf.add_n([0.0, *self.losses])
        gradients = outer.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss, "error": error}


def dense() -> keras.Model:
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2")(inputs)
    x = keras.layers.Dense(8, activation="softplus")(x)
    x = keras.layers.LayerNormalization()(x)
    return Penalised(inputs, keras.layers.Dense(2)(x))


def convolutional() -> keras.Model:
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(4, 3, activation="gelu")(inputs)
    x = keras.layers.Conv2D(4, 3, activation="swish")(x)
    x = keras.layers.Flatten()(x)
    return Penalised(inputs, keras.layers.Dense(2)(x))


def attention() -> keras.Model:
    inputs = keras.Input((5, 4))
    x = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return Penalised(inputs, keras.layers.Dense(2)(x))


def embedded() -> keras.Model:
    """The gradient of an embedding is sparse; here its norm is in the loss."""
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(7, 4)(inputs)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return Penalised(inputs, keras.layers.Dense(2, activation="tanh")(x))


PENALISED: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...]]] = {
    "dense": (dense, (6,)),
    "convolutional": (convolutional, (6, 6, 1)),
    "attention": (attention, (5, 4)),
    "embedded": (embedded, ()),
}


def trained(name: str, wrap: Wrap, rows: int = 11) -> list[float]:
    """Losses of four epochs and the sums of the weights' sizes after them."""
    make, shape = PENALISED[name]
    keras.utils.set_random_seed(3)
    model = wrap(make())
    model.compile(keras.optimizers.SGD(0.05))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, *shape)).astype("float32")
    if not shape:
        x = rng.integers(0, 7, (rows, 5)).astype("int32")
    y = rng.normal(size=(rows, 2)).astype("float32")
    history = model.fit(x, y, batch_size=4, epochs=4, shuffle=False, verbose=0).history
    sums = [float(np.abs(weight).sum()) for weight in model.get_weights()]
    return [*history["loss"], *history["error"], *sums]
