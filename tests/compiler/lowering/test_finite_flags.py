from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opensmp.compiler.lowering import finite_flags as module
from opensmp.execution.emission.emit_call import emit_call, has_control_flow

finite_flags = tf.function(module.finite_flags, reduce_retracing=True)
DTYPES = [tf.float16, tf.bfloat16, tf.float32, tf.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_found_wherever_it_is(dtype, bad):
    for place in range(7):
        values = np.ones(7, np.float64)
        values[place] = bad
        good = tf.ones([2, 3], dtype)
        flags = finite_flags([good, tf.cast(values, dtype), good])
        assert flags.numpy().tolist() == [True, False, True]


def test_infinities_of_both_signs_do_not_cancel():
    assert finite_flags([tf.constant([np.inf, -np.inf])]).numpy().tolist() == [False]


def test_flags_of_several_dtypes_are_in_the_order_of_their_tensors():
    bad = tf.constant([np.nan])
    tensors = [tf.ones([2], tf.float64), bad, tf.cast(bad, tf.float16), tf.ones([1], tf.complex64)]
    tensors += [tf.cast(bad, tf.complex128), tf.zeros([0, 3]), tf.cast(bad, tf.float64)]
    found = finite_flags(tensors).numpy().tolist()
    assert found == [True, False, False, True, False, True, False]


def test_half_precision_is_added_up_in_float32():
    assert finite_flags([tf.fill([1000], tf.constant(6e4, tf.float16))]).numpy().all()


def test_no_tensors_give_no_flags():
    assert finite_flags([]).shape == [0]


def test_a_function_with_flags_can_run_in_one_thread():
    def body(x):
        return [x * 2.0, module.finite_flags([x, tf.nn.relu(x), tf.exp(x)])]

    called = tf.function(body).get_concrete_function(tf.TensorSpec([3]))
    assert not has_control_flow(called)

    @tf.function
    def run(x):
        return emit_call(called, [x], "call", one_thread=True)[1]

    for _ in range(2):
        assert run(tf.constant([1.0, 2.0, 3.0]))[1].numpy().tolist() == [True] * 3
        assert run(tf.constant([1.0, 2.0, 300.0]))[1].numpy().tolist() == [True, True, False]
