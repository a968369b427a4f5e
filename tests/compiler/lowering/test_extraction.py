from __future__ import annotations

import numpy as np
import tensorflow as tf
from small import traced, types

from opensmp.compiler.lowering.extraction import Extractor, needed

X = tf.constant([[1.0, 2.0, 3.0]])


def extractor(graph):
    return Extractor(graph.graph, graph.captures)


def by_type(graph, kind):
    return next(op for op in graph.operations if op.type == kind)


class TestNeeded:
    def test_operations_come_after_what_they_read(self):
        graph = traced(lambda x: tf.exp(tf.tanh(x)) + tf.sin(x), X)
        order = needed([graph.outputs[0].op], (), lambda op: False)
        assert order[0].type == "Placeholder"
        for i, op in enumerate(order):
            assert all(t.op in order[:i] for t in op.inputs)

    def test_it_does_not_look_behind_the_stops(self):
        graph = traced(lambda x: tf.exp(tf.tanh(x)), X)
        stop = by_type(graph, "Tanh").outputs[0]
        order = needed([graph.outputs[0].op], {id(stop)}, lambda op: False)
        assert [op.type for op in order] == ["Exp", "Identity"]

    def test_the_order_of_control_edges_is_that_of_names(self):
        """TensorFlow's own order differs from process to process, which must agree."""

        def call(x):
            with tf.control_dependencies([tf.sin(x, name=f"sin_{i}") for i in range(9)]):
                return tf.identity(x)

        graph = traced(call, X)
        order = needed([graph.outputs[0].op], (), lambda op: True)
        names = [op.name for op in order if op.type == "Sin"]
        assert len(names) == 9
        assert names == sorted(names, reverse=True)

    def test_control_edges_are_followed_where_asked(self):
        def call(x):
            with tf.control_dependencies([tf.print("hello")]):
                return tf.identity(x)

        graph = traced(call, X)
        roots = [graph.outputs[0].op]
        without = needed(roots, (), lambda op: False)
        along = needed(roots, (), lambda op: op.type == "PrintV2")
        assert "PrintV2" not in [op.type for op in without]
        assert "PrintV2" in [op.type for op in along]

    def test_deep_graphs_need_no_recursion(self):
        def call(x):
            for _ in range(3000):
                x = tf.raw_ops.Neg(x=x)
            return x

        graph = traced(call, X)
        assert len(needed([graph.outputs[0].op], (), lambda op: False)) == 3002


class TestExtractor:
    def test_a_part_is_a_function_from_feeds_to_fetches(self):
        graph = traced(lambda x: tf.exp(tf.tanh(x)), X)
        middle = by_type(graph, "Tanh").outputs[0]
        first = extractor(graph).function("first", graph.inputs, [middle])
        second = extractor(graph).function("second", [middle], graph.outputs)
        np.testing.assert_allclose(second(first(X)[0])[0], tf.exp(tf.tanh(X)))
        assert "Exp" not in types(first)
        assert "Tanh" not in types(second)

    def test_arguments_and_results_keep_their_order(self):
        graph = traced(lambda x, y: (x - y, y * 2.0), X, X)
        x, y = graph.inputs
        function = extractor(graph).function("f", [y, x], [graph.outputs[1], graph.outputs[0], y])
        two, minus, same = function(2.0 * X, 5.0 * X)
        np.testing.assert_allclose([two, minus, same], [4.0 * X, 3.0 * X, 2.0 * X])

    def test_captured_tensors_are_captured_again(self):
        offset = tf.constant([[10.0, 20.0, 30.0]])
        graph = traced(lambda x: tf.raw_ops.AddV2(x=x, y=offset), X)
        function = extractor(graph).function("f", graph.inputs, graph.outputs)
        assert function.captured_inputs[0] is offset
        np.testing.assert_allclose(function(X)[0], X + offset)

    def test_loops_branches_and_functions_come_along(self):
        @tf.function
        def helper(x):
            return tf.cond(tf.reduce_sum(x) > 0.0, lambda: x * 2.0, lambda: x)

        def call(x):
            return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, helper(y)), [0, x])[1]

        graph = traced(call, X)
        function = extractor(graph).function("f", graph.inputs, graph.outputs)
        np.testing.assert_allclose(function(X)[0], 8.0 * X)

    def test_what_must_run_is_kept_and_has_a_result_to_hold_on_to(self, capfd):
        def call(x):
            tf.print("side effect")
            return x + 1.0

        graph = traced(call, X)
        effect = by_type(graph, "PrintV2")
        cut = extractor(graph)
        plain = cut.function("plain", graph.inputs, graph.outputs)
        keeping = cut.function(
            "keeping", graph.inputs, graph.outputs, must_run=[effect], control=[effect]
        )
        assert "PrintV2" not in types(plain)
        y, done = keeping(X)
        np.testing.assert_allclose(y, X + 1.0)
        assert int(done) == 0
        assert capfd.readouterr().err == "side effect\n"

    def test_gradients_that_were_added_later_can_be_cut_out(self):
        graph = traced(lambda x: tf.reduce_sum(tf.square(x)), X)
        cut = extractor(graph)
        cut.function("f", graph.inputs, graph.outputs)
        with graph.graph.as_default():
            (gradient,) = tf.gradients(graph.outputs[0], graph.inputs[0])
        function = cut.function("g", graph.inputs, [gradient])
        np.testing.assert_allclose(function(X)[0], 2.0 * X)

    def test_marks_and_devices_of_the_trace_stay_behind(self):
        def call(x):
            with tf.device("CPU:3"):
                return tf.tanh(x)

        graph = traced(call, X)
        function = extractor(graph).function("f", graph.inputs, graph.outputs)
        tanh = next(op for op in function.graph.get_operations() if op.type == "Tanh")
        assert not any(name.startswith("_smp") for name in tanh.node_def.attr)
        assert types(function).count("Tanh") == 1

    def test_equal_constants_are_one(self):
        def call(x):
            same = [tf.constant([2.0, 2.0, 2.0]) for _ in range(3)]
            other = [tf.constant([3.0, 3.0, 3.0]), tf.constant([2, 2, 2])]
            return x * same[0] + same[1] - same[2] * other[0] + tf.cast(other[1], x.dtype)

        graph = traced(call, X)
        function = extractor(graph).function("f", graph.inputs, graph.outputs)
        assert types(function).count("Const") == 3
        np.testing.assert_array_equal(function(X)[0], X * 2.0 + 2.0 - 6.0 + 2.0)

    def test_constants_that_are_results_stay(self):
        graph = traced(lambda x: (tf.constant(2.0), tf.constant(2.0), x * tf.constant(2.0)), X)
        fetches = [by_type(graph, "Mul").outputs[0]]
        fetches += [op.outputs[0] for op in graph.operations if op.type == "Const"]
        assert len(fetches) == 4
        results = extractor(graph).function("f", graph.inputs, fetches)(X)
        np.testing.assert_array_equal(results[0], 2.0 * X)
        assert [float(value) for value in results[1:]] == [2.0, 2.0, 2.0]

    def test_constants_that_others_wait_for_are_waited_for_as_one(self):
        def call(x):
            waits = [tf.raw_ops.Neg(x=tf.constant(1.0)) for _ in range(2)]
            consts = [t.op.inputs[0] for t in waits]
            with tf.control_dependencies(consts):
                return tf.raw_ops.Neg(x=x) + waits[0] + waits[1]

        graph = traced(call, X)
        control = frozenset(graph.operations)
        function = extractor(graph).function("f", graph.inputs, graph.outputs, control=control)
        np.testing.assert_array_equal(function(X)[0], -X - 2.0)
        assert types(function).count("Const") == 1
