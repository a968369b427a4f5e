from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
from usage import usage

from opensmp.distributed.collectives.scalars import scalar

_numbers = itertools.count(10**6)


def bytes_left_by(make, count=3000):
    """What each call with a number that was never there before leaves in memory."""
    for _ in range(200):
        make(next(_numbers))
    before = usage().allocated_bytes
    for _ in range(count):
        make(next(_numbers))
    return (usage().allocated_bytes - before) / count


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64, tf.float16, tf.float32, tf.float64, tf.bool])
@pytest.mark.parametrize("number", [7, np.int64(7), np.float32(7.0)])
def test_it_is_the_constant_of_the_number(dtype, number):
    expected = tf.constant(int(number) if dtype.is_integer else dtype.as_numpy_dtype(number))
    found = scalar(number, dtype)
    assert (found.dtype, found.shape) == (dtype, [])
    assert found.numpy() == expected.numpy()


def test_it_may_be_made_in_a_function():
    @tf.function
    def function():
        return scalar(0.1, tf.float64)

    assert function().numpy() == 0.1


def test_it_leaves_nothing_behind():
    assert bytes_left_by(lambda number: scalar(number, tf.int64)) < 50


def test_tensorflow_still_keeps_a_tensor_of_each_python_number():
    """If not, there is no need for `scalar` any more."""
    assert bytes_left_by(lambda number: tf.constant(number, tf.int64)) > 300
