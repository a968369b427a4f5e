"""Gradients through `tf.py_function`, of which TensorFlow keeps one tape."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import opensmp as smp
from opensmp.errors import StepError

X = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(8, 3)
BY_HAND = {"partitions": 2, "auto_partition": False, "default_partition": 0}


class Squares(smp.DistributedModel):
    """Two layers, and the square by a `tf.py_function` in the partition `inside`."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.first = keras.layers.Dense(4, kernel_initializer=keras.initializers.GlorotUniform(1))
        self.second = keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(2))

    def squared(self, x, partition):
        if partition != self.inside:
            return x
        return tf.ensure_shape(tf.py_function(lambda v: v**2, [x], tf.float32), [None, 4])

    def call(self, x, training=None):
        with smp.partition(0):
            x = self.squared(self.first(x), 0)
        with smp.partition(1):
            return self.second(self.squared(x, 1))


def gradients(model):
    @smp.step
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    return [gradient.accumulate().numpy() for gradient in step(X)]


def plain_gradients(model):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model.second(model.first(X) ** 2) ** 2)
    variables = [*model.first.trainable_variables, *model.second.trainable_variables]
    return [gradient.numpy() for gradient in tape.gradient(loss, variables)]


@pytest.mark.parametrize(
    ("inside", "keys"),
    [(0, {"microbatches": 1}), (1, {"microbatches": 4, "pipeline": "interleaved"})],
    ids=["one microbatch", "the last partition"],
)
def test_gradients_are_those_of_plain_keras(smp_init, inside, keys):
    smp_init({**BY_HAND, **keys})
    model = Squares(inside)
    for ours, plain in zip(gradients(model), plain_gradients(model), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inside", "pipeline"), [(0, "interleaved"), (0, "simple"), (1, "simple")])
def test_a_tape_of_another_microbatch_is_refused(smp_init, inside, pipeline):
    smp_init({**BY_HAND, "microbatches": 4, "pipeline": pipeline})
    with pytest.raises(StepError, match=rf"tf\.py_function in partition {inside}") as caught:
        gradients(Squares(inside))
    assert '"microbatches": 1' in str(caught.value)
