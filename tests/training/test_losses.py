"""`losses` of models and of the layers in them, where a step reads them: as in plain Keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
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


def test_penalties_are_those_of_the_weights_when_they_are_read(smp_init):
    class Reading(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2) + tf.add_n(self.losses)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            after = tf.add_n(self.losses)
            for variable in self.trainable_variables:
                variable.assign(0.5 * variable)
            with tf.GradientTape() as tape:
                assigned = tf.add_n(self.losses)
            slopes = tape.gradient(assigned, self.trainable_variables)
            slopes = tf.add_n([tf.reduce_sum(s) for s in slopes if s is not None])
            return {"loss": loss, "after": after, "assigned": assigned, "slopes": slopes}

    def history(wrap):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(4, kernel_regularizer="l2")(inputs)
        model = wrap(Reading(inputs, keras.layers.Dense(3, kernel_regularizer="l1")(hidden)))
        model.compile(keras.optimizers.SGD(0.5))
        x = np.random.default_rng(0).normal(size=(12, 6))
        return model.fit(x, x[:, :3], batch_size=6, epochs=2, shuffle=False, verbose=0).history

    smp_init({"partitions": 2, "microbatches": 2})
    with precision("float64"):
        plain, split = (history(each) for each in (lambda m: m, smp.DistributedModel.from_keras))
    assert plain.keys() == split.keys()
    for key, values in plain.items():
        np.testing.assert_allclose(split[key], values, rtol=1e-12, err_msg=key)


def test_keras_finds_no_way_in_a_circle_from_what_is_kept_of_losses(smp_init, tmp_path):
    smp_init({"partitions": 2, "microbatches": 2})
    model = smp.DistributedModel.from_keras(part("penalised", 4, 2, 0.1))
    model.compile("adam", "mse")
    x = np.ones((8, 4), "float32")
    model.fit(x, x[:, :2], verbose=0)
    model.save_weights(tmp_path / "a.weights.h5")
    before = model.get_weights()
    model.fit(x, x[:, :2], verbose=0)
    model.load_weights(tmp_path / "a.weights.h5")
    for loaded, saved in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(loaded, saved)


class Counting(keras.layers.Layer):
    """Adds a loss for each row that only Python code knows the shape of."""

    def __init__(self, tells: bool) -> None:
        super().__init__()
        self.tells = tells

    def call(self, x):
        losses = tf.py_function(lambda x: tf.reduce_sum(x**2, axis=1), [x], x.dtype)
        if self.tells:
            losses.set_shape(x.shape[:1])
        self.add_loss(tf.stop_gradient(losses))
        return x


def adding(own_step: bool, tells: bool):
    class Own(keras.Model):
        def train_step(self, data):
            x, _ = data
            self(x, training=True)
            return {"loss": sum(tf.reduce_sum(loss) for loss in self.losses)}

    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2)(Counting(tells)(keras.layers.Dense(4)(inputs)))
    return (Own if own_step else keras.Model)(inputs, outputs)


@pytest.mark.parametrize("partitions", [2, 4])
@pytest.mark.parametrize("own_step", [False, True])
def test_losses_of_rows_add_up_whatever_has_said_their_shape(smp_init, own_step, partitions):
    def losses(wrap):
        keras.utils.set_random_seed(1)
        model = wrap(adding(own_step, tells=True))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        x = np.random.default_rng(0).normal(size=(12, 4))
        return model.fit(x, x[:, :2], batch_size=12, verbose=0).history["loss"]

    smp_init({"partitions": partitions, "microbatches": 3})
    with precision("float64"):
        plain, split = (losses(each) for each in (lambda m: m, smp.DistributedModel.from_keras))
    np.testing.assert_allclose(split, plain, rtol=1e-12)


@pytest.mark.parametrize("own_step", [False, True])
def test_a_loss_of_unknown_shape_is_refused_by_name(smp_init, own_step):
    x = np.ones((12, 4), "float32")
    for microbatches in (1, 3):
        smp_init({"partitions": 2, "microbatches": microbatches})
        model = smp.DistributedModel.from_keras(adding(own_step, tells=False))
        model.compile("sgd", "mse")
        if microbatches == 1:
            model.fit(x, x[:, :2], batch_size=12, verbose=0)
            continue
        with pytest.raises(smp.StepError, match="adds a loss of the shape <unknown>"):
            model.fit(x, x[:, :2], batch_size=12, verbose=0)


def test_in_several_processes_penalties_are_those_of_all_weights():
    script = """
import keras, numpy as np, tensorflow as tf
import opensmp as smp

smp.init()
keras.config.set_floatx("float64")

class Reading(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2) + tf.add_n(self.losses)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss, "after": tf.add_n(self.losses), "number": len(self.losses)}

def history(wrap):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(4, kernel_regularizer="l2", bias_regularizer="l1")(inputs)
    model = wrap(Reading(inputs, keras.layers.Dense(3, kernel_regularizer="l1")(hidden)))
    model.compile(keras.optimizers.SGD(0.5))
    x = np.random.default_rng(0).normal(size=(12, 6))
    return model.fit(x, x[:, :3], batch_size=6, epochs=2, shuffle=False, verbose=0).history

plain, split = history(lambda m: m), history(smp.DistributedModel.from_keras)
assert plain["number"] == split["number"] == [3, 3]
np.testing.assert_allclose(split["loss"], plain["loss"], rtol=1e-12)
np.testing.assert_allclose(split["after"], plain["after"], rtol=1e-12)
"""
    check_ranks(script, 4, {"partitions": 2, "microbatches": 2})
