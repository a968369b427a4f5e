from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import TWO_BY_TWO

import opensmp as smp

X, Y = np.ones((8, 4), np.float32), np.ones((8, 2), np.float32)


@pytest.fixture(autouse=True)
def two_partitions():
    smp.init(TWO_BY_TWO)
    yield
    smp.shutdown()


def model(kind=smp.DistributedModel):
    with smp.partition(0):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, kernel_initializer="ones", name="low")(inputs)
    with smp.partition(1):
        x = keras.layers.Lambda(tf.math.log, name="two")(x)
        x = keras.layers.Dense(2, name="high")(x)
    net = kind.from_keras(keras.Model(inputs, x))
    net.compile("adam", "mse")
    return net


class OwnStep(smp.DistributedModel):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return {"loss": loss}


@pytest.mark.parametrize("kind", [smp.DistributedModel, OwnStep])
def test_fit_names_the_layer_and_trains_on_afterwards(kind):
    net = model(kind)
    net.fit(X, Y, batch_size=4, verbose=0)
    before = net.get_weights()
    with pytest.raises(smp.NonFiniteError, match="activation of layer 'two', in partition 1"):
        net.fit(-X, Y, batch_size=4, verbose=0, callbacks=[smp.CheckFinite()])
    assert all(map(np.array_equal, before, net.get_weights()))
    net.fit(X, Y, batch_size=4, verbose=0, callbacks=[[smp.CheckFinite()]])


def test_the_callback_checks_one_call_of_fit_only():
    net = model()
    with pytest.raises(smp.NonFiniteError):
        net.fit(-X, Y, batch_size=4, verbose=0, callbacks=[smp.CheckFinite()])
    history = net.fit(-X, Y, batch_size=4, verbose=0)
    assert np.isnan(history.history["loss"][0])


def test_with_the_key_and_the_callback_fit_checks_once():
    smp.shutdown()
    smp.init({**TWO_BY_TWO, "check_finite": True})
    net = model()
    with pytest.raises(smp.NonFiniteError):
        net.fit(-X, Y, batch_size=4, verbose=0, callbacks=[smp.CheckFinite()])
    with pytest.raises(smp.NonFiniteError):
        net.fit(-X, Y, batch_size=4, verbose=0)


def test_mixed_precision_trains_with_scaled_losses_that_overflow():
    with smp.partition(0):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, dtype="mixed_float16")(inputs)
        x = keras.layers.Dense(2, dtype="mixed_float16")(x)
    net = smp.DistributedModel.from_keras(keras.Model(inputs, x))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=1e6)
    net.compile(optimizer, "mse")
    net.fit(X, Y * 100, batch_size=4, verbose=0, callbacks=[smp.CheckFinite()])
    assert float(optimizer.dynamic_scale) < 1e6  # a step was left out


def test_a_plain_model_is_refused():
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    net.compile("sgd", "mse")
    with pytest.raises(smp.StepError, match=r"which is no DistributedModel"):
        net.fit(X, Y, verbose=0, callbacks=[smp.CheckFinite()])


@pytest.mark.parametrize("kind", [smp.DistributedModel, OwnStep])
def test_what_ran_has_a_name_that_the_user_knows(kind):
    net = model(kind)
    with pytest.raises(smp.NonFiniteError, match=r"in run 1 of '(train_step|model_call)', "):
        net.fit(-X, Y, batch_size=4, verbose=0, callbacks=[smp.CheckFinite()])
    smp.shutdown()
    smp.init({**TWO_BY_TWO, "check_finite": True})
    with pytest.raises(smp.NonFiniteError, match="in run 1 of 'model_call', "):
        model(kind)(-X)
