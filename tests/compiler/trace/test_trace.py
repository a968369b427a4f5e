from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import traced

from opensmp import _private
from opensmp.compiler.trace.structure import Structure
from opensmp.compiler.trace.trace import call_inputs, call_signature
from opensmp.errors import TraceError

X = tf.constant([[1.0, 2.0]])


def test_everything_is_explicit():
    dense = keras.layers.Dense(3)
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(["a"], [1.0]), default_value=0.0
    )
    offset = tf.constant([5.0])

    def call(x, words, training):
        assert training is True
        return {"y": dense(x) + table.lookup(words) + offset}

    graph = traced(call, X, tf.constant(["a"]), training=True)
    assert [t.dtype for t in graph.inputs] == [tf.float32, tf.string]
    assert [v.variable for v in graph.variables] == [dense.kernel, dense.bias]
    assert list(graph.new_variables) == [dense.kernel, dense.bias]
    assert any(outer is offset for outer, _ in graph.captures)
    assert any(outer.dtype == tf.resource for outer, _ in graph.captures)
    assert graph.output_structure.pack(["packed"]) == {"y": "packed"}
    assert len(graph.sources) == 2 + 2 + len(graph.captures)
    assert graph.updates == ()


def test_operations_are_in_topological_order():
    graph = traced(keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()]), X)
    seen = set()
    for op in graph.operations:
        assert all(t.op in seen for t in op.inputs)
        assert all(c in seen for c in op.control_inputs)
        seen.add(op)


def test_every_output_has_an_operation_of_its_own_on_the_partition_of_its_maker():
    def call(x):
        with _private.tagged(tf.compat.v1.get_default_graph(), 1):
            y = x + 1.0
        return x, y, y

    graph = traced(call, X)
    assert len({id(t.op) for t in graph.outputs}) == 3
    assert [t.op.type for t in graph.outputs] == ["Identity"] * 3
    assert [_private.tag_of(t.op) for t in graph.outputs] == [None, 1, 1]


def test_state_is_an_output():
    norm = keras.layers.BatchNormalization()
    norm.build([None, 2])
    graph = traced(norm, X, training=True)
    assert {id(v) for v, _ in graph.updates} == {id(norm.moving_mean), id(norm.moving_variance)}
    assert all(value.graph is graph.graph for _, value in graph.updates)
    assert all(any(value is t for t in graph.results) for _, value in graph.updates)
    assert norm.moving_mean.numpy().tolist() == [0.0, 0.0]
    assert traced(norm, X, training=False).updates == ()


def test_the_seed_of_dropout_is_state():
    dropout = keras.layers.Dropout(0.5, seed=1)
    graph = traced(dropout, X, training=True)
    ((variable, _),) = graph.updates
    assert variable is dropout.seed_generator.state


def test_losses_of_layers_are_results():
    layer = keras.layers.ActivityRegularization(l2=0.5)
    graph = traced(layer, X)
    (loss,) = graph.losses
    assert loss.shape == ()
    assert any(t is loss for t in graph.results)


def test_masks_travel_with_outputs_and_inputs():
    embed = keras.layers.Embedding(3, 2, mask_zero=True)
    graph = traced(embed, tf.constant([[1, 0]]))
    (mask,) = graph.masks
    assert mask.dtype == tf.bool
    x = tf.ones([1, 2, 2])
    _private.set_mask(x, tf.constant([[True, False]]))
    graph = traced(keras.layers.GlobalAveragePooling1D(), x)
    assert [t.dtype for t in graph.inputs] == [tf.float32, tf.bool]


def test_spans_tell_which_layer_made_what():
    first, second = keras.layers.Dense(2), keras.layers.Dense(2)
    model = keras.Sequential([first, second])
    model.build((None, 2))
    graph = traced(model, X)
    assert [s.layer for s in graph.spans] == [model, first, second]


def test_an_unknown_batch_stays_unknown():
    found = []

    @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    def run(x):
        found.append(traced(keras.layers.Rescaling(2.0), x))
        return x

    run(X)
    assert found[0].inputs[0].shape.as_list() == [None, 2]
    assert found[0].outputs[0].shape.as_list() == [None, 2]


def test_tensors_that_are_made_in_build_serve_all_traces():
    class Positions(keras.layers.Layer):
        def build(self, shape):
            self.positions = tf.range(shape[-1])

        def call(self, x):
            return x + tf.cast(self.positions, x.dtype)

    layer = Positions()
    for rows in (1, 2):
        graph = traced(layer, tf.zeros([rows, 2]))
        assert any(outer is layer.positions for outer, _ in graph.captures)


def test_a_second_trace_makes_no_new_variables():
    dense = keras.layers.Dense(3)
    assert len(traced(dense, X).new_variables) == 2
    assert traced(dense, X).new_variables == ()


def test_stateful_operations_keep_their_order():
    def call(x):
        tf.print("first")
        tf.print("second")
        return x

    graph = traced(call, X)
    first, second = (op for op in graph.operations if op.type == "PrintV2")
    assert first in second.control_inputs


@pytest.mark.parametrize("what", ["an output", "a loss"])
def test_a_tensor_that_never_left_a_body_is_refused(what):
    layer = keras.layers.Layer()

    def call(x):
        kept = []

        def body(i, y):
            kept.append(tf.reduce_sum(y))
            return i + 1, y

        y = tf.while_loop(lambda i, y: i < 2, body, [0, x])[1]
        if what == "a loss":
            layer.add_loss(kept[0])
            return y
        return kept[0]

    with pytest.raises(TraceError, match=f"The model returns {what}, .*never returned from it"):
        traced(call, X)


def test_signatures_tell_apart_what_needs_another_trace():
    masked = tf.ones([1, 2, 2])
    _private.set_mask(masked, tf.constant([[True, False]]))
    calls = [Structure.of(((x,), {})) for x in (X, tf.zeros([1, 2]), tf.ones([1, 2, 2]), masked)]
    one, same, other, with_mask = (call_signature(call) for call in calls)
    assert one == same
    assert len({one, other, with_mask}) == 3
    assert len(call_inputs(calls[3])) == 2


def test_a_trace_is_printed_with_its_sizes():
    dense = keras.layers.Dense(3)
    text = str(traced(dense, X))
    assert text.startswith("model: ")
    assert "1 inputs, 2 variables, 0 updated, 1 outputs" in text


def test_arrays_are_inputs():
    graph = traced(lambda x: x + 1.0, np.ones([2, 3], "float32"))
    assert [t.shape.as_list() for t in graph.inputs] == [[2, 3]]


def test_a_tensor_of_the_graph_around_that_the_call_reads_by_itself_is_refused():
    @tf.function
    def around(x):
        mean = tf.reduce_mean(x, name="mean_of_x")
        return traced(lambda x: x * mean, x)

    with pytest.raises(TraceError, match=r"reads tensor 'mean_of_x:0'.*Pass it to the call"):
        around(X)
