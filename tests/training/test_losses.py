"""`losses` of models and of the layers in them, where a step reads them: as in plain Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from training.uses import precision

import opensmp as smp


def part(name: str, inputs: int, outputs: int, strength: float) -> keras.Model:
    penalty = keras.regularizers.L2(strength)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(5, activity_regularizer=penalty, kernel_regularizer=penalty),
            keras.layers.Dense(outputs),
        ],
        name=name,
    )


class Parts(keras.Model):
    """Its step calls it, or parts of it, and adds losses.

    Args:
        use: Takes it and a batch; gives an output and the losses to add.
    """

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.first = keras.layers.Dense(4, activity_regularizer=keras.regularizers.L2(0.3))
        self.encoder, self.decoder = part("encoder", 4, 3, 0.1), part("decoder", 3, 4, 0.2)

    def call(self, x):
        return self.decoder(self.encoder(self.first(x)))

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            outputs, losses = self.use(self, x)
            loss = tf.reduce_mean((outputs - x) ** 2) + sum(losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss, "number": len(losses)}


def whole_then_part(model, x):
    outputs = model(x, training=True)
    return outputs + tf.reduce_mean(model.encoder(x + 1.0, training=True)), model.losses


def part_then_whole(model, x):
    shift = tf.reduce_mean(model.encoder(x + 1.0, training=True))
    return model(x, training=True) + shift, model.losses


def parts_alone(model, x):
    model.encoder(x, training=True)
    return model.decoder(model.encoder(x + 1.0, training=True)), model.losses


def whole_twice(model, x):
    model(x, training=True)
    return model(x + 1.0, training=True), model.losses


def losses_of_a_part(model, x):
    return model(x, training=True), model.encoder.losses


def losses_of_layers(model, x):
    outputs = model(x, training=True)
    return outputs, [*model.first.losses, *model.decoder.layers[0].losses]


def losses_of_a_layer_that_was_called(model, x):
    outputs = model(x, training=True)
    model.first(x + 1.0)
    return outputs, [*model.first.losses, *model.losses]


def loss_of_the_step(model, x):
    outputs = model(x, training=True)
    model.add_loss(tf.reduce_mean(tf.abs(outputs)))
    return outputs, model.losses


def trained(use, wrap):
    keras.utils.set_random_seed(1)
    model = Parts(use)
    x = np.random.default_rng(0).normal(size=(8, 4))
    model(x)
    model = wrap(model)
    model.compile(keras.optimizers.SGD(0.05))
    history = model.fit(x, x, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    return history["number"], history["loss"], model.get_weights()


@pytest.mark.parametrize(
    "use",
    [
        whole_then_part,
        part_then_whole,
        parts_alone,
        whole_twice,
        losses_of_a_part,
        losses_of_layers,
        losses_of_a_layer_that_was_called,
        loss_of_the_step,
    ],
)
def test_a_step_sees_the_losses_that_it_sees_in_plain_keras(use, smp_init):
    smp_init({"partitions": 2, "microbatches": 1})
    with precision("float64"):
        plain, split = (
            trained(use, each) for each in (lambda m: m, smp.DistributedModel.from_keras)
        )
    assert plain[0] == split[0]
    assert plain[0][0] >= 1
    np.testing.assert_allclose(split[1], plain[1], rtol=1e-12)
    for ours, theirs in zip(split[2], plain[2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_a_microbatch_sees_its_own_losses(smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.DistributedModel.from_keras(Parts(losses_of_a_part))
    x = tf.random.normal((8, 4))

    @smp.step
    def step(x):
        model(x, training=True)
        return tf.add_n(model.encoder.losses), tf.add_n(model.first.losses), tf.add_n(model.losses)

    found = [part.stack().numpy() for part in step(x)]
    for index, rows in enumerate((x[:4], x[4:])):
        model(rows, training=True)
        eager = [model.encoder.losses, model.first.losses, model.losses]
        for values, losses in zip(found, eager, strict=True):
            np.testing.assert_allclose(values[index], float(sum(losses)), rtol=1e-5)
