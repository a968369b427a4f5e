from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opensmp.training.sync.fingerprint import MOST_NUMBERS, fingerprint

IMAGES = np.random.default_rng(0).normal(size=(20, 30, 30)).astype("float32")
LABELS = np.arange(20)


def test_equal_batches_have_equal_fingerprints_whatever_holds_them():
    one = fingerprint((IMAGES, {"labels": LABELS}))
    assert one == fingerprint((tf.constant(IMAGES), {"labels": tf.constant(LABELS)}))
    assert one.startswith("float32 [20, 30, 30], int64 [20]: ")


@pytest.mark.parametrize(
    "other",
    [
        (IMAGES[::-1], LABELS),
        (IMAGES, LABELS[::-1]),
        (IMAGES[:10], LABELS[:10]),
        (IMAGES.astype("float64"), LABELS),
        (np.roll(IMAGES, 1, axis=0), LABELS),
        (IMAGES, None),
    ],
)
def test_other_rows_another_order_or_another_type_make_another_fingerprint(other):
    assert fingerprint(other) != fingerprint((IMAGES, LABELS))


def test_all_rows_of_a_large_batch_are_looked_at():
    assert IMAGES.size > 2 * MOST_NUMBERS
    for row in range(20):
        changed = IMAGES.copy()
        changed[row] += 1.0
        assert fingerprint(changed) != fingerprint(IMAGES)


def test_texts_ragged_and_sparse_tensors_and_numbers_have_fingerprints():
    texts = tf.constant(["one", "two"])
    assert fingerprint(texts) == fingerprint(np.array([b"one", b"two"], object))
    assert fingerprint(texts) != fingerprint(tf.constant(["one", "too"]))
    ragged = [tf.ragged.constant([[1, 2], [3]]), tf.ragged.constant([[1], [2, 3]])]
    assert fingerprint(ragged[0]) != fingerprint(ragged[1])
    sparse = tf.sparse.from_dense([[0, 1], [2, 0]])
    assert fingerprint(sparse) != fingerprint(tf.sparse.from_dense([[1, 0], [2, 0]]))
    assert fingerprint((1.5, None)) != fingerprint((2.5, None))
    assert fingerprint(np.zeros((0, 3))) == fingerprint(tf.zeros((0, 3), tf.float64))


def test_texts_that_utf8_has_no_bytes_for_have_fingerprints():
    one, other = (np.array([text], object) for text in ("\udcff", "\udcfe"))
    assert fingerprint(one) != fingerprint(other)
