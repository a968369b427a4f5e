"""One trace that is lowered more than once, as for microbatches that recompute differently."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import in_partition, planned, run_backward, run_forward, values_of

from opensmp.compiler.lowering.program import Program

X = tf.constant(np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32"))


class Counted(keras.layers.Layer):
    """Rows multiplied in a loop of TensorFlow."""

    def __init__(self):
        super().__init__()
        self.factor = self.add_weight(shape=(4,), initializer="ones", name="factor")

    def call(self, x):
        return tf.while_loop(
            lambda i, total: i < 3, lambda i, total: (i + 1, tf.tanh(total * self.factor)), [0, x]
        )[1]


def gradients_of(program, traced):
    values = run_forward(program, values_of(traced, X))
    upstream = {id(t): tf.ones_like(values[id(t)]) for t in traced.outputs}
    found = run_backward(program, values, upstream)
    return [found[id(v.placeholder)].numpy() for v in traced.variables]


@pytest.mark.parametrize("kind", [keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN])
def test_a_model_with_loops_is_lowered_twice(kind):
    first, second, last = kind(4, return_sequences=True), Counted(), kind(2)
    model = keras.Sequential([keras.Input((5, 3)), first, second, last])

    def forward(x):
        x = in_partition(0, first, x)
        return in_partition(1, last, in_partition(0, second, x))

    traced, plan = planned(forward, X)
    variables = [v.placeholder for v in traced.variables]
    Program(traced, plan)
    some = Program(traced, plan, required=variables[:2])
    programs = [some, *(Program(traced, plan, required=variables) for _ in range(2))]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(X))
    expected = tape.gradient(loss, [v.variable for v in traced.variables])
    for program in programs[1:]:
        assert [str(s) for s in program.segments] == [str(s) for s in some.segments]
        for one, other in zip(gradients_of(program, traced), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
