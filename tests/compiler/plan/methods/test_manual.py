from __future__ import annotations

import keras
import tensorflow as tf
from small import in_partition, traced

from opensmp.compiler.plan.methods.manual import manual_plan

X = tf.ones([2, 3])


def test_operations_go_where_they_were_marked_and_the_others_to_the_default():
    def call(x):
        x = tf.tanh(x)
        x = in_partition(1, tf.exp, x)
        return tf.sin(x)

    graph = traced(call, X)
    plan = manual_plan(graph, num_partitions=3, default_partition=2)
    where = {op.type: plan.partition(op) for op in graph.operations if op not in graph.sources}
    assert [where[kind] for kind in ("Tanh", "Exp", "Sin")] == [2, 1, 2]
    assert plan.empty == (0,)
    assert plan.source == "manual"


def test_inputs_variables_and_captures_have_no_partition():
    dense, offset = keras.layers.Dense(3), tf.constant([1.0])
    graph = traced(lambda x: in_partition(1, dense, x) + offset, X)
    plan = manual_plan(graph, num_partitions=2, default_partition=0)
    assert set(plan.partition_of) == {op.name for op in graph.operations if op not in graph.sources}
    assert sum(plan.sizes) == len(plan.partition_of)
