"""The digits again, as an existing smp script would train them: no line is new.

It has the vendor's import line, no `smp.partition`, a configuration that comes from outside,
and the habits of Keras 2 that such scripts have: `optimizer.get_gradients`,
`metric.reset_states`. It ends with an error if a test accuracy of 0.93 is not exceeded.

    export SM_HP_MP_PARAMETERS='{"partitions": 2, "microbatches": 4, "auto_partition": true}'
    python examples/smp_script.py

Without that variable the script sets it itself, in the place of the service that used to.
"""

from __future__ import annotations

import os

import tensorflow as tf

from digits_data import load_digits

os.environ.setdefault(
    "SM_HP_MP_PARAMETERS",
    '{"partitions": 2, "microbatches": 4, "pipeline": "interleaved", "optimize": "speed",'
    ' "auto_partition": true}',
)

# ---------------------------------------------------------------- the script as it was

import smdistributed.modelparallel.tensorflow as smp

tf.random.set_seed(1234)

smp.init()

x_train, y_train, x_test, y_test = load_digits()

train_ds = (
    tf.data.Dataset.from_tensor_slices((x_train, y_train))
    .shuffle(10000, seed=smp.dp_rank())
    .batch(80, drop_remainder=True)
)
test_ds = tf.data.Dataset.from_tensor_slices((x_test, y_test)).batch(100, drop_remainder=True)


class MyModel(smp.DistributedModel):
    def __init__(self):
        super(MyModel, self).__init__()
        self.conv1 = tf.keras.layers.Conv2D(32, 3, activation="relu")
        self.pool = tf.keras.layers.MaxPooling2D()
        self.flatten = tf.keras.layers.Flatten()
        self.dense1 = tf.keras.layers.Dense(128, activation="relu")
        self.dropout = tf.keras.layers.Dropout(0.2)
        self.dense2 = tf.keras.layers.Dense(10)

    def call(self, x, training=None):
        x = self.pool(self.conv1(x))
        x = self.dense1(self.flatten(x))
        return self.dense2(self.dropout(x, training=training))


model = MyModel()

loss_object = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = tf.keras.optimizers.Adam()
train_accuracy = tf.keras.metrics.SparseCategoricalAccuracy(name="train_accuracy")
test_accuracy = tf.keras.metrics.SparseCategoricalAccuracy(name="test_accuracy")


@smp.step
def get_grads(images, labels):
    predictions = model(images, training=True)
    loss = loss_object(labels, predictions)
    grads = optimizer.get_gradients(loss, model.trainable_variables)
    return grads, loss, predictions


@tf.function
def train_step(images, labels):
    gradients, loss, predictions = get_grads(images, labels)
    gradients = [g.accumulate() for g in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    train_accuracy.update_state(labels, predictions.merge())
    return loss.reduce_mean()


@smp.step
def get_predictions(images):
    return model(images, training=False)


@tf.function
def test_step(images, labels):
    test_accuracy.update_state(labels, get_predictions(images).merge())


for epoch in range(8):
    train_accuracy.reset_states()
    for images, labels in train_ds:
        loss = train_step(images, labels)
    if smp.rank() == 0:
        print(
            f"epoch {epoch + 1}: loss {float(loss):.4f}"
            f" accuracy {float(train_accuracy.result()):.4f}",
            flush=True,
        )

test_accuracy.reset_states()
for images, labels in test_ds:
    test_step(images, labels)
print(f"test accuracy {float(test_accuracy.result()):.4f}")

# ---------------------------------------------------------------- for the tests of opensmp

if float(test_accuracy.result()) <= 0.93:
    raise SystemExit("expected a test accuracy above 0.93")
