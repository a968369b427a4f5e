"""State that a layer assigns and reads in the same call."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import opensmp as smp


class Normalised(keras.layers.Layer):
    """Subtracts a moving average, after it has moved."""

    def build(self, shape: Any) -> None:
        self.average = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.average.assign(0.9 * self.average + 0.1 * keras.ops.mean(x, 0))
        return (x - self.average) ** 2


def make() -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((2,))
    return keras.Model(inputs, Normalised()(keras.layers.Dense(2)(inputs)))


def gradients_of(model: Any, x: Any) -> Any:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x, training=True))
    return tape.gradient(loss, model.trainable_variables), loss


def test_no_gradient_passes_through_an_assignment(smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    plain, split = make(), smp.DistributedModel.from_keras(make())
    x = tf.constant(np.random.default_rng(0).normal(size=(8, 2)), tf.float32)
    halves = [gradients_of(plain, half) for half in tf.split(x, 2)]

    @smp.step
    def step(x):
        return gradients_of(split, x)

    gradients, loss = step(x)
    np.testing.assert_allclose(loss.reduce_mean(), np.mean([float(h[1]) for h in halves]), 1e-6)
    for found, *expected in zip(gradients, *(h[0] for h in halves), strict=True):
        np.testing.assert_allclose(found.accumulate(), np.mean(expected, 0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(split.variables[-1], plain.variables[-1], rtol=1e-6)
