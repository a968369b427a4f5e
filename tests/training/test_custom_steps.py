"""What a step of a user's own may do with gradients: right values by hand, and of plain Keras."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
from training import custom_steps
from training.fixtures import BY_TWO, assert_close, data
from turns import in_turn

import opensmp as smp

SCRIPT = """
import json, sys
import opensmp as smp
smp.init({"partitions": 2, "microbatches": 2})
from training import custom_steps
wrap = smp.DistributedModel.from_keras
found = {name: custom_steps.learned(step, wrap) for name, (step, _) in custom_steps.CLOSED.items()}
for name in custom_steps.PENALISED:
    found[name] = custom_steps.trained(name, wrap)
# A batch with fewer rows than there are replicas.
found["one row"] = custom_steps.learned(custom_steps.penalty_of_inputs, wrap, rows=1)
print("FOUND", json.dumps(found), flush=True)
"""


@pytest.mark.parametrize("name", custom_steps.CLOSED)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_gradients_are_those_found_by_hand(name, microbatches, smp_init):
    smp_init({"partitions": 2, "microbatches": microbatches})
    step, right = custom_steps.CLOSED[name]
    np.testing.assert_allclose(
        custom_steps.learned(step, smp.DistributedModel.from_keras), right, rtol=1e-5
    )


@pytest.mark.parametrize("name", custom_steps.CLOSED)
def test_plain_keras_gives_them_too(name):
    step, right = custom_steps.CLOSED[name]
    np.testing.assert_allclose(custom_steps.learned(step, lambda model: model), right, rtol=1e-5)


@pytest.mark.parametrize("name", custom_steps.PENALISED)
def test_penalties_train_as_in_plain_keras(name, smp_init):
    smp_init(BY_TWO)
    assert_close(
        custom_steps.trained(name, lambda model: model),
        custom_steps.trained(name, smp.DistributedModel.from_keras),
        rtol=1e-4,
    )


@pytest.mark.parametrize("ranks", in_turn([2, 4], 2))
def test_ranks_and_replicas_give_the_same(ranks):
    plain = {name: right for name, (_, right) in custom_steps.CLOSED.items()}
    for name in custom_steps.PENALISED:
        plain[name] = custom_steps.trained(name, lambda model: model)
    plain["one row"] = [72.0, 48.0]
    for result in check_ranks(SCRIPT, ranks):
        (line,) = [line for line in result.lines if line.startswith("FOUND")]
        found = json.loads(line.removeprefix("FOUND"))
        assert set(found) == set(plain)
        for name, numbers in plain.items():
            assert_close(numbers, found[name], rtol=1e-4)


def test_penalties_in_a_step_of_microbatches(smp_init):
    smp_init({"partitions": 2, "microbatches": 2})
    model = custom_steps.model_of(lambda model, data: {}, smp.DistributedModel.from_keras)

    @smp.step
    def step(x):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = model(x)
            loss = tf.reduce_mean(outputs**2) + tf.reduce_mean(inner.gradient(outputs, x) ** 2)
        return outer.gradient(loss, model.trainable_variables), loss

    gradients, loss = step(tf.ones((4, 1)))
    assert [g.accumulate().numpy().item() for g in gradients] == [72.0, 48.0]
    assert float(loss.reduce_mean()) == 72.0


def test_frozen_values_and_state_that_change_before_the_gradient(smp_init):
    """A frozen weight that somebody assigns to after the call has no say in the gradient."""
    smp_init(BY_TWO)
    x, y = data(8)

    class Model(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                outputs = self(x, training=True)
                loss = tf.reduce_mean((outputs - tf.one_hot(y, 4)) ** 2)
            frozen = self.get_layer("frozen").kernel
            before = tf.identity(frozen.value)
            frozen.assign(before * 3.0)
            for variable in self.non_trainable_variables:
                if "moving" in variable.path:
                    variable.assign(variable.value + 1.0)
            gradients = tape.gradient(loss, self.trainable_variables)
            frozen.assign(before)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    def trained(wrap):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        x_ = keras.layers.Dense(8, activation="tanh")(inputs)
        x_ = keras.layers.Dense(8, trainable=False, name="frozen")(x_)
        frozen_norm = keras.layers.BatchNormalization(trainable=False)
        model = wrap(Model(inputs, keras.layers.Dense(4)(frozen_norm(x_))))
        model.compile(keras.optimizers.SGD(0.1))
        history = model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0).history
        return history["loss"], model.get_weights()

    assert_close(trained(lambda model: model), trained(smp.DistributedModel.from_keras))


def test_the_forward_pass_runs_once(smp_init):
    """A custom step has no second forward pass: what is counted in the model is counted once."""
    smp_init({"partitions": 2, "microbatches": 2})
    counts = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            tf.py_function(lambda: counts.append(1), [], [])
            return x * 1.0

    class Model(keras.Model):
        def train_step(self, data):
            x, _ = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(x, training=True) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    inputs = keras.Input((6,))
    hidden = Counting()(keras.layers.Dense(4)(inputs))
    model = smp.DistributedModel.from_keras(Model(inputs, keras.layers.Dense(2)(hidden)))
    model.compile("sgd")
    x, y = data(8)
    model.fit(x, y, batch_size=8, verbose=0)
    counts.clear()
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert len(counts) == 2 * 2  # a microbatch each, two epochs
