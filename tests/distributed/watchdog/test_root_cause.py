from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from small import TWO_BY_TWO

import opensmp as smp
from opensmp.distributed.watchdog.root_cause import Place


@pytest.fixture(autouse=True)
def two_partitions():
    smp.init(TWO_BY_TWO)
    yield
    smp.shutdown()


def step_of(second):
    with smp.partition(0):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, name="low")(inputs)
    with smp.partition(1):
        x = keras.layers.Lambda(second, name="two")(x)
        x = keras.layers.Dense(2, name="high")(x)
    net = smp.DistributedModel.from_keras(keras.Model(inputs, x))

    @smp.step
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(net(x, training=True))
        return tape.gradient(loss, net.trainable_variables), loss

    return step


def test_an_error_names_partition_microbatch_and_layers():
    rows = tf.constant([1.0, 2.0])
    step = step_of(lambda x: x * tf.gather(rows, tf.cast(tf.reduce_max(x) * 0 + 7, tf.int32)))
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        step(tf.ones((4, 4)))
    text = str(caught.value)
    assert "is not in [0, 2)" in text
    assert "This happened in partition 1, microbatch" in text
    assert "'two'" in text


def test_check_numerics_shows_the_operation_and_not_what_was_cancelled():
    tf.debugging.enable_check_numerics()
    try:
        step = step_of(lambda x: tf.math.log(x - 1e9))
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            step(tf.ones((4, 4)))
    finally:
        tf.debugging.disable_check_numerics()
    text = str(caught.value)
    assert "cancelled" not in text
    assert "NaN" in text
    assert "This happened in partition 1, microbatch" in text


def test_a_place_shows_some_layers_and_counts_the_rest():
    place = Place("F", 1, 2, [f"layer_{i}" for i in range(8)])
    assert str(place).startswith(
        "partition 1, microbatch 2: in the forward pass of layers 'layer_0'"
    )
    assert str(place).endswith("2 more")
