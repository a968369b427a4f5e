from __future__ import annotations

import numpy as np
import tensorflow as tf

from opensmp.distributed.collectives import clipping

ALONE = (0,)


def slices(values, indices, shape):
    return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant(shape))


def test_norm_of_one_process_is_that_of_tensorflow():
    gradients = [tf.constant([3.0, 4.0]), slices([[12.0, 0.0]], [1], [5, 2])]
    norm = clipping.global_norm(clipping.Own(gradients, [0, 1], 2), ALONE)
    assert float(norm) == 13.0 == float(tf.linalg.global_norm(gradients))


def test_gradients_of_other_processes_leave_gaps():
    norm = clipping.global_norm(clipping.Own([tf.constant([3.0, 4.0])], [2], 4), ALONE)
    assert float(norm) == 5.0


def test_half_precision_does_not_overflow():
    gradients = [tf.fill([100], tf.constant(200.0, tf.float16))]
    norm = clipping.global_norm(clipping.Own(gradients, [0], 1), ALONE)
    assert norm.dtype == tf.float32
    assert float(norm) == 2000.0


def test_double_precision_is_kept():
    gradients = [tf.constant([1.0, 1e-12], tf.float64)]
    norm = clipping.global_norm(clipping.Own(gradients, [0], 1), ALONE)
    assert norm.dtype == tf.float64


def test_norm_of_complex_gradients_is_that_of_both_parts():
    norm = clipping.global_norm(clipping.Own([tf.constant([3 + 4j])], [0], 1), ALONE)
    assert abs(float(norm) - 5.0) < 1e-6


def test_clipping_is_that_of_tensorflow():
    gradients = [tf.constant([3.0, 4.0]), slices([[12.0, 0.0]], [1], [5, 2])]
    own = clipping.Own(gradients, [0, 1], 2)
    for limit in (1.3, 26.0):
        clipped = clipping.clip(own, limit, clipping.global_norm(own, ALONE))
        expected, _ = tf.clip_by_global_norm(gradients, limit)
        np.testing.assert_allclose(clipped[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(clipped[1].values, expected[1].values, rtol=1e-6)


def test_infinite_norm_gives_nan():
    own = clipping.Own([tf.constant([np.inf, 1.0])], [0], 1)
    assert np.isnan(clipping.clip(own, 1.0, clipping.global_norm(own, ALONE))[0]).all()


def test_one_process_leaves_clipping_to_keras():
    assert clipping.clipping((0,)) is None
    assert clipping.clipping((0, 1)) is not None


def test_one_process_leaves_the_finite_check_to_keras():
    assert clipping.agreement_on_finite((0,)) is None
    agree = clipping.agreement_on_finite((0, 1))
    assert agree is not None
