"""The digits again, by a hybrid script: model parallelism and data parallelism together.

The script is written as such scripts are, with the calls of Horovod, which need not be
installed. Every batch of 80 images is divided among the replicas of the model, whose gradients
are averaged; within a replica it is divided into microbatches. The accuracy at the end is that
of the whole test set, and the program fails if it is not above 0.93.

Four processes, two replicas of two partitions each:

    opensmp run -n 4 --partitions 2 --microbatches 2 examples/hybrid_digits.py

The same under MPI, and in one process with both partitions:

    mpirun -n 4 python examples/hybrid_digits.py
    python examples/hybrid_digits.py
"""

from __future__ import annotations

import argparse
import sys
import time

import keras
import tensorflow as tf

import smdistributed.modelparallel.tensorflow as smp

# isort: split
# Under `opensmp run` the order of these two lines does not matter.
import horovod.tensorflow as hvd

from digits_data import load_digits

smp.init({"partitions": 2, "microbatches": 2, "horovod": True})

BATCH_SIZE = 80
LEAST_ACCURACY = 0.93


class DigitsModel(smp.DistributedModel):
    """Two convolutions and two dense layers."""

    def __init__(self):
        super().__init__()
        self.conv_1 = keras.layers.Conv2D(16, 3, activation="relu")
        self.pool_1 = keras.layers.MaxPooling2D()
        self.conv_2 = keras.layers.Conv2D(32, 3, activation="relu")
        self.pool_2 = keras.layers.MaxPooling2D()
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(64, activation="relu")
        self.logits = keras.layers.Dense(10)

    def call(self, images, training=None):
        x = self.pool_1(self.conv_1(images))
        x = self.pool_2(self.conv_2(x))
        return self.logits(self.dense(self.flatten(x)))


keras.utils.set_random_seed(1234)
model = DigitsModel()
loss_object = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = keras.optimizers.Adam(1e-3)
test_accuracy = keras.metrics.SparseCategoricalAccuracy()


@smp.step
def forward_backward(images, labels):
    predictions = model(images, training=True)
    loss = loss_object(labels, predictions)
    gradients = optimizer.get_gradients(loss, model.trainable_variables)
    return gradients, loss


@tf.function
def train_step(images, labels, first_batch):
    gradients, loss = forward_backward(images, labels)
    gradients = [hvd.allreduce(gradient.accumulate()) for gradient in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    if first_batch:
        hvd.broadcast_variables(model.variables, root_rank=0)
        hvd.broadcast_variables(optimizer.variables, root_rank=0)
    return hvd.allreduce(loss.reduce_mean())


@smp.step
def forward(images):
    return model(images, training=False)


@tf.function
def test_step(images, labels):
    test_accuracy.update_state(labels, forward(images).merge())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    num_epochs = parser.parse_args().epochs

    digits = load_digits()
    train_data = (
        tf.data.Dataset.from_tensor_slices((digits.train_images, digits.train_labels))
        .shuffle(len(digits.train_labels), seed=1234)  # the same order in all processes
        .batch(BATCH_SIZE, drop_remainder=True)
    )
    train_data = smp.shard(train_data, batched=True)

    for epoch in range(1, num_epochs + 1):
        started = time.perf_counter()
        mean_loss = keras.metrics.Mean()
        for number, (images, labels) in enumerate(train_data):
            loss = train_step(images, labels, first_batch=epoch == 1 and number == 0)
            mean_loss.update_state(loss)
        if smp.rank() == 0:
            print(
                f"epoch {epoch}/{num_epochs}  loss {float(mean_loss.result()):.4f}"
                f"  {time.perf_counter() - started:.1f} s",
                flush=True,
            )

    # Each replica tests its part, and the accuracies of parts of equal size are averaged.
    images, labels = smp.shard((digits.test_images, digits.test_labels))
    for part in tf.data.Dataset.from_tensor_slices((images, labels)).batch(100):
        test_step(*part)
    accuracy = float(hvd.allreduce(test_accuracy.result()))
    if smp.rank() == 0:
        print(
            f"test accuracy {accuracy:.4f} on {len(digits.test_labels)} images,"
            f" {hvd.size()} replica(s) on {smp.size()} process(es)"
        )
    if accuracy <= LEAST_ACCURACY:
        print(f"expected a test accuracy above {LEAST_ACCURACY}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
