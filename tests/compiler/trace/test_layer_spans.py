from __future__ import annotations

import keras
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.layer_spans import LayerSpan, recorded_spans


def record(call, x):
    """The spans of the layer calls of `call(x)` in a new graph, and the graph."""
    graph = _private.new_graph("spans")
    with graph.as_default(), recorded_spans(graph) as spans:
        call(tf.compat.v1.placeholder(x.dtype, x.shape))
    return spans, graph.get_operations()


def test_a_span_holds_the_operations_of_its_layer():
    first, second = keras.layers.Dense(2, name="first"), keras.layers.Dense(3, name="second")
    model = keras.Sequential([first, second], name="model")
    x = tf.ones([1, 2])
    model(x)
    spans, operations = record(model, x)
    assert [(s.layer, s.depth) for s in spans] == [(model, 0), (first, 1), (second, 1)]
    whole, one, two = spans
    assert whole.start <= one.start < one.stop <= two.start < two.stop <= whole.stop
    for span in (one, two):
        kinds = [op.type for op in operations[span.start : span.stop]]
        assert kinds.count("MatMul") == 1


def test_a_layer_that_is_called_twice_has_two_spans():
    shared = keras.layers.Dense(2)
    x = tf.ones([1, 2])
    shared(x)
    spans, _ = record(lambda x: shared(shared(x)), x)
    assert [s.layer for s in spans] == [shared, shared]
    assert spans[0].stop <= spans[1].start


def test_calls_inside_a_loop_belong_to_the_loop():
    inner = keras.layers.Dense(2)
    x = tf.ones([1, 2])
    inner(x)

    class Loops(keras.layers.Layer):
        def call(self, x):
            return tf.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, inner(y)), [0, x])[1]

    loops = Loops()
    spans, operations = record(loops, x)
    (span,) = spans
    assert span.layer is loops
    assert any("While" in op.type for op in operations[span.start : span.stop])


def test_a_call_that_fails_ends_its_span():
    class Fails(keras.layers.Layer):
        def call(self, x):
            raise KeyError

    def call(x):
        try:
            Fails()(x)
        except KeyError:
            return keras.layers.Activation("relu")(x)

    spans, _ = record(call, tf.ones([1, 2]))
    assert [(type(s.layer).__name__, s.depth) for s in spans] == [("Fails", 0), ("Activation", 0)]


def test_nothing_is_recorded_afterwards():
    layer = keras.layers.Activation("relu")
    graph = _private.new_graph("spans")
    with graph.as_default(), recorded_spans(graph) as spans:
        pass
    with graph.as_default():
        layer(tf.constant([1.0]))
    assert spans == []


def test_a_span_is_printed_with_its_depth():
    layer = keras.layers.Activation("relu", name="act")
    assert str(LayerSpan(layer, depth=2, start=3, stop=5)) == "    act[3:5]"
