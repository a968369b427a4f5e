"""Gradients that a step returns into a `tf.function`: their sums, and those of each microbatch."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tensorflow as tf
from small import Net

import opensmp as smp
from opensmp.api.step.step_output import Stacked

X = np.random.default_rng(0).normal(size=(12, 5)).astype("float32")


def made_step(smp_init, microbatches):
    smp_init({"partitions": 2, "microbatches": microbatches})
    model = Net()
    model(X)

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    return backward


def looked_at(gradients):
    """What a training loop may read of the gradients besides their sums."""
    first = gradients[0]
    in_branch = tf.cond(tf.reduce_sum(first[1]) > 0.0, lambda: first[2] * 1.0, lambda: first[2])
    return {
        "sums": [g.reduce_sum() for g in gradients],
        "each": [list(g) for g in gradients],
        "outputs": [g.outputs for g in gradients],
        "stacks": [g.stack() for g in gradients],
        "rows": [g.concat(0) for g in gradients],
        "last": [g[-1] for g in gradients],
        "some": gradients[1][1:],
        "branch": in_branch,
        "norms": [tf.norm(each) for each in first],
        "count": len(first),
    }


@pytest.mark.parametrize("microbatches", [3, 4, 12])
def test_single_gradients_are_those_of_an_eager_call(smp_init, microbatches):
    backward = made_step(smp_init, microbatches)
    inside = tf.function(lambda x: looked_at(backward(x)))(X)
    outside = looked_at(backward(X))
    tf.nest.assert_same_structure(inside, outside)
    for a, b in zip(tf.nest.flatten(inside), tf.nest.flatten(outside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    singles = zip(tf.nest.flatten(inside["each"]), tf.nest.flatten(outside["each"]), strict=True)
    assert all(np.array_equal(a, b) for a, b in singles)
    assert inside["count"] == microbatches


def test_a_step_returns_few_tensors_however_many_microbatches(smp_init):
    counts = []
    for microbatches in (3, 6, 12):
        backward = made_step(smp_init, microbatches)
        seen = []

        def train(x):
            gradients = backward(x)  # noqa: B023
            seen.extend(gradients)  # noqa: B023
            return [g.accumulate() for g in gradients]

        train = tf.function(train)
        graph = train.get_concrete_function(X).graph
        assert all(isinstance(g._outputs, Stacked) for g in seen)
        call = next(op for op in graph.get_operations() if "PartitionedCall" in op.type)
        counts.append(len(call.outputs))
    assert counts[0] == counts[1] == counts[2]


def test_gradients_go_into_another_step_by_microbatch(smp_init):
    smp_init({"partitions": 2, "microbatches": 4})
    model = Net()
    model(X)

    @smp.step
    def backward(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    @smp.step
    def plus_gradient(x, gradient):
        return tf.reduce_sum(model(x)) + tf.reduce_sum(gradient)

    @tf.function
    def both(x):
        gradient = backward(x)[0]
        return gradient.stack(), plus_gradient(x, gradient).stack(), backward(x)[0].stack()

    gradients, sums, again = both(X)
    plain = [tf.reduce_sum(model(rows)) for rows in np.split(X, 4)]
    expected = [a + tf.reduce_sum(b) for a, b in zip(plain, gradients, strict=True)]
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert np.array_equal(gradients, again)


def test_what_the_trace_needed_is_freed(smp_init):
    """The traced model and the graphs of the emitted functions, which TensorFlow would keep."""
    backward = made_step(smp_init, 4)
    gc.collect()
    before = {id(each) for each in function_graphs()}
    train = tf.function(lambda x: [g.accumulate() for g in backward(x)])
    train(X)
    names = [each.name for each in function_graphs() if id(each) not in before]
    assert sorted(names) == ["<lambda>", "smp_step_backward"]
    assert np.array_equal(train(X)[0], train(X)[0])


def function_graphs():
    return [each for each in gc.get_objects() if isinstance(each, tf.__internal__.FuncGraph)]
