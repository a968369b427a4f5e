"""Canaries of calls of `tf.function`s."""

from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp import _private


@pytest.fixture
def called():
    """The functions whose calls went through one of ours."""
    found = []

    def around(function, call):
        found.append(function)
        return call()

    _private.call_functions_by(around)
    yield found
    _private.call_functions_by(lambda function, call: call())


def test_call_functions_by__sees_eager_calls_only(called):
    inner = tf.function(lambda x: x + 1)
    outer = tf.function(lambda x: inner(x) * 2)
    assert outer(tf.constant(1)).numpy() == 4
    assert called == [outer]


def test_call_functions_by__sees_concrete_functions(called):
    concrete = tf.function(lambda x: x + 1).get_concrete_function(tf.constant(1))
    assert concrete(tf.constant(1)).numpy() == 2
    assert called == [concrete]


def test_call_functions_by__takes_the_place_of_the_one_before(called):
    others = []
    _private.call_functions_by(lambda function, call: others.append(function) or call())
    function = tf.function(lambda x: x)
    function(tf.constant(1))
    assert (called, others) == ([], [function])


def test_call_functions_by__lets_errors_and_methods_through(called):
    class Owner:
        @tf.function
        def method(self, x):
            return tf.gather(tf.constant([1.0]), x)

    assert Owner().method(tf.constant(0)).numpy() == 1.0
    with pytest.raises(tf.errors.InvalidArgumentError):
        Owner().method(tf.constant(5))
    assert len(called) == 2


def calls_of(function):
    return _private.CallAttributes(function, _private.call_attributes(), "NoSuchGradient")


def test_call_attributes_make_calls_that_compute_what_the_function_does():
    inner = tf.function(lambda x, y: (x + 1.0, y * 2)).get_concrete_function(
        tf.TensorSpec([2]), tf.TensorSpec([], tf.int32)
    )

    @tf.function
    def caller(x, y):
        attributes = calls_of(inner)
        first = attributes.call(inner, [x, y], "mine")
        second = attributes.call(inner, first.outputs, "mine")
        assert [first.name, second.name] == ["mine", "mine_1"]
        assert first.outputs[0].shape.rank is None  # nothing is inferred from the body
        assert first.get_attr("_gradient_op_type") == b"NoSuchGradient"
        return list(second.outputs)

    x, y = caller(tf.constant([1.0, 2.0]), tf.constant(3))
    assert (x.numpy().tolist(), int(y)) == ([3.0, 4.0], 12)


def test_call_attributes_leave_shapes_to_tensorflow_where_the_function_does_not_know_them():
    inner = tf.function(lambda x: x + 1.0).get_concrete_function(tf.TensorSpec([None, 3]))

    @tf.function
    def caller(x):
        (result,) = calls_of(inner).call(inner, [x], "mine").outputs
        assert result.shape == [5, 3]
        return result

    assert caller(tf.zeros([5, 3])).numpy().sum() == 15.0
