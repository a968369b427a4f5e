from __future__ import annotations

import threading

import keras
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace import partition_tags
from opensmp.errors import PartitionError


def test_operations_made_inside_are_marked_and_the_innermost_mark_wins():
    graph = _private.new_graph("tags")
    with graph.as_default(), partition_tags.tracing_into(graph):
        x = tf.constant(1.0)
        with partition_tags.tag(1):
            y = x + 1.0
            with partition_tags.tag(2):
                z = y + 1.0
            w = z + 1.0
    assert [_private.tag_of(t.op) for t in (x, y, z, w)] == [None, 1, 2, 1]


def test_operations_of_another_graph_are_not_marked():
    graph, other = _private.new_graph("tags"), _private.new_graph("other")
    with (
        graph.as_default(),
        partition_tags.tracing_into(graph),
        partition_tags.tag(1),
        other.as_default(),
    ):
        x = tf.constant(1.0)
    assert _private.tag_of(x.op) is None


def test_a_loop_takes_the_mark_as_a_whole():
    graph = _private.new_graph("tags")
    with graph.as_default(), partition_tags.tracing_into(graph), partition_tags.tag(1):
        tf.while_loop(lambda i: i < 3, lambda i: [i + 1], [tf.constant(0)])
    loop = next(op for op in graph.get_operations() if "While" in op.type)
    assert _private.tag_of(loop) == 1


def test_a_mark_inside_a_body_is_refused():
    graph = _private.new_graph("tags")

    def body(i):
        with partition_tags.tag(1):
            return [i + 1]

    with (
        graph.as_default(),
        partition_tags.tracing_into(graph),
        pytest.raises(PartitionError, match="inside a loop body"),
    ):
        tf.while_loop(lambda i: i < 3, body, [tf.constant(0)])


def test_the_graph_being_traced_is_known_inside_only_and_on_this_thread_only():
    outer, inner = _private.new_graph("outer"), _private.new_graph("inner")
    seen = []
    assert partition_tags.traced_graph() is None
    with partition_tags.tracing_into(outer):
        with partition_tags.tracing_into(inner):
            assert partition_tags.traced_graph() is inner
        assert partition_tags.traced_graph() is outer
        thread = threading.Thread(target=lambda: seen.append(partition_tags.traced_graph()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert partition_tags.traced_graph() is None


def test_marks_on_a_functional_graph_follow_its_nodes_into_the_trace():
    shared = keras.layers.Rescaling(2.0)
    inputs = keras.Input([1])
    with partition_tags.tag(1):
        x = shared(inputs)
        with partition_tags.tag(2):
            x = shared(x)
    model = keras.Model(inputs, shared(x))
    graph = _private.new_graph("tags")
    with graph.as_default(), partition_tags.tracing_into(graph):
        model(tf.compat.v1.placeholder(tf.float32, [1, 1]))
    marks = [_private.tag_of(op) for op in graph.get_operations() if op.type == "Mul"]
    assert marks == [1, 2, None]


def test_a_mark_around_the_call_of_a_model_counts_where_its_nodes_have_none():
    inputs = keras.Input([1])
    with partition_tags.tag(1):
        x = keras.layers.Rescaling(2.0)(inputs)
    model = keras.Model(inputs, keras.layers.Rescaling(3.0)(x))
    graph = _private.new_graph("tags")
    with graph.as_default(), partition_tags.tracing_into(graph), partition_tags.tag(0):
        model(tf.compat.v1.placeholder(tf.float32, [1, 1]))
    marks = [_private.tag_of(op) for op in graph.get_operations() if op.type == "Mul"]
    assert marks == [1, 0]
