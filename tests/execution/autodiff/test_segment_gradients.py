from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small import in_partition, planned

from opensmp.compiler.lowering.program import Program
from opensmp.errors import StepError
from opensmp.execution.autodiff.segment_gradients import LateGradient, differentiable_call
from opensmp.execution.emission.emit_call import emit_call

X = tf.constant([[1.0, 2.0]])


class Emitted:
    """One segment in a graph of its own, with the calls that were emitted for it.

    Args:
        call: What the segment computes.
        required: "inputs", "variables" or both.
        optional: The same, for gradients that may be asked for late.
    """

    def __init__(self, call: Any, *, required: Any = (), optional: Any = ()) -> None:
        traced, plan = planned(lambda x: in_partition(0, call, x), X, partitions=1)
        leaves = {
            "inputs": list(traced.inputs),
            "variables": [v.placeholder for v in traced.variables],
        }
        chosen = [
            [leaf for kind in kinds for leaf in leaves[kind]] for kinds in (required, optional)
        ]
        self.program = Program(traced, plan, *chosen)
        (self.segment,) = self.program.segments
        self.variables = {id(v.placeholder): v.variable for v in traced.variables}
        self.kinds: list[str] = []
        self.late: list[LateGradient] = []

    def emit(self, kind: str, what: Any, args: Any) -> list[Any]:
        self.kinds.append(kind)
        return emit_call(what.function, args, kind)[1]

    def run(self, x: Any) -> list[Any]:
        """Outputs of the segment for an input."""
        args = [
            tf.convert_to_tensor(self.variables[id(t)]) if id(t) in self.variables else x
            for t in self.program.forward(self.segment).feeds
        ]
        return differentiable_call(self.program, self.segment, args, self.emit, self.late.append)


def test_gradients_of_inputs_and_variables_come_from_one_backward_call():
    weight = keras.Variable([[3.0], [4.0]])
    emitted = Emitted(lambda x: tf.square(x @ weight), required=["inputs", "variables"])

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = emitted.run(x)
        return y, tape.gradient(y, [x, weight.value])

    y, (for_input, for_weight) = run(X)
    assert y.numpy().tolist() == [[121.0]]
    assert for_input.numpy().tolist() == [[66.0, 88.0]]
    assert for_weight.numpy().tolist() == [[22.0], [44.0]]
    assert emitted.kinds == ["F", "B"]


def test_a_gradient_makes_no_zeros_for_the_arguments():
    weight = keras.Variable([[3.0], [4.0]])
    emitted = Emitted(lambda x: tf.square(x @ weight), required=["inputs", "variables"])

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = emitted.run(x)
        before = set(tf.compat.v1.get_default_graph().get_operations())
        gradients = tape.gradient(y, [x, weight.value])
        made = [op for op in x.graph.get_operations() if op not in before]
        assert sum(op.type in ("Const", "Fill", "ZerosLike") for op in made) <= 2  # ones for y
        return gradients

    run(X)


def test_no_gradient_asked_is_no_backward_call():
    emitted = Emitted(tf.square, required=["inputs"])

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = emitted.run(x)
        return y, tape.gradient(x * 2.0, x)

    run(X)
    assert emitted.kinds == ["F"]


def test_an_output_that_the_loss_does_not_need_gives_no_gradient_instead_of_zeros():
    first, second = keras.Variable(2.0), keras.Variable(3.0)
    emitted = Emitted(lambda x: (x * first, x * second), required=["variables"])

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            one, _ = emitted.run(x)
            loss = tf.reduce_sum(one)
        return tape.gradient(loss, [first.value, second.value])

    for_first, for_second = run(X)
    assert float(for_first) == 3.0
    assert for_second is None


def test_an_integer_output_passes_as_it_is():
    weight = keras.Variable(2.0)

    def call(x):
        y = x * weight
        return y, tf.argmax(y, 1)

    emitted = Emitted(call, required=["variables"])

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            y, index = emitted.run(x)
            loss = tf.reduce_sum(y)
        return index, tape.gradient(loss, weight.value)

    index, gradient = run(X)
    assert index.numpy().tolist() == [1]
    assert float(gradient) == 3.0


class TestLate:
    """`tf.gradients` takes no tape: what it will be asked for is not known in the forward pass."""

    def test_a_late_gradient_is_handed_out_and_computed_on_demand(self):
        emitted = Emitted(tf.square, optional=["inputs"])

        @tf.function
        def run(x):
            (y,) = emitted.run(x)
            (gradient,) = tf.gradients(y, x)
            assert gradient.shape == x.shape
            assert emitted.kinds == ["F"]
            ((handed_out, computed),) = emitted.late[0].compute({})
            assert handed_out is gradient or gradient.op.inputs[0] is handed_out
            assert emitted.kinds == ["F", "R"]
            return computed

        assert run(X).numpy().tolist() == [[2.0, 4.0]]

    def test_a_gradient_that_does_not_exist_is_zero(self):
        weight = keras.Variable(2.0)
        emitted = Emitted(
            lambda x: tf.stop_gradient(x) * weight, required=["variables"], optional=["inputs"]
        )

        @tf.function
        def run(x):
            (y,) = emitted.run(x)
            tf.gradients(y, [x, weight.value])
            return [computed for _, computed in emitted.late[0].compute({})]

        assert run(X)[0].numpy().tolist() == [[0.0, 0.0]]

    def test_an_upstream_gradient_that_was_computed_late_itself_is_used(self):
        emitted = Emitted(tf.square, optional=["inputs"])

        @tf.function
        def run(x):
            (y,) = emitted.run(x)
            stand_in = tf.ones_like(y)
            tf.gradients(y, x, grad_ys=stand_in)
            (late,) = emitted.late
            keys = [key for key, value in late.values.items() if key < 0]
            assert len(keys) == 1
            real = 10.0 * tf.ones_like(y)
            return late.compute({id(late.values[keys[0]]): real})[0][1]

        assert run(X).numpy().tolist() == [[20.0, 40.0]]


class TestRefusals:
    def test_a_tape_can_differentiate_the_backward_pass(self):
        emitted = Emitted(tf.square, required=["inputs"])

        @tf.function
        def run(x):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    (y,) = emitted.run(x)
                gradient = inner.gradient(y, x)
            return outer.gradient(gradient, x)

        assert run(X).numpy().tolist() == [[2.0, 2.0]]

    @pytest.mark.parametrize("kind", ["required", "optional"])
    def test_tf_gradients_cannot(self, kind):
        emitted = Emitted(tf.square, **{kind: ["inputs"]})

        @tf.function
        def run(x):
            (y,) = emitted.run(x)
            (gradient,) = tf.gradients(y, x)
            return tf.gradients(tf.square(gradient), x)

        with pytest.raises(StepError, match="A gradient of a gradient"):
            run(X)

    def test_a_gradient_from_outside_of_the_graph_fails_when_it_runs(self):
        emitted = Emitted(tf.square, required=["inputs"])
        run = tf.function(lambda x: emitted.run(x)[0])
        run(X)
        with tf.GradientTape() as tape:
            tape.watch(X)
            y = run(X)
        with pytest.raises(tf.errors.InvalidArgumentError, match="outside of the function that"):
            tape.gradient(y, X)

    def test_the_function_can_be_saved_and_loaded_all_the_same(self, tmp_path):
        emitted = Emitted(tf.square, required=["inputs"], optional=[])
        module = tf.Module()
        module.run = tf.function(
            lambda x: emitted.run(x)[0], input_signature=[tf.TensorSpec([1, 2])]
        )
        tf.saved_model.save(module, str(tmp_path))
        loaded = tf.saved_model.load(str(tmp_path))
        np.testing.assert_array_equal(loaded.run(X), tf.square(X))
