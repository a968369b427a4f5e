from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import in_partition, planned, traced

from opensmp.compiler.lowering.extraction import Extractor
from opensmp.compiler.lowering.gradients import (
    SegmentGradient,
    components,
    differentiate,
    reached_from,
    residuals,
)
from opensmp.compiler.lowering.segments import cut
from opensmp.compiler.trace.differentiable import is_differentiable

X = tf.constant([[1.0, 2.0, 3.0]])


def one_segment(call, *args):
    graph, plan = planned(call, *args, partitions=1)
    (segment,) = cut(graph, plan)
    return graph, segment


def gradient_of(call, *args):
    """Graph, segment and gradient of all outputs with respect to all inputs and variables."""
    graph, segment = one_segment(call, *args)
    wrt = [t for t in (*segment.inputs, *segment.variables) if is_differentiable(t)]
    return graph, segment, differentiate(graph, segment, segment.outputs, wrt)


class TestDifferentiate:
    def test_it_gives_the_gradient_for_an_upstream_gradient(self):
        graph, segment, gradient = gradient_of(tf.square, X)
        feeds = [*segment.inputs, *gradient.upstream]
        function = Extractor(graph.graph, graph.captures).function("B", feeds, gradient.flat)
        np.testing.assert_allclose(function(X, tf.ones([1, 3]) * 10.0)[0], 20.0 * X)

    def test_only_the_segment_is_differentiated(self):
        def call(x):
            return in_partition(1, tf.square, in_partition(0, tf.exp, x))

        graph, plan = planned(call, X)
        _, second = cut(graph, plan)
        gradient = differentiate(graph, second, second.outputs, second.inputs)
        feeds = [*second.inputs, *gradient.upstream]
        function = Extractor(graph.graph, graph.captures).function("B", feeds, gradient.flat)
        np.testing.assert_allclose(function(X, tf.ones([1, 3]))[0], 2.0 * X)
        assert not any(op.type == "Exp" for op in function.graph.get_operations())

    def test_what_is_not_connected_has_no_gradient(self):
        idle = keras.Variable(1.0)

        def call(x):
            return tf.stop_gradient(x * tf.convert_to_tensor(idle)) + x

        _, segment, gradient = gradient_of(call, X)
        found = dict(zip(map(id, gradient.wrt), gradient.gradients, strict=True))
        assert found[id(segment.variables[0])] is None
        assert found[id(segment.inputs[0])] is not None

    def test_a_lookup_has_a_sparse_gradient(self):
        table = keras.Variable(np.ones([5, 2], "float32"))
        _, _, gradient = gradient_of(
            lambda i: tf.gather(tf.convert_to_tensor(table), i), tf.constant([1, 1])
        )
        (found,) = gradient.gradients
        assert isinstance(found, tf.IndexedSlices)
        assert len(gradient.flat) == 3
        (packed,) = gradient.pack(["values", "indices", "shape"])
        assert packed.values == "values"
        assert packed.indices == "indices"

    def test_nothing_asked_is_nothing_found(self):
        graph, segment = one_segment(tf.square, X)
        gradient = differentiate(graph, segment, [], [])
        assert gradient.flat == ()
        assert differentiate(graph, segment, [], segment.inputs).gradients == (None,)


class TestPack:
    def test_components_of_each_kind_of_gradient(self):
        x = tf.ones([2])
        slices = tf.IndexedSlices(x, tf.constant([0, 1]))
        assert components(None) == []
        assert components(x)[0] is x
        assert len(components(slices)) == 2

    def test_tensors_are_packed_in_the_structure_of_the_gradients(self):
        x = tf.ones([2])
        slices = tf.IndexedSlices(x, tf.constant([0, 1]), tf.constant([4]))
        gradient = SegmentGradient((), (), (x, x, x), (None, slices, x))
        nothing, sparse, dense = gradient.pack(["a", "b", "c", "d"])
        assert nothing is None
        assert (sparse.values, sparse.indices, sparse.dense_shape) == ("a", "b", "c")
        assert dense == "d"


class TestReachedFrom:
    def test_numbers_carry_gradients_and_integers_do_not(self):
        def call(x):
            return tf.cast(tf.cast(x, tf.int32), tf.float32), tf.exp(x)

        graph = traced(call, X)
        reached = {op.type for op in reached_from(graph, graph.inputs)}
        assert "Exp" in reached
        assert [op for op in reached_from(graph, graph.inputs) if op.type == "Cast"] == [
            next(op for op in graph.operations if op.type == "Cast")
        ]

    def test_only_what_lies_behind_the_leaves(self):
        graph = traced(lambda x, y: (tf.exp(x), tf.sin(y)), X, X)
        reached = {op.type for op in reached_from(graph, graph.inputs[:1])}
        assert "Exp" in reached
        assert "Sin" not in reached

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [(tf.float16, True), (tf.complex64, True), (tf.int32, False), (tf.string, False)],
    )
    def test_dtypes(self, dtype, expected):
        assert is_differentiable(tf.zeros([1], dtype)) is expected


class TestResiduals:
    def kept(self, call, *args):
        graph, segment, gradient = gradient_of(call, *args)
        return [t.op.type for t in residuals(graph, segment, gradient)]

    def test_activations_that_the_gradient_reads_are_kept(self):
        assert self.kept(lambda x: tf.sin(tf.tanh(x)), X) == ["Tanh"]

    def test_inputs_and_variables_are_there_anyway(self):
        weight = keras.Variable(np.ones([3, 2], "float32"))
        assert self.kept(lambda x: x @ tf.convert_to_tensor(weight), X) == []

    def test_what_depends_on_weights_alone_is_made_again(self):
        weight = keras.Variable(np.ones([3, 2], "float32"))

        def call(x):
            return x @ tf.tanh(tf.convert_to_tensor(weight))

        assert self.kept(call, X) == []

    def test_random_numbers_are_kept(self):
        def call(x):
            return x * tf.random.normal([3])

        assert len(self.kept(call, X)) == 1

    def test_a_shape_is_kept_instead_of_the_activation_it_comes_from(self):
        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def run(x):
            found.extend(self.kept(lambda x: tf.reduce_sum(tf.tanh(x) * 2.0, 0), x))
            return x

        found: list[str] = []
        run(X)
        assert "Tanh" in found  # its own gradient needs its result
        assert set(found) <= {"Tanh", "Shape"}
