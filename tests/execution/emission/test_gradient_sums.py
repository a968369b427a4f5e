from __future__ import annotations

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import MANUAL, Net, batch

import opensmp as smp

MANY = {**MANUAL, "partitions": 2, "microbatches": 4}


class Words(smp.DistributedModel):
    """An embedding and two dense layers, whose kernels are one variable if `tied`."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = keras.layers.Embedding(7, 5)
        self.hidden = keras.layers.Dense(5, activation="tanh")
        self.top = keras.layers.Dense(3)
        self.tied = tied

    def call(self, words, training=None):
        with smp.partition(0):
            x = self.hidden(self.embedding(words))
        with smp.partition(1):
            x = x @ tf.convert_to_tensor(self.hidden.kernel) if self.tied else x
            return self.top(x)


def words(rows=8):
    return tf.constant(np.random.default_rng(0).integers(0, 7, (rows, 4)))


def backward_step(model):
    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        return tape.gradient(loss, model.trainable_variables), loss

    return backward


def summed(step, x):
    """The sums of the gradients, taken in a `tf.function`, and their count of additions."""

    @tf.function
    def sums():
        gradients, _ = step(x)
        return [tf.convert_to_tensor(gradient.reduce_sum()) for gradient in gradients]

    graph = sums.get_concrete_function().graph
    return sums(), collections.Counter(op.type for op in graph.get_operations())["AddV2"]


def one_by_one(step, x):
    """The sums over the gradients of single microbatches, which an eager call returns."""
    gradients, _ = step(x)
    totals = []
    for gradient in gradients:
        total, *rest = map(tf.convert_to_tensor, gradient.outputs)
        for each in rest:
            total = total + each
        totals.append(total)
    return totals


@pytest.mark.parametrize("pipeline", ["simple", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("partitions", [1, 2])
def test_passes_add_to_the_sums_bit_for_bit(smp_init, pipeline, partitions):
    smp_init({**MANY, "partitions": partitions, "pipeline": pipeline})
    if partitions == 1:
        model = smp.DistributedModel.from_keras(
            keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(3)])
        )
    else:
        model = Net()
    step = backward_step(model)
    found, additions = summed(step, batch(8))
    assert additions == 0
    for sum_, expected in zip(found, one_by_one(step, batch(8)), strict=True):
        np.testing.assert_array_equal(sum_, expected)


def test_sparse_gradients_stay_terms_of_their_own(smp_init):
    smp_init(MANY)
    model = Words()
    step = backward_step(model)

    @tf.function
    def means():
        gradients, _ = step(words())
        return [gradient.accumulate() for gradient in gradients]

    slices = means()[0]
    assert isinstance(slices, tf.IndexedSlices)
    found, additions = summed(step, words())
    assert additions == 0
    for sum_, expected in zip(found[1:], one_by_one(step, words())[1:], strict=True):
        np.testing.assert_array_equal(sum_, expected)
    np.testing.assert_allclose(found[0], one_by_one(step, words())[0], rtol=1e-6, atol=1e-7)


def test_a_variable_of_two_partitions_keeps_the_order_of_its_additions(smp_init):
    smp_init(MANY)
    model = Words(tied=True)
    step = backward_step(model)
    found, _ = summed(step, words())
    for variable, sum_, expected in zip(
        model.trainable_variables, found, one_by_one(step, words()), strict=True
    ):
        if "embedding" in variable.path:
            np.testing.assert_allclose(sum_, expected, rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(sum_, expected)


@pytest.mark.parametrize("rounds", [1, 10])
def test_sums_and_single_gradients_in_one_function(smp_init, rounds):
    smp_init(MANY)
    model = Net()
    optimizer = keras.optimizers.SGD(0.1)
    step = backward_step(model)

    @tf.function
    def train(x):
        gradients, _ = step(x)
        singles = [gradient.stack() for gradient in gradients]
        means = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(means, model.trainable_variables, strict=True))
        return singles, means

    for _ in range(rounds):
        expected = [gradient.stack() for gradient in step(batch(8))[0]]
        singles, means = train(batch(8))
        for single, mean, stack in zip(singles, means, expected, strict=True):
            np.testing.assert_array_equal(single, stack)
            np.testing.assert_allclose(mean, tf.reduce_mean(stack, 0), rtol=1e-5, atol=1e-7)


def test_part_of_the_gradients_is_summed(smp_init):
    smp_init(MANY)
    model = Net()

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        kernel, *_ = tape.gradient(loss, model.trainable_variables)
        return kernel, tf.norm(kernel)

    @tf.function
    def sums():
        kernel, norms = backward(batch(8))
        return kernel.reduce_sum(), norms.stack()

    kernel, norms = sums()
    gradients = backward(batch(8))[0].outputs
    np.testing.assert_allclose(kernel, sum(gradients), rtol=1e-6)
    np.testing.assert_allclose(norms, [tf.norm(g) for g in gradients], rtol=1e-6)
