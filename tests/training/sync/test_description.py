"""Descriptions of values are equal for equal values, and only for these."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp.training.sync.description import described, without_counters


def power_of(power):
    def loss(y, prediction):
        return keras.ops.abs(y - prediction) ** power

    return loss


class Plain:
    def __init__(self, alpha, other=None):
        self.alpha, self.other = alpha, other

    def __call__(self, y, prediction):
        return self.alpha * (y - prediction)


class OwnLoss(keras.losses.Loss):
    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def call(self, y, prediction):
        return self.alpha * (y - prediction)


class Failing(keras.layers.Layer):
    def get_config(self):
        raise ValueError("there is none")


class Scaled(keras.layers.Layer):
    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor


SCHEDULES = keras.optimizers.schedules
MAKERS = {
    "number": lambda n: 0.1 * n,
    "NumPy number": lambda n: np.float32(n),
    "text": str,
    "dict": lambda n: {"a": [n, (1, None)]},
    "set": lambda n: {1, 2, n + 5},
    "array": lambda n: np.full(3, n),
    "large array": lambda n: np.full(1000, n),
    "tensor": lambda n: tf.constant([n, 2]),
    "type": lambda n: [int, float][n - 1],
    "dtype": lambda n: [tf.float32, tf.float64][n - 1],
    "policy": lambda n: keras.DTypePolicy(["float32", "mixed_float16"][n - 1]),
    "function": power_of,
    "partial": lambda n: functools.partial(power_of, power=n),
    "bound method": lambda n: [Plain(1).__call__, OwnLoss(1).call][n - 1],
    "callable object": Plain,
    "loss": lambda n: keras.losses.Huber(float(n)),
    "own loss": OwnLoss,
    "metric": lambda n: keras.metrics.TopKCategoricalAccuracy(k=n),
    "layer": lambda n: keras.layers.Dense(n),
    "own layer": Scaled,
    "schedule": lambda n: SCHEDULES.ExponentialDecay(0.1, n, 0.5),
    "optimizer": lambda n: keras.optimizers.Adam(SCHEDULES.CosineDecay(0.1, n)),
    "loss scale": lambda n: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1 * n)),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_equal_values_are_described_alike_and_others_are_not(maker):
    assert described(maker(1)) == described(maker(1))
    assert described(maker(1)) != described(maker(2))


def test_lambdas_are_told_apart_by_their_place():
    first = lambda y, p: y - p  # noqa: E731
    second = lambda y, p: y - p  # noqa: E731
    assert described(first) != described(second)
    assert "<lambda> (test_description.py:" in described(first)
    assert described(keras.metrics.MeanMetricWrapper(first, name="own"))


def test_nothing_is_described_by_its_id():
    for value in (object(), Plain(1, other=object()), Failing(), (n for n in ())):
        assert "0x" not in described(value)
    assert described(object()) == described(object())
    assert described(Plain(1, other=object())) == described(Plain(1, other=object()))


def test_seeds_that_keras_draws_are_left_out():
    assert described(keras.layers.Dropout(0.5)) == described(keras.layers.Dropout(0.5))
    assert described(keras.layers.RandomFlip()) == described(keras.layers.RandomFlip())


def test_a_value_inside_itself_ends():
    loop = []
    loop.append(loop)
    assert described(loop).endswith("...]]]]]]]]]]]]")


def test_counters_of_automatic_names_are_left_out():
    assert without_counters("sequential_3/dense_12/kernel") == "sequential/dense/kernel"
    assert without_counters("conv2d/kernel") == "conv2d/kernel"
    assert described(keras.layers.Dense(1)) == described(keras.layers.Dense(1))
