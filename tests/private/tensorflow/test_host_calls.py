"""Canary of Python functions that operations of a graph call."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def count(self, x):
        self.calls += 1
        return np.asarray(x + 1)


def run_in_a_function(counter, where):
    @tf.function
    def run(x):
        def call():
            return _private.host_call(counter.count, [x], tf.int64)

        if where == "branch":
            return tf.cond(x > 0, call, lambda: x)
        return call()

    if where == "inner function":
        inner = run
        run = tf.function(lambda x: inner(x))
    assert [int(run(tf.constant(n, tf.int64))) for n in (1, 2)] == [2, 3]
    gc.collect()  # the function must not need what is gone by now
    assert int(run(tf.constant(3, tf.int64))) == 4
    assert counter.calls == 3


@pytest.mark.parametrize("where", ["function", "branch", "inner function"])
def test_host_call(where):
    counter = Counter()
    run_in_a_function(counter, where)
    gone = weakref.ref(counter)
    del counter
    gc.collect()
    assert gone() is None


def test_host_call_outside_of_functions():
    counter = Counter()
    assert int(_private.host_call(counter.count, [tf.constant(1, tf.int64)], tf.int64)) == 2
