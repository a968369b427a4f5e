from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from processes import check_ranks
from small import STEP_OF_TWO, TWO_BY_FOUR

import opensmp.api.comm.gradient_norms  # noqa: F401 - what TensorFlow asks
from opensmp.compiler.trace.structure import Structure
from opensmp.errors import ElsewhereError
from opensmp.execution.multi_process.remote_gradient import (
    OwnedBy,
    RemoteGradient,
    is_elsewhere,
    pack,
)


def gradient() -> RemoteGradient:
    return RemoteGradient.of(tf.ones([4, 3]), 1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda g: g / 2,
        lambda g: 2.0 * g,
        lambda g: g * tf.constant(2.0),
        lambda g: g * np.float32(2.0),
        lambda g: -g,
        lambda g: g**2,
        lambda g: sum([g, g]) - g,
        lambda g: g + tf.ones([3]),
        abs,
    ],
)
def test_what_is_computed_of_it_is_elsewhere_as_well(compute):
    result = compute(gradient())
    assert isinstance(result, RemoteGradient)
    assert result.shape == [4, 3]
    assert result.dtype == tf.float32
    assert result.process == 1
    assert is_elsewhere(tf.function(compute, autograph=False)(gradient()))


def test_it_grows_and_does_not_take_other_shapes():
    assert (gradient() + tf.ones([2, 4, 3])).shape == [2, 4, 3]
    with pytest.raises(ValueError, match=r"[Ii]ncompatible shapes"):
        gradient() + tf.ones([2])
    of_unknown_shape = tf.function(lambda x: gradient() * x, input_signature=[tf.TensorSpec(None)])
    assert of_unknown_shape(2.0).shape == [4, 3]


def test_its_value_is_an_error():
    """TensorFlow would take it for zeros, and give a norm of 0."""
    for compute in (tf.convert_to_tensor, tf.norm, lambda g: tf.constant(1.0) + g):
        with pytest.raises(ElsewhereError, match="rank 1 of the replica"):
            compute(gradient())
        with pytest.raises(ElsewhereError, match="rank 1 of the replica"):
            tf.function(compute, autograph=False)(gradient())
    assert is_elsewhere(tf.cast(gradient(), tf.float16))
    assert is_elsewhere(tf.clip_by_norm(gradient(), 1.0))


def test_it_knows_its_shape_and_kind_when_it_comes_out_of_a_function():
    rows = tf.IndexedSlices(tf.ones([1, 3]), tf.constant([2], tf.int64), tf.constant([4, 3]))
    made = tf.function(lambda: RemoteGradient.of(rows, 2, (5, 3)), autograph=False)()
    assert made.shape == [5, 3]
    assert made.process == 2
    assert made.sparse is not None
    assert made.sparse.indices == tf.int64
    assert (made / 2.0).sparse == made.sparse
    assert tf.function(gradient, autograph=False)().sparse is None


def test_a_leaf_is_put_together_unless_another_process_keeps_it():
    dense = Structure.of(tf.ones([4, 3]))
    assert pack(dense, [tf.zeros([4, 3])]).shape == [4, 3]
    assert pack(dense, [OwnedBy(2)]).process == 2
    slices = Structure.of(tf.IndexedSlices(tf.ones([1, 3]), tf.constant([2]), tf.constant([4, 3])))
    assert pack(slices, [OwnedBy(0)] * 3).shape == [4, 3]
    assert not is_elsewhere(pack(slices, slices.tensors))


def test_norms_of_ordinary_slices_are_those_of_tensorflow():
    """Slices are looked at, since they may stand for gradients of other processes."""
    slices = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([2, 1]), tf.constant([4, 3]))
    gradients = [slices, tf.ones([10]), None]
    (clipped, dense, nothing), norm = tf.clip_by_global_norm(gradients, 2.0)
    assert float(norm) == float(tf.linalg.global_norm(tuple(gradients))) == 4.0
    assert np.all(clipped.values == 0.5)
    assert np.all(dense == 0.5)
    assert nothing is None
    assert clipped.indices is slices.indices
    assert clipped.dense_shape is slices.dense_shape


@pytest.mark.parametrize("is_initialised", [False, True])
def test_slices_without_rows_in_one_process_are_those_of_tensorflow(smp_init, is_initialised):
    if is_initialised:
        smp_init({"partitions": 2})
    slices = tf.IndexedSlices(tf.zeros([0, 3]), tf.zeros([0], tf.int32), tf.constant([4, 3]))
    clipped, norm = tf.clip_by_global_norm([slices, tf.ones([4])], 1.0)
    assert float(norm) == float(tf.linalg.global_norm([slices, tf.ones([4])])) == 2.0
    assert clipped[0].shape == [4, 3]
    assert np.all(clipped[1] == 0.5)


def test_slices_without_rows_are_elsewhere():
    """TensorFlow makes them of `RemoteGradient`."""
    shape = tf.constant([5, 2])
    assert is_elsewhere(tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), shape))
    assert not is_elsewhere(tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), shape))
    assert not is_elsewhere(tf.zeros([0, 2]))
    assert not is_elsewhere(None)


def test_what_tensorflow_made_of_it_is_no_zeros():
    for compute in (lambda g: tf.cast(g, tf.float16), lambda g: tf.clip_by_norm(g, 1.0)):
        with pytest.raises(ElsewhereError, match="another rank"):
            tf.norm(compute(gradient()))


MICROBATCHES = 8

ONE_PLACEHOLDER = f"""
import numpy as np
import opensmp as smp

smp.init({{**{TWO_BY_FOUR}, "microbatches": {MICROBATCHES}}})
{STEP_OF_TWO}
rows = tf.reshape(tf.range({MICROBATCHES}.0 * 4), [{MICROBATCHES}, 4])

@tf.function
def each(x):
    gradients, _ = forward(x)
    return [[tf.convert_to_tensor(g) for g in row.outputs] for row in gradients]

@tf.function
def sums(x):
    gradients, _ = forward(x)
    return [g.reduce_sum() for g in gradients]

kept = forward.get_concrete_function(rows).structured_outputs[0]
remote = [row for row in kept if isinstance(row[0], tf.IndexedSlices)]
print(len(kept), [len(row) for row in remote], all(g is row[0] for row in remote for g in row))
for _ in range(10):
    values = each(rows)
first = [np.outer(row, [4.0] * 4) for row in rows]
second = [np.outer(row, [1.0] * 4) for row in tf.matmul(rows, tf.ones([4, 4]))]
np.testing.assert_array_equal(values[0], first)
np.testing.assert_array_equal(values[2], second)
kernel, bias, later_kernel, later_bias = sums(rows)
np.testing.assert_array_equal(kernel, np.sum(first, 0))
np.testing.assert_array_equal(bias, [{MICROBATCHES} * 4.0] * 4)
np.testing.assert_array_equal(later_kernel, np.sum(second, 0))
np.testing.assert_array_equal(later_bias, [{MICROBATCHES} * 1.0] * 4)
print("right")
"""


def test_gradients_of_all_microbatches_share_a_placeholder_and_keep_their_values():
    for result in check_ranks(ONE_PLACEHOLDER, 2):
        assert result.lines[-2:] == [f"4 {[MICROBATCHES] * 2} True", "right"]
