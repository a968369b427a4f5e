from __future__ import annotations

import keras
import tensorflow as tf
from small import traced

from opensmp.compiler.trace.shared_ops import replicated

X = tf.ones([2, 3])


def names(graph):
    return {op.type for op in replicated(graph)}


def test_constants_and_what_follows_from_them_alone():
    graph = traced(lambda x: x + tf.cast(tf.constant([1, 2, 3]) * 2, tf.float32), X)
    assert names(graph) == {"Const", "Mul", "Cast"}


def test_nothing_that_depends_on_activations_or_weights():
    dense = keras.layers.Dense(3)
    graph = traced(lambda x: dense(x) + tf.cast(tf.raw_ops.Size(input=x), tf.float32), X)
    assert names(graph) & {"Size", "Cast", "MatMul", "BiasAdd", "AddV2"} == set()


def test_nothing_with_a_side_effect():
    graph = traced(lambda x: x + tf.random.normal([3]), X)
    assert "RandomStandardNormal" not in names(graph)


def test_counters_and_seeds():
    dropout = keras.layers.Dropout(0.5)
    graph = traced(dropout, X, training=True)
    state = next(v.placeholder for v in graph.variables)
    assert any(t is state for op in replicated(graph) for t in op.inputs)
    assert all(not t.dtype.is_floating for op in replicated(graph) for t in op.inputs if t is state)


def test_no_large_state():
    table = tf.Variable(tf.zeros([2000], tf.int32), trainable=False)

    def call(x):
        table.assign_add(tf.ones([2000], tf.int32))
        return x + tf.cast(table[0], tf.float32)

    graph = traced(call, X)
    state = next(v.placeholder for v in graph.variables)
    assert not any(t is state for op in replicated(graph) for t in op.inputs)
