"""Trains a small CNN, split in two partitions, on 5,000 real handwritten digits.

The model is cut by hand: the convolutions are partition 0, the classifier is partition 1.
Every batch of 80 images runs as 4 microbatches of 20, so that both partitions work at the
same time. Progress is printed after each epoch; the program fails if fewer than 93 % of
1,000 images that it was not trained on are recognised.

    python examples/digits.py --epochs 8
"""

from __future__ import annotations

import argparse
import sys
import time

import keras
import tensorflow as tf

import opensmp as smp
from digits_data import load_digits

# Before anything else, because TensorFlow makes its devices once: at the first operation.
smp.init({"partitions": 2, "microbatches": 4, "auto_partition": False, "default_partition": 0})

BATCH_SIZE = 80
LEAST_ACCURACY = 0.93


class DigitsModel(smp.DistributedModel):
    """Two convolution blocks and a classifier with one hidden layer."""

    def __init__(self):
        super().__init__()
        self.conv_1 = keras.layers.Conv2D(16, 3, activation="relu")
        self.norm_1 = keras.layers.BatchNormalization(momentum=0.9)
        self.pool_1 = keras.layers.MaxPooling2D()
        self.conv_2 = keras.layers.Conv2D(32, 3, activation="relu")
        self.norm_2 = keras.layers.BatchNormalization(momentum=0.9)
        self.pool_2 = keras.layers.MaxPooling2D()
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(64, activation="relu")
        self.dropout = keras.layers.Dropout(0.3)
        self.logits = keras.layers.Dense(10)

    def call(self, images, training=None):
        with smp.partition(0):
            x = self.pool_1(self.norm_1(self.conv_1(images), training=training))
            x = self.pool_2(self.norm_2(self.conv_2(x), training=training))
        with smp.partition(1):
            x = self.dropout(self.dense(self.flatten(x)), training=training)
            return self.logits(x)


keras.utils.set_random_seed(1234)
model = DigitsModel()
loss_object = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = keras.optimizers.Adam(1e-3)
train_accuracy = keras.metrics.SparseCategoricalAccuracy()
test_accuracy = keras.metrics.SparseCategoricalAccuracy()


# Everything in here runs once per microbatch, pipelined over the partitions.
@smp.step
def forward_backward(images, labels):
    with tf.GradientTape() as tape:
        predictions = model(images, training=True)
        loss = loss_object(labels, predictions)
    gradients = tape.gradient(loss, model.trainable_variables)
    return gradients, loss, predictions


# Everything in here runs once per batch. What the step returns comes as StepOutputs, which
# hold one value per microbatch.
@tf.function
def train_step(images, labels):
    gradients, loss, predictions = forward_backward(images, labels)
    gradients = [gradient.accumulate() for gradient in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    train_accuracy.update_state(labels, predictions.merge())
    return loss.reduce_mean()


@smp.step
def forward(images):
    return model(images, training=False)


@tf.function
def test_step(images, labels):
    test_accuracy.update_state(labels, forward(images).merge())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    num_epochs = parser.parse_args().epochs

    digits = load_digits()
    # The microbatches must divide every batch, so a last, smaller one is dropped.
    train_data = (
        tf.data.Dataset.from_tensor_slices((digits.train_images, digits.train_labels))
        .shuffle(len(digits.train_labels), seed=1234)
        .batch(BATCH_SIZE, drop_remainder=True)
    )
    test_data = tf.data.Dataset.from_tensor_slices((digits.test_images, digits.test_labels))

    for epoch in range(1, num_epochs + 1):
        started = time.perf_counter()
        train_accuracy.reset_state()
        mean_loss = keras.metrics.Mean()
        for images, labels in train_data:
            mean_loss.update_state(train_step(images, labels))
        print(
            f"epoch {epoch}/{num_epochs}"
            f"  loss {float(mean_loss.result()):.4f}"
            f"  accuracy {float(train_accuracy.result()):.4f}"
            f"  {time.perf_counter() - started:.1f} s",
            flush=True,
        )

    for images, labels in test_data.batch(200):
        test_step(images, labels)
    accuracy = float(test_accuracy.result())
    print(f"test accuracy {accuracy:.4f} on {len(digits.test_labels)} images")
    if accuracy <= LEAST_ACCURACY:
        print(f"expected a test accuracy above {LEAST_ACCURACY}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
