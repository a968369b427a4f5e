from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from small import in_partition, planned, run_forward, values_of

from opensmp.compiler.lowering.program import Program

X = tf.random.stateless_normal([5, 3], seed=[1, 2])


def lowered(model, split):
    traced, plan = planned(model, X)
    required = [v.placeholder for v in traced.variables]
    return traced, Program(traced, plan, required=required, split_backward=split)


def dense_pair():
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(3, activation="tanh")
    second = [keras.layers.Dense(4, activation="gelu"), keras.layers.Dense(2)]
    first.build((None, X.shape[1]))
    second[0].build((None, 3))
    second[1].build((None, 4))

    def tail(x):
        return second[1](second[0](x))

    return lambda x: in_partition(1, tail, in_partition(0, first, x))


def gradients_of(program, traced, values, segment):
    """Gradients by id of what they are of, the kinds of calls, and all values."""
    upstream = {id(t): tf.ones_like(values[id(t)]) for t in segment.outputs}
    half = program.backward(segment, segment.outputs)
    found, calls = {}, []
    pairs = zip(half.gradient.upstream, half.gradient.outputs, strict=True)
    values = values | {id(p): upstream[id(t)] for p, t in pairs}
    while half is not None:
        results = half.function(*(values[id(t)] for t in half.feeds))
        size = len(half.gradient.flat)
        values.update({id(t): r for t, r in zip(half.handed, results[size:], strict=True)})
        packed = half.gradient.pack(results[:size])
        found.update({id(t): g for t, g in zip(half.gradient.wrt, packed, strict=True)})
        calls.append([t.op.type for t in half.function.graph.outputs])
        half = half.weights
    return found, calls


def test_halves_compute_what_the_whole_computes():
    model = dense_pair()
    found = []
    for split in (False, True):
        traced, program = lowered(model, split)
        values = run_forward(program, values_of(traced, X))
        segment = program.segments[1]
        gradients, calls = gradients_of(program, traced, values, segment)
        leaves = (*segment.inputs, *segment.variables)
        found.append([gradients[id(t)].numpy() for t in leaves])
        assert len(calls) == 1 + split
    for whole, halved in zip(*found, strict=True):
        np.testing.assert_array_equal(whole, halved)


def test_the_first_half_has_no_product_with_respect_to_weights():
    _, program = lowered(dense_pair(), True)
    segment = program.segments[1]
    first = program.backward(segment, segment.outputs)
    products = [
        sum(op.type == "MatMul" for op in half.function.graph.get_operations())
        for half in (first, first.weights)
    ]
    # Two layers: a product with respect to the inputs of each, one with respect to its kernel.
    assert products == [2, 2]
    assert set(map(id, first.gradient.wrt)) == set(map(id, segment.inputs))
    assert set(map(id, first.weights.gradient.wrt)) == set(map(id, segment.variables))


def test_what_depends_on_weights_alone_is_not_handed_on():
    _, program = lowered(dense_pair(), True)
    segment = program.segments[1]
    first = program.backward(segment, segment.outputs)
    assert first.handed
    batch = X.shape[0]
    assert all(t.shape[0] == batch for t in first.handed if t.shape.rank)


def test_a_segment_whose_inputs_need_no_gradient_is_not_split():
    _, program = lowered(dense_pair(), True)
    segment = program.segments[0]
    assert program.backward(segment, segment.outputs).weights is None


def test_a_segment_without_weights_is_not_split():
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(3)
    dense.build((None, X.shape[1]))
    _, program = lowered(lambda x: in_partition(1, tf.nn.softmax, in_partition(0, dense, x)), True)
    segment = program.segments[1]
    assert program.backward(segment, segment.outputs).weights is None
