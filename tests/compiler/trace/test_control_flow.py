from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from small import traced

from opensmp.compiler.trace.control_flow import LOOPS, bodies, trip_count

X = tf.ones([2, 3])


def loops(graph):
    return [op for op in graph.operations if op.type in LOOPS]


def trips(function, *args, unknown_size=32):
    (loop,) = loops(traced(function, *args))
    return trip_count(loop, unknown_size)


def repeat(condition, step, start=0, **kwargs):
    def call(x):
        return tf.while_loop(
            lambda i, _: condition(i), lambda i, x: (step(i), x * 2.0), [start, x], **kwargs
        )[1]

    return call


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (repeat(lambda i: i < 5, lambda i: i + 1), 5),
        (repeat(lambda i: i <= 5, lambda i: i + 1), 6),
        (repeat(lambda i: i < 10, lambda i: i + 3), 4),
        (repeat(lambda i: i < 10, lambda i: i + 1, start=4), 6),
        (repeat(lambda i: i < 3, lambda i: i + 1, start=7), 0),
        (repeat(lambda i: tf.logical_and(i < 9, i < 4), lambda i: i + 1), 4),
        (repeat(lambda i: i < 10, lambda i: i + 1, maximum_iterations=3), 3),
        (repeat(lambda i: i < 2, lambda i: i + 1, maximum_iterations=3), 2),
    ],
)
def test_iterations_of_a_counted_loop(function, count):
    assert trips(function, X) == count


def test_a_bound_that_the_loop_is_given_counts():
    def call(x):
        return tf.while_loop(lambda i, n, _: i < n, lambda i, n, x: (i + 1, n, x + 1.0), [0, 8, x])[
            2
        ]

    assert trips(call, X) == 8


def test_a_loop_of_unknown_length_counts_once():
    assert (
        trips(
            lambda x: tf.while_loop(lambda x: tf.reduce_sum(x) < 9.0, lambda x: [x * 2.0], [x]), X
        )
        == 1
    )


@pytest.mark.parametrize("layer", [keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN])
def test_a_recurrent_layer_runs_once_for_each_step_of_the_sequence(layer):
    assert trips(layer(4), tf.ones([2, 11, 3])) == 11


def test_a_sequence_of_unknown_length_has_the_given_one():
    def call(x):
        taken = tf.TensorArray(tf.float32, size=tf.shape(x)[0]).unstack(x)
        return tf.while_loop(
            lambda i, y: tf.reduce_sum(y) < 9.0,
            lambda i, y: (i + 1, y + taken.read(i)),
            [0, tf.zeros([3])],
        )[1]

    found = []

    @tf.function(input_signature=[tf.TensorSpec([None, 3])], autograph=False)
    def run(x):
        found.append(trips(call, x, unknown_size=6))
        return x

    run.get_concrete_function()
    assert found == [6]


def test_branches_and_calls():
    @tf.function(autograph=False)
    def inner(x):
        return tf.tanh(x)

    def call(x):
        x = tf.cond(tf.reduce_sum(x) > 0, lambda: tf.exp(x), lambda: tf.sin(x))
        return inner(x)

    graph = traced(call, X)
    found = {op.type: bodies(op, 1) for op in graph.operations}
    branch, call = found["StatelessIf"], found["PartitionedCall"]
    assert (len(branch.graphs), branch.skip, branch.trips) == (2, 1, 1)
    assert (len(call.graphs), call.skip, call.trips) == (1, 0, 1)
    assert found["Exp"] is None if "Exp" in found else found["Sum"] is None
