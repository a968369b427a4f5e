"""Memory between two processes does not grow with the number of microbatches."""

from __future__ import annotations

import pytest
from processes import check_ranks
from turns import in_turn

SCRIPT = """
import re
import sys
import time
import opensmp as smp
here = smp.init()
import keras, numpy as np, tensorflow as tf

def made():
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((16,))
    skips = []
    for width in (32, 32, 32, 32, 32, 32):
        x = keras.layers.Dense(width, "tanh")(x)
        skips.append(x)
    x = keras.layers.Add()([x, skips[0], skips[2]])  # which other partitions read, too
    return keras.Model(inputs, keras.layers.Dense(4)(x))

def delayed(x):  # ranks run ahead of each other
    def late(value):
        time.sleep(float(np.random.rand()) * 3e-3)
        return value

    return tf.numpy_function(late, [x], x.dtype)

count = MICROBATCHES
rng = np.random.default_rng(0)
x = tf.constant(rng.normal(size=(count * 64, 16)), tf.float32)
y = tf.constant(rng.normal(size=(count * 64, 4)), tf.float32)
plain, model = made(), smp.DistributedModel.from_keras(made())
optimizers = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)

@smp.step
def step(x, y):
    with tf.GradientTape() as tape:
        out = model(x, training=True)
        loss = tf.reduce_mean((tf.ensure_shape(delayed(out), out.shape) * 0.0 + out - y) ** 2)
    return tape.gradient(loss, model.trainable_variables), loss

@tf.function
def train(x, y):
    gradients, loss = step(x, y)
    gradients = [g.reduce_mean() for g in gradients]
    optimizers[0].apply_gradients(zip(gradients, model.trainable_variables))
    return loss.reduce_mean()

@tf.function
def train_plain(x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((plain(x, training=True) - y) ** 2)
    gradients = tape.gradient(loss, plain.trainable_variables)
    optimizers[1].apply_gradients(zip(gradients, plain.trainable_variables))
    return loss

for turn in range(10):
    rows = tf.roll(x, turn, 0), tf.roll(y, turn, 0)
    np.testing.assert_allclose(train(*rows), train_plain(*rows), rtol=1e-5)
maps = re.findall(r"^(\\w+)-(\\w+) .*memfd:opensmp", open("/proc/self/maps").read(), re.M)
print("SHARED", sum(int(end, 16) - int(start, 16) for start, end in maps))
"""


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("pipeline", in_turn(["interleaved", "zero_bubble"], 2))
def test_memory_is_that_of_the_microbatches_in_flight(pipeline, processes):
    sizes = []
    for microbatches in (8, 24):
        config = {"partitions": processes, "microbatches": microbatches, "pipeline": pipeline}
        script = SCRIPT.replace("MICROBATCHES", str(microbatches))
        results = check_ranks(script, processes, config)
        sizes.append([int(result.output.rpartition("SHARED")[2].split()[0]) for result in results])
    few, many = sizes
    assert all(size > 0 for size in few)
    # Counters grow, and places of the scalars that are computed outside of calls.
    assert all(b <= a + 12 * 4096 * processes for a, b in zip(few, many, strict=True)), sizes
