from __future__ import annotations

import keras
import tensorflow as tf

from opensmp.saving.checkpoint.interval import Interval


def test_without_steps_each_call_is_due():
    interval = Interval(None, None, None)
    assert interval.now() is None
    assert interval.is_due(None, check=True)


def test_steps_count_from_the_last_one_unless_they_are_not_checked():
    interval = Interval(5, tf.Variable(3, dtype=tf.int64), None)
    assert interval.now() == 3
    assert interval.is_due(3, check=True)  # the first
    interval.last = 3
    assert [step for step in range(3, 10) if interval.is_due(step, check=True)] == [8, 9]
    assert [step for step in range(3, 6) if interval.is_due(step, check=False)] == [4, 5]


def test_counters_are_variables_of_keras_and_numbers_too():
    assert Interval(5, keras.Variable(4, dtype="int64"), 2).now() == 4
    assert Interval(5, 7, tf.constant(2)).last == 2
