from __future__ import annotations

import keras
import tensorflow as tf

from opensmp.compiler.trace.intermediate_outputs import cuts, taps
from opensmp.compiler.trace.trace import trace

X = tf.ones([2, 3])


def traced(call):
    return trace(call, [X], {}, name="taps")


def found(call):
    graph = traced(call)
    inside = taps(graph)
    return [inside[id(t)].op.type if id(t) in inside else None for t in graph.outputs]


def test_an_output_that_another_is_computed_from():
    def call(x):
        h = tf.tanh(x)
        return {"inside": h, "result": tf.exp(h * 2.0)}

    assert found(call) == ["Tanh", None]
    assert {(a.type, b.type) for a, b in cuts(traced(call))} == {("Tanh", "Mul")}


def test_outputs_beside_each_other():
    assert found(lambda x: [tf.tanh(x), tf.exp(x)]) == [None, None]


def test_what_leads_to_no_result():
    def call(x):
        h = tf.tanh(x)
        tf.exp(h)
        return h

    assert found(call) == [None]


def test_the_same_output_twice():
    def call(x):
        h = tf.tanh(x)
        return [h, h, tf.exp(h)]

    assert found(call) == ["Tanh", "Tanh", None]


def test_an_input_and_integers():
    def call(x):
        ranks = tf.argsort(x)
        return [x, ranks, tf.cast(ranks, tf.float32) + x]

    assert found(call) == [None, None, None]


def test_a_loss_that_a_layer_adds():
    layer = keras.layers.ActivityRegularization(l2=0.1)
    assert found(lambda x: layer(tf.tanh(x))) == ["Tanh"]
