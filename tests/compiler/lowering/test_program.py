from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import in_partition, planned, run_backward, run_forward, types, values_of

from opensmp.compiler.lowering.program import Program
from opensmp.errors import StepError

X = tf.constant([[1.0, 2.0, 3.0]])


@pytest.fixture
def layers():
    first, second = keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)
    first.build((None, 3))
    second.build((None, 4))
    return first, second


@pytest.fixture
def two(layers):
    """A two-layer model over two partitions: its trace and its plan."""
    return planned(lambda x: in_partition(1, layers[1], in_partition(0, layers[0], x)), X)


def test_forward_functions_in_turn_compute_the_model(layers, two):
    traced, plan = two
    program = Program(traced, plan)
    values = run_forward(program, values_of(traced, X))
    expected = layers[1](layers[0](X))
    # The weights are random: a sum near zero keeps the rounding of its larger terms.
    np.testing.assert_allclose(values[id(traced.outputs[0])], expected, rtol=1e-6, atol=1e-6)
    assert all(program.forward(s).residuals == () for s in program.segments)


def test_backward_functions_in_turn_compute_the_gradients(layers, two):
    traced, plan = two
    variables = [v.placeholder for v in traced.variables]
    program = Program(traced, plan, required=variables)
    values = run_forward(program, values_of(traced, X))
    upstream = {id(traced.outputs[0]): tf.ones([1, 2])}
    found = run_backward(program, values, upstream)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layers[1](layers[0](X)))
    expected = tape.gradient(loss, [v.variable for v in traced.variables])
    for placeholder, gradient in zip(variables, expected, strict=True):
        np.testing.assert_allclose(found[id(placeholder)], gradient, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_reads_only_what_it_needs(two):
    traced, plan = two
    program = Program(traced, plan, required=[v.placeholder for v in traced.variables])
    first, second = program.segments
    backward = program.backward(second, second.outputs)
    assert "BiasAdd" not in types(backward.function)  # the result itself is not needed
    assert first.inputs[0] in program.backward(first, first.outputs).feeds


def test_a_frozen_segment_has_no_backward_pass_and_sends_no_gradient(two):
    traced, plan = two
    last = [v.placeholder for v in traced.variables[2:]]
    program = Program(traced, plan, required=last)
    first, second = program.segments
    assert program.backward(first, first.outputs) is None
    assert not program.is_required(second.inputs[0])
    assert len(program.backward(second, second.outputs).gradient.wrt) == 2


def test_outputs_without_a_gradient_are_left_out_of_the_backward_pass(layers):
    def call(x):
        y = in_partition(0, layers[0], x)
        return in_partition(0, tf.tanh, y), in_partition(0, tf.exp, y)

    traced, plan = planned(call, X, partitions=1)
    program = Program(traced, plan, required=[v.placeholder for v in traced.variables])
    (segment,) = program.segments
    both = program.backward(segment, segment.outputs)
    one = program.backward(segment, segment.outputs[:1])
    assert len(both.gradient.outputs) == 2
    assert len(one.gradient.outputs) == 1
    assert program.backward(segment, []) is None
    assert program.backward(segment, segment.outputs[:1]) is one


def test_late_gradients_run_the_forward_pass_again(layers, two):
    traced, plan = two
    program = Program(
        traced, plan, required=[v.placeholder for v in traced.variables], optional=traced.inputs
    )
    first, _ = program.segments
    assert program.is_optional(traced.inputs[0])
    assert not program.is_required(traced.inputs[0])
    late = program.recompute(first, first.outputs)
    assert "Tanh" in types(late.function)
    values = values_of(traced, X) | {id(late.gradient.upstream[0]): tf.ones([1, 4])}
    (gradient,) = late.function(*(values[id(t)] for t in late.feeds))
    with tf.GradientTape() as tape:
        tape.watch(X)
        y = layers[0](X)
    np.testing.assert_allclose(gradient, tape.gradient(y, X), rtol=1e-6, atol=1e-6)


def test_random_numbers_are_not_drawn_a_second_time():
    traced, plan = planned(lambda x: tf.square(x * tf.random.normal([3])), X, partitions=1)
    program = Program(traced, plan, optional=traced.inputs)
    (segment,) = program.segments
    with pytest.raises(StepError) as caught:
        program.recompute(segment, segment.outputs)
    message = str(caught.value)
    assert "would run the random operations ['random_normal/RandomStandardNormal'] a second" in (
        message
    )
    assert "tape.watch(...)" in message


def test_a_side_effect_adds_a_result_to_the_forward_function():
    def call(x):
        tf.print("hello", output_stream="file:///dev/null")
        return x + 1.0

    traced, plan = planned(call, X, partitions=1)
    program = Program(traced, plan)
    (segment,) = program.segments
    assert len(program.forward(segment).function.outputs) == len(segment.outputs) + 1


def test_a_program_is_printed_as_its_plan_and_segments(two):
    lines = str(Program(*two)).split("\n")
    assert "segment 0 (partition 0)" in lines[-2]
    assert "segment 1 (partition 1)" in lines[-1]
