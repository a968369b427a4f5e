from __future__ import annotations

import collections

import numpy as np
import pytest
import tensorflow as tf
from small import TWO_BY_TWO, Net, Scale, batch

import opensmp as smp

MANY = {**TWO_BY_TWO, "microbatches": 4}


def op_types(function):
    return collections.Counter(op.type for op in function.graph.get_operations())


def test_each_variable_is_read_once(smp_init):
    smp_init(MANY)
    model = Net()

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        return tape.gradient(loss, model.trainable_variables)

    traced = backward.get_concrete_function(batch(8))
    assert op_types(traced)["ReadVariableOp"] == len(model.trainable_variables)
    for gradient, variable in zip(backward(batch(8)), model.trainable_variables, strict=True):
        assert gradient.accumulate().shape == variable.shape


@pytest.mark.parametrize("rounds", [1, 10])
def test_a_variable_that_the_step_assigns_is_read_again(smp_init, rounds):
    smp_init(MANY)
    model = Scale(2.0)
    model(tf.ones([4, 5]))

    @smp.step
    def forward(x):
        before = model(x)
        model.factor.assign_add(1.0)
        return before, model(x)

    @tf.function
    def several():
        before, after = forward(tf.ones([4, 5]))
        return before.merge(), after.merge()

    for number in range(rounds):
        before, after = several()
        first = 2.0 + 4 * number
        np.testing.assert_array_equal(before[:, 0], first + np.arange(4))
        np.testing.assert_array_equal(after[:, 0], first + 1 + np.arange(4))


def test_gradients_of_a_variable_that_the_step_assigns(smp_init):
    smp_init(MANY)
    model = Scale(2.0)
    model(tf.ones([4, 5]))

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        gradient = tape.gradient(loss, model.factor)
        model.factor.assign_sub(0.01 * gradient)
        return gradient

    found = [float(gradient) for gradient in backward(tf.ones([4, 5]))]
    factor, expected = 2.0, []
    for _ in range(4):
        expected.append(2 * factor * 5)
        factor -= 0.01 * expected[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(float(model.factor), factor, rtol=1e-6)


@pytest.mark.parametrize("watched", [False, True])
def test_a_frozen_variable_has_a_gradient_only_where_a_tape_watches_it(smp_init, watched):
    smp_init(MANY)
    model = Net()
    model.hidden.trainable = False  # before it has variables, which TensorFlow then knows
    model(batch(8))
    found = []

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            if watched:
                tape.watch(model.hidden.kernel.value)
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        gradient = tape.gradient(loss, model.hidden.kernel.value)
        found.append(gradient is not None)
        return loss, gradient

    backward(batch(8))
    assert found == [watched] * len(found)
    assert len(found) >= 4
