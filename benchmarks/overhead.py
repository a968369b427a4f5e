"""What smp.step costs when there is nothing to split: one partition, one microbatch.

    python benchmarks/overhead.py

Three training steps of the same model, in one process: a plain tf.function, a second plain
tf.function (the noise floor), and an smp.step in a tf.function. Each has its own copy of the
weights and of the optimizer. A round runs each once, in random order, and gives two ratios,
so that whatever slows the machine down for seconds cancels out.

Prediction, written before the first measurement: the step adds two calls of functions (the
forward and the backward pass of the one segment), which take tens of microseconds, and fixes
the order between the last operations of the forward pass and the loss. TensorFlow optimises
the functions one by one instead of together. Expected: medians within 1.01 of the plain
step, at most 1.03, for steps that take 50 ms or more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import models
import opensmp as smp
import paired

TARGET = 1.03
WARM_UP = 4
TOLERANCE = 1e-5

Step = Callable[[], float]


def plain_step(workload: models.Workload) -> Step:
    keras.utils.set_random_seed(0)
    model, loss_fn = workload.build(), models.loss_function()
    optimizer = keras.optimizers.SGD(1e-3)

    @tf.function
    def train_step(inputs, labels):
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return on_batch(train_step, workload)


def split_step(workload: models.Workload) -> Step:
    keras.utils.set_random_seed(0)
    model = smp.DistributedModel.from_keras(workload.build())
    train_step = models.split_step(model, keras.optimizers.SGD(1e-3))
    return on_batch(train_step, workload)


def on_batch(train_step: Callable[..., tf.Tensor], workload: models.Workload) -> Step:
    inputs, labels = tf.constant(workload.inputs), tf.constant(workload.labels)
    return lambda: float(train_step(inputs, labels))


def runs_of(workload: models.Workload) -> list[Step]:
    return [plain_step(workload), plain_step(workload), split_step(workload)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="runs of each step")
    parser.add_argument("--quick", action="store_true", help="small models, few runs, no target")
    arguments = parser.parse_args()
    smp.init({"partitions": 1, "microbatches": 1})
    if arguments.quick:
        rounds = 3
        workloads = [
            models.mlp(2, 64, 8),
            models.cnn(4, 16, 4),
            models.transformer(1, 16, 8, 50, 2),
        ]
    else:
        rounds = arguments.rounds
        workloads = paired.full_size()
    columns = "plain step | smp.step / plain"
    worst = paired.compare(workloads, runs_of, rounds, WARM_UP, TOLERANCE, columns)
    if arguments.quick:
        return 0
    print(f"largest median {worst:.3f}, target at most {TARGET}")
    return int(worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
