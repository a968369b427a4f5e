"""What gradients read, and what is therefore kept, seen in lowered models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import planned, values_of

from opensmp.compiler.lowering.program import Program
from opensmp.compiler.recomputation.census import kept_tensors

ROWS, STEPS, WIDTH = 4, 6, 8
SEQUENCES = tf.random.stateless_normal([ROWS, STEPS, WIDTH], [1, 2])
IMAGES = tf.random.stateless_normal([2, 8, 8, 3], [1, 2])


def lowered(model: Any, x: Any) -> Program:
    traced, plan = planned(model, x, partitions=1)
    required = [v.placeholder for v in traced.variables if v.variable.trainable]
    return Program(traced, plan, required)


def kept(program: Program) -> list[Any]:
    return [each.owner for s in program.segments for each in kept_tensors(program, s)]


def gradients_of(program: Program, x: Any) -> list[Any]:
    """Gradients of the sum of the outputs, as the functions of a program compute them."""
    (segment,) = program.segments
    forward, backward = program.forward(segment), program.backward(segment, segment.outputs)
    values = values_of(program.traced, x)
    results = forward.kept(forward.function(*(values[id(t)] for t in forward.feeds)))
    made = (*forward.outputs, *forward.residuals)
    values.update({id(t): value for t, value in zip(made, results, strict=False)})
    for output, upstream in zip(backward.gradient.outputs, backward.gradient.upstream, strict=True):
        values[id(upstream)] = tf.ones_like(values[id(output)])
    return list(backward.function(*(values[id(t)] for t in backward.feeds)))


def expected(model: Any, program: Program, x: Any) -> list[Any]:
    @tf.function
    def plain(x: Any) -> Any:
        variables = [v.variable.value for v in program.traced.variables if v.variable.trainable]
        return tf.gradients(tf.reduce_sum(model(x)), variables)

    return plain(x)


@pytest.fixture
def lstm():
    layer = keras.layers.LSTM(WIDTH, return_sequences=True, kernel_initializer="glorot_normal")
    layer(SEQUENCES)
    return layer


class TestLoops:
    def test_weights_that_a_loop_passes_on_are_not_kept(self, lstm):
        shapes = [tuple(t.shape) for t in kept(lowered(lstm, SEQUENCES))]
        assert (WIDTH, 4 * WIDTH) not in shapes
        assert (4 * WIDTH,) not in shapes

    def test_results_of_which_the_gradient_needs_zeros_are_not_kept(self, lstm):
        found = kept(lowered(lstm, SEQUENCES))
        assert (ROWS, WIDTH) not in [tuple(t.shape) for t in found]  # the last states
        assert all(t.dtype == tf.variant for t in found if t.shape.rank != 0)

    def test_the_gradients_are_those_of_plain_keras(self, lstm):
        program = lowered(lstm, SEQUENCES)
        found = gradients_of(program, SEQUENCES)
        for ours, plain in zip(found, expected(lstm, program, SEQUENCES), strict=True):
            np.testing.assert_array_equal(ours, plain)


class TestShapes:
    def test_no_shape_that_is_known_is_kept(self):
        layer = keras.layers.Conv2D(4, 3)
        layer(IMAGES)
        program = lowered(layer, IMAGES)
        assert [t.op.type for t in kept(program)] == ["Placeholder"]  # the images
        found = gradients_of(program, IMAGES)
        for ours, plain in zip(found, expected(layer, program, IMAGES), strict=True):
            np.testing.assert_array_equal(ours, plain)

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_an_image_that_is_resized_is_not_kept(self, interpolation):
        layer = keras.layers.Conv2D(4, 3)
        layer(IMAGES)

        def model(x: Any) -> Any:
            return keras.ops.image.resize(layer(x), (12, 12), interpolation=interpolation)

        program = lowered(model, IMAGES)
        assert [t.op.type for t in kept(program)] == ["Placeholder"]
        found = gradients_of(program, IMAGES)
        for ours, plain in zip(found, expected(model, program, IMAGES), strict=True):
            np.testing.assert_array_equal(ours, plain)

    @pytest.mark.parametrize("known", [True, False])
    def test_zeros_like_an_activation_do_not_keep_it(self, known):
        @tf.custom_gradient
        def without_gradient(x: Any) -> Any:
            return tf.identity(x), lambda upstream: tf.zeros_like(x) * upstream

        dense = keras.layers.Dense(WIDTH)
        x = SEQUENCES[0]
        dense(x)

        def model(x: Any) -> Any:
            x = x if known else tf.compat.v1.placeholder_with_default(x, [None, WIDTH])
            return without_gradient(dense(x))

        program = lowered(model, x)
        assert "MatMul" not in [t.op.type for t in kept(program)]
        assert "BiasAdd" not in [t.op.type for t in kept(program)]
        for gradient in gradients_of(program, x):
            np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))
