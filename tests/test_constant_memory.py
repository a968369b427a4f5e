"""What is called at each step leaves nothing behind, in two ranks.

TensorFlow keeps some 700 bytes of each Python number that becomes a tensor outside of a function.
`benchmarks/endurance.py` goes on for longer.
"""

from __future__ import annotations

import pytest
from processes import check_ranks
from turns import in_turn

MOST_BYTES = 350  # half of what a number leaves

SCRIPT = """
import gc
import sys
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 2, "transport": sys.argv[1]})
import keras
import numpy as np
import tensorflow as tf
from usage import usage

keras.utils.set_random_seed(1)
inputs = keras.Input((4,))
outputs = keras.layers.Dense(3)(keras.layers.Dense(5, "relu")(inputs))
model = smp.DistributedModel.from_keras(keras.Model(inputs, outputs))
model.compile("adam", "mse")
x, y = np.ones([8, 4], "float32"), np.ones([8, 3], "float32")

@smp.step
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x, training=True) ** 2)
    return tape.gradient(loss, model.trainable_variables), loss

numbers = iter(range(10**6, 10**9))
gradients = [tf.ones([3])]

x_of_20, y_of_20 = np.ones([160, 4], "float32"), np.ones([160, 3], "float32")

def fit(times):
    model.fit(x_of_20, y_of_20, batch_size=8, epochs=times // 20, verbose=0)

def each(call):
    return lambda times: [call() for _ in range(times)] and None

CALLS = {
    "step": each(lambda: step(x)),
    "fit": fit,
    "train_on_batch": each(lambda: model.train_on_batch(x, y)),
    "barrier": each(smp.barrier),
    "allgather": each(lambda: smp.allgather(next(numbers))),
    "allreduce": each(lambda: smp.allreduce(tf.ones([3]) * 0.5, group=smp.WORLD)),
    "clip": each(lambda: smp.clip_by_global_norm(gradients, float(next(numbers)))),
}
for name, repeat in CALLS.items():
    repeat(40)
    gc.collect()
    points = [usage()]
    for _ in range(9):
        repeat(60)
        gc.collect()
        points.append(usage())
    # Buffers grow for some 300 calls, and now and then later: what leaks is in every stretch.
    left = min((b.allocated_bytes - a.allocated_bytes) / 240 for a, b in zip(points, points[4:]))
    print("LEFT", name, round(left), points[-1].threads - points[0].threads,
          points[-1].descriptors - points[0].descriptors)
"""


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("transport", in_turn(["auto", "collective"], 2))
def test_what_is_called_at_each_step_leaves_nothing_behind(transport):
    for result in check_ranks(SCRIPT, 2, args=[transport], seconds=900, fresh=True):
        lines = [line.split()[1:] for line in result.lines if line.startswith("LEFT")]
        assert len(lines) == 7
        for name, left, threads, files in lines:
            assert int(left) < MOST_BYTES, f"{name} leaves {left} bytes each time"
            assert int(threads) <= 2, f"{name} starts {threads} threads"
            assert int(files) <= 2, f"{name} opens {files} files"
