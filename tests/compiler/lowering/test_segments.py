from __future__ import annotations

import keras
import tensorflow as tf
from small import in_partition, planned

from opensmp.compiler.lowering.segments import cut

X = tf.ones([2, 3])


def segments_of(call, *args, partitions=2):
    return cut(*planned(call, *args, partitions=partitions))


def chain(*partitions):
    """A call that applies one operation after another, on these partitions."""

    def call(x):
        for index in partitions:
            x = in_partition(index, tf.tanh, x)
        return x

    return call


def check(segments):
    """What holds for all segments: acyclic, and all that is read is there."""
    made = set()
    for position, segment in enumerate(segments):
        assert segment.index == position
        assert all(earlier < position for earlier in segment.after)
        for tensor in segment.inputs:
            assert tensor.op.type == "Placeholder" or id(tensor) in made
        made |= {id(tensor) for tensor in segment.outputs}


def test_a_chain_is_one_segment_per_stretch_of_equal_partition():
    segments = segments_of(chain(0, 0, 1, 1, 2), X, partitions=3)
    check(segments)
    assert [s.partition for s in segments] == [0, 1, 2]
    assert [[op.type for op in s.operations].count("Tanh") for s in segments] == [2, 2, 1]
    assert [(len(s.inputs), len(s.outputs)) for s in segments] == [(1, 1), (1, 1), (1, 1)]


def test_a_partition_that_is_left_and_entered_again_has_two_segments():
    segments = segments_of(chain(0, 1, 0, 1), X)
    check(segments)
    assert [s.partition for s in segments] == [0, 1, 0, 1]
    assert [s.phase for s in segments] == [0, 1, 2, 3]


def test_branches_of_equal_partition_are_joined():
    def call(x):
        left = in_partition(1, tf.tanh, in_partition(0, tf.sin, x))
        right = in_partition(1, tf.exp, x)
        return in_partition(1, tf.add, left, right)

    segments = segments_of(call, X)
    check(segments)
    assert [s.partition for s in segments] == [0, 1]
    assert {"Tanh", "Exp", "AddV2"} <= {op.type for op in segments[1].operations}


def test_a_path_that_leaves_and_comes_back_keeps_segments_apart():
    def call(x):
        first = in_partition(0, tf.sin, x)
        other = in_partition(1, tf.tanh, first)
        return in_partition(0, tf.add, first, other)

    segments = segments_of(call, X)
    check(segments)
    assert [s.partition for s in segments] == [0, 1, 0]
    first, other, last = segments
    assert len(first.outputs) == 1
    assert len(last.inputs) == 2
    assert len(other.inputs) == 1


def test_a_skip_over_a_partition_is_an_input_of_the_later_segment():
    def call(x):
        first = in_partition(0, tf.sin, x)
        second = in_partition(1, tf.tanh, first)
        return in_partition(2, tf.add, first, second)

    segments = segments_of(call, X, partitions=3)
    check(segments)
    assert [len(s.inputs) for s in segments] == [1, 1, 2]


def test_constants_are_made_by_every_segment_that_reads_them():
    def call(x):
        shift = in_partition(0, tf.constant, 3.0)
        x = in_partition(0, tf.add, x, shift)
        return in_partition(1, tf.add, x, shift)

    segments = segments_of(call, X)
    check(segments)
    assert [len(s.inputs) for s in segments] == [1, 1]
    assert not any(op.type == "Const" for s in segments for op in s.operations)


def test_a_variable_of_two_partitions_is_read_by_both():
    shared = keras.Variable(2.0)

    def call(x):
        x = in_partition(0, tf.multiply, x, tf.convert_to_tensor(shared))
        return in_partition(1, tf.multiply, x, tf.convert_to_tensor(shared))

    segments = segments_of(call, X)
    check(segments)
    first, second = segments
    assert [t is second.variables[0] for t in first.variables] == [True]


def test_captures_are_told_apart_from_inputs():
    offset = tf.constant([5.0, 6.0, 7.0])
    (segment,) = segments_of(lambda x: tf.raw_ops.AddV2(x=x, y=offset), X)
    assert len(segment.inputs) == 1
    assert len(segment.captures) == 1


def test_side_effects_are_noticed_and_keep_their_order_across_partitions():
    def call(x):
        in_partition(1, tf.print, "first")
        in_partition(0, tf.print, "second")
        return in_partition(1, tf.tanh, x)

    segments = segments_of(call, X)
    check(segments)
    first = next(s for s in segments if s.partition == 1)
    second = next(s for s in segments if s.partition == 0)
    assert len(first.side_effects) == len(second.side_effects) == 1
    assert first.index in second.after or first.index < second.index


def test_work_on_weights_alone_runs_when_its_result_is_needed():
    weight = keras.Variable([1.0, 2.0, 3.0])

    def call(x):
        x = in_partition(0, tf.tanh, in_partition(1, tf.sin, x))
        scaled = in_partition(1, tf.exp, tf.convert_to_tensor(weight))
        return in_partition(1, tf.multiply, x, scaled)

    segments = segments_of(call, X)
    check(segments)
    last = segments[-1]
    assert [s.partition for s in segments] == [1, 0, 1]
    assert "Exp" in {op.type for op in last.operations}


def test_an_empty_partition_has_no_segment():
    segments = segments_of(chain(0, 2), X, partitions=3)
    assert [s.partition for s in segments] == [0, 2]


def test_a_model_that_only_passes_its_input_on_has_a_segment():
    (segment,) = segments_of(lambda x: x, X)
    assert [op.type for op in segment.operations] == ["Identity"]


def test_a_loop_is_a_unit():
    def call(x):
        return in_partition(
            1, lambda: tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, 2 * y), [0, x])[1]
        )

    segments = segments_of(call, X)
    check(segments)
    assert any("While" in op.type for op in segments[-1].operations)


def test_a_segment_is_printed_with_its_sizes():
    first, _ = segments_of(chain(0, 1), X)
    assert str(first) == "segment 0 (partition 0): 1 operations, 1 in, 1 out"


def test_an_output_that_another_is_computed_from_ends_a_segment():
    def call(x):
        h = tf.tanh(x)
        return h, tf.exp(h)

    segments = segments_of(call, X, partitions=1)
    check(segments)
    assert [{op.type for op in s.operations} & {"Tanh", "Exp"} for s in segments] == [
        {"Tanh"},
        {"Exp"},
    ]
    (read,) = segments[1].inputs
    assert read.op.type == "Tanh"
