from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.trace.variables import (
    VariableInput,
    VariableScope,
    is_keras,
    is_trainable,
    tf_variable,
    variable_name,
)
from opensmp.errors import TraceError


@pytest.fixture(params=["keras", "tensorflow"])
def variable(request):
    make = keras.Variable if request.param == "keras" else tf.Variable
    return make(np.float32([1.0, 2.0]), name="weight")


@pytest.fixture
def scope():
    return VariableScope(_private.new_graph("variables"))


def run(scope, function):
    """Runs a function inside the scope and its graph; the tensors it returns."""
    with scope._graph.as_default(), scope.collecting():
        return function()


def test_a_variable_that_is_read_is_one_placeholder(scope, variable):
    first, second = run(
        scope, lambda: [tf.convert_to_tensor(variable), tf.convert_to_tensor(variable)]
    )
    assert first.op.type == "Placeholder"
    assert first is second
    (leaf,) = scope.inputs
    assert leaf.variable is variable
    assert leaf.placeholder is first
    assert leaf.placeholder.shape == (2,)
    assert "weight" in leaf.name
    assert scope.updates == ()


def test_inputs_are_in_the_order_of_their_first_read(scope):
    variables = [keras.Variable(0.0), tf.Variable(0.0), keras.Variable(0.0)]
    run(scope, lambda: [v + 1.0 for v in reversed(variables)])
    assert [leaf.variable for leaf in scope.inputs] == variables[::-1]


def test_an_assignment_changes_what_is_read_and_not_the_variable(scope, variable):
    def function():
        before = tf.convert_to_tensor(variable)
        variable.assign(before * 2.0)
        after = tf.convert_to_tensor(variable)
        variable.assign_add(tf.ones([2]))
        return before, after, tf.convert_to_tensor(variable)

    before, after, last = run(scope, function)
    ((changed, value),) = scope.updates
    assert changed is variable
    assert [op.type for op in (before.op, value.op.inputs[0].op)].count("Placeholder") >= 1
    feed = tf.constant([1.0, 2.0])
    assert evaluate(scope, before, [after, last, value], feed) == [[2, 4], [3, 5], [3, 5]]
    assert tf.convert_to_tensor(variable).numpy().tolist() == [1.0, 2.0]


def evaluate(scope, source, targets, feed):
    """Values of tensors of the scope's graph, given the value of one placeholder."""

    def body(x):
        return tf.graph_util.import_graph_def(
            scope._graph.as_graph_def(),
            input_map={source.name: x},
            return_elements=[t.name for t in targets],
        )

    return [t.numpy().tolist() for t in tf.function(body)(feed)]


def test_a_read_inside_a_loop_is_the_placeholder_of_the_root_graph(scope, variable):
    def function():
        return tf.while_loop(
            lambda i, x: i < 2,
            lambda i, x: (i + 1, x + tf.convert_to_tensor(variable)),
            [0, tf.zeros([2])],
        )[1]

    total = run(scope, function)
    (leaf,) = scope.inputs
    assert leaf.placeholder.graph is scope._graph
    assert evaluate(scope, leaf.placeholder, [total], tf.constant([1.0, 2.0])) == [[2.0, 4.0]]


@pytest.mark.parametrize("how", ["loop", "branch"])
def test_an_assignment_inside_a_body_is_refused_by_name(scope, variable, how):
    def assign(x):
        variable.assign(x)
        return x

    bodies = {
        "loop": lambda: tf.while_loop(lambda x: True, lambda x: [assign(x)], [tf.zeros([2])]),
        "branch": lambda: tf.cond(
            tf.random.uniform([]) > 0.5, lambda: assign(tf.zeros([2])), lambda: tf.ones([2])
        ),
    }
    with pytest.raises(TraceError, match=r"'weight.*' is assigned inside a loop body"):
        run(scope, bodies[how])


def test_a_variable_that_waits_for_its_memory_is_not_allocated_by_a_read(scope):
    def function():
        dense = keras.layers.Dense(2)
        return dense(tf.ones([1, 3])), dense

    _, dense = run(scope, function)
    assert [leaf.variable for leaf in scope.inputs] == [dense.kernel, dense.bias]
    assert not _private.is_initialized(dense.kernel)
    assert len(_private.take_pending_variables()) == 2


def test_a_read_in_the_build_of_a_layer_gives_the_value_itself(scope, variable):
    with scope._graph.as_default(), scope.collecting(), tf.init_scope():
        assert tf.convert_to_tensor(variable).numpy().tolist() == [1.0, 2.0]
    assert scope.inputs == ()


def test_variables_are_themselves_again_afterwards(scope, variable):
    run(scope, lambda: tf.convert_to_tensor(variable))
    variable.assign([5.0, 6.0])
    assert tf.convert_to_tensor(variable).numpy().tolist() == [5.0, 6.0]


def test_what_kind_of_variable_it_is():
    ours, theirs = keras.Variable(1.0, name="ours"), tf.Variable(1.0, name="theirs")
    assert [is_keras(v) for v in (ours, theirs)] == [True, False]
    assert [variable_name(v) for v in (ours, theirs)] == ["ours", "theirs:0"]
    assert tf_variable(theirs) is theirs
    assert isinstance(tf_variable(ours), tf.Variable)
    assert VariableInput(ours, tf.constant(1.0)).name == "ours"


def test_gradients_are_wanted_for_trainable_numbers_with_a_fraction():
    assert is_trainable(keras.Variable(1.0))
    assert is_trainable(tf.Variable(1j))
    assert not is_trainable(keras.Variable(1.0, trainable=False))
    assert not is_trainable(tf.Variable(1))
