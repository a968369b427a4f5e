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
