from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import in_partition, planned, run_forward, types, values_of

from opensmp.compiler.lowering.program import Program

NUM_MICROBATCHES = 3
ROWS = 2


def parts(x):
    return tf.split(x, NUM_MICROBATCHES)


def lowered(model, x):
    traced, plan = planned(model, parts(x)[0])
    variables = [v.placeholder for v in traced.variables]
    return traced, Program(traced, plan, required=variables, split_backward=True, joins=True)


def second_half(program, traced, x, segment):
    """The second half of a segment's backward pass, and its arguments and results for a part."""
    values = run_forward(program, values_of(traced, x))
    first = program.backward(segment, segment.outputs)
    pairs = zip(first.gradient.upstream, first.gradient.outputs, strict=True)
    values |= {id(p): tf.ones_like(values[id(t)]) for p, t in pairs}
    results = first.function(*(values[id(t)] for t in first.feeds))
    size = len(first.gradient.flat)
    values |= {id(t): r for t, r in zip(first.handed, results[size:], strict=True)}
    args = [values[id(t)] for t in first.weights.feeds]
    return first.weights, args, first.weights.gradient.pack(first.weights.function(*args))


def joined(program, traced, x, segment):
    """Gradients of all parts at once, those of each part, and the function."""
    found = [second_half(program, traced, part, segment) for part in parts(x)]
    weights = found[0][0]
    variables = {id(t) for t in segment.variables}
    is_shared = [id(t) in variables for t in weights.feeds]
    columns = zip(*(args for _, args, _ in found), strict=True)
    args = [
        t
        for column, shared in zip(columns, is_shared, strict=True)
        for t in (column[:1] if shared else column)
    ]
    function = program.fused_weight_gradients(weights, is_shared, NUM_MICROBATCHES)
    assert program.fused_weight_gradients(weights, is_shared, NUM_MICROBATCHES) is function
    together = weights.gradient.pack(function(*args))
    return together, [gradients for _, _, gradients in found], function


def assert_sums(together, apart):
    for gradient, *single in zip(together, *apart, strict=True):
        if isinstance(gradient, tf.IndexedSlices):
            for part in ("values", "indices"):
                each = [getattr(g, part).numpy() for g in single]
                np.testing.assert_array_equal(getattr(gradient, part), np.concatenate(each))
            np.testing.assert_array_equal(gradient.dense_shape, single[0].dense_shape)
        else:
            total = sum(g.numpy() for g in single)
            np.testing.assert_allclose(gradient, total, rtol=1e-5, atol=1e-5)


@pytest.fixture
def wide():
    """Two dense layers in two partitions, of many more units than there are rows."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(24, activation="gelu"), keras.layers.Dense(16, activation="tanh")]
    layers[0].build((None, 20))
    layers[1].build((None, 24))
    x = tf.random.stateless_normal([NUM_MICROBATCHES * ROWS, 20], seed=[1, 2])
    model = lambda x: in_partition(1, layers[1], in_partition(0, layers[0], x))  # noqa: E731
    return lowered(model, x), x


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradients_of_several_microbatches_at_once_are_their_sum(wide, index):
    (traced, program), x = wide
    together, apart, function = joined(program, traced, x, program.segments[index])
    assert_sums(together, apart)
    assert types(function).count("MatMul") == 1  # and not one a microbatch


def test_where_nobody_waits_for_the_first_half_the_products_alone_are_the_second(wide):
    (_, program), _ = wide
    segment = program.segments[0]
    first = program.backward(segment, segment.outputs)
    shapes = [[tuple(t.shape) for t in half.gradient.wrt] for half in (first, first.weights)]
    assert shapes == [[(24,)], [(20, 24)]]
    assert first.handed
    assert program.is_worth_joining(first.weights)


def test_all_other_gradients_are_added_up_or_put_below_each_other():
    keras.utils.set_random_seed(0)
    embedding, scale = keras.layers.Embedding(7, 6), keras.layers.Dense(6)
    norm, conv = keras.layers.LayerNormalization(), keras.layers.Conv1D(4, 3)
    embedding.build((None, 5))
    scale.build((None, 5, 6))
    norm.build((None, 5, 6))
    conv.build((None, 5, 6))

    def head(x):
        return scale(x)

    def tail(x):
        indices = tf.cast(tf.math.floormod(tf.abs(x[..., 0]) * 10.0, 7.0), tf.int32)
        return conv(norm(x) + tf.gather(tf.convert_to_tensor(embedding.embeddings), indices))

    x = tf.random.stateless_normal([NUM_MICROBATCHES * ROWS, 5, 6], seed=[1, 2])
    traced, program = lowered(lambda x: in_partition(1, tail, in_partition(0, head, x)), x)
    together, apart, _ = joined(program, traced, x, program.segments[1])
    assert any(isinstance(gradient, tf.IndexedSlices) for gradient in together)
    assert_sums(together, apart)
    first = program.backward(program.segments[1], program.segments[1].outputs)
    assert not program.is_worth_joining(first.weights)


def test_with_many_rows_nothing_is_worth_joining():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8), keras.layers.Dense(8)]
    for layer in layers:
        layer.build((None, 8))
    x = tf.ones([NUM_MICROBATCHES * 8, 8])
    _, program = lowered(lambda x: in_partition(1, layers[1], in_partition(0, layers[0], x)), x)
    last, first = program.segments[1], program.segments[0]
    assert not program.is_worth_joining(program.backward(last, last.outputs).weights)
    assert program.backward(first, first.outputs).weights is None
