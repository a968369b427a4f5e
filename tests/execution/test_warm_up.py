from __future__ import annotations

import weakref

import keras
import pytest
import tensorflow as tf
from small import TWO_BY_TWO, Net, Scale, batch, device_index

import opensmp as smp

X = tf.ones([4, 5])


@pytest.fixture(autouse=True)
def _no_other_models(monkeypatch):
    """A model of another test that was never called would have every step rehearsed."""
    monkeypatch.setattr("opensmp.execution.models.registry._models", weakref.WeakSet())


def test_all_variables_exist_in_the_run_that_counts(smp_init):
    smp_init(TWO_BY_TWO)
    model = Net()
    seen = []

    @smp.step
    def backward(x):
        watched = list(model.trainable_variables)
        seen.append(len(watched))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for variable in watched:
                tape.watch(variable.value)
            loss = tf.reduce_sum(model(x))
        return loss, tape.gradient(loss, watched)

    _, gradients = backward(X)
    assert seen == [0, 4, 4]  # once for the rehearsal, then once per microbatch
    assert len(gradients) == 4
    backward(X)
    backward(tf.ones([2, 5]))
    assert seen == [0, 4, 4, 4, 4]


def test_models_are_partitioned_and_nothing_else_changes(smp_init):
    smp_init(TWO_BY_TWO)
    model = Scale(3.0)
    count = tf.Variable(0)
    metric = keras.metrics.Sum()

    @smp.step
    def forward(x):
        count.assign_add(1)
        metric.update_state(x)
        return model(x)

    forward(X)
    assert int(count) == 2
    assert float(metric.result()) == 20.0
    assert device_index(model.factor.value) == 1


def test_a_model_that_is_ready_needs_none(smp_init):
    smp_init(TWO_BY_TWO)
    model = Net()
    model(batch(4))
    runs = []

    @smp.step
    def forward(x):
        runs.append(x.shape[0])
        return model(x)

    forward(batch(4))
    assert runs == [2, 2]


def test_losses_that_layers_add_are_there_in_the_first_run_too(smp_init):
    """A step may add up `model.losses`, of which there must be some."""
    smp_init(TWO_BY_TWO)
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4, activity_regularizer="l2", kernel_regularizer="l1")(inputs)
    model = smp.DistributedModel(inputs, keras.layers.Dense(2)(hidden))
    seen = []

    @smp.step
    def forward(x):
        model(x, training=True)
        seen.append(len(model.losses))
        return tf.add_n(model.losses)

    forward(X)
    assert seen == [2, 2, 2]


def test_sparse_gradients_are_sparse_in_the_first_run_too(smp_init):
    """A step's function may ask for the type of a gradient, or read its rows."""
    smp_init(TWO_BY_TWO)
    inputs = keras.Input((3,), dtype="int32")
    hidden = keras.layers.Embedding(7, 4)(inputs)
    model = smp.DistributedModel(inputs, keras.layers.Dense(2)(hidden))

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        gradient = tape.gradient(loss, model.trainable_variables)[0]
        assert isinstance(gradient, tf.IndexedSlices)
        return gradient.indices

    assert backward(tf.zeros([4, 3], tf.int32)).concat().shape == (12,)


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_gradients_of_gradients_are_there_in_the_first_run_too(smp_init, orders):
    smp_init(TWO_BY_TWO)
    model = Net()

    @smp.step
    def backward(x):
        def derivative(order):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = tf.reduce_sum(model(x) if order == 1 else derivative(order - 1) ** 2)
            return tape.gradient(value, x)

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(derivative(orders) ** 2)
        gradient = tape.gradient(loss, model.trainable_variables[0])
        return 2.0 * gradient, loss

    gradients, _ = backward(X)
    assert len(gradients) == 2


def test_the_trace_that_partitions_a_model_is_used_again(smp_init):
    smp_init(TWO_BY_TWO)
    calls = []

    class Counting(keras.layers.Dense):
        def call(self, x):
            calls.append(type(x).__name__)
            return super().call(x)

    model = smp.DistributedModel.from_keras(keras.Sequential([keras.Input((5,)), Counting(2)]))
    calls.clear()

    @smp.step
    def forward(x):
        return model(x)

    forward(X)
    assert len(calls) == 1
