"""Short fingerprints of batches, to compare them between processes."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import tensorflow as tf

MOST_NUMBERS = 4096
"""Approximate number of sampled entries per tensor, evenly spaced."""


def fingerprint(nest: Any) -> str:
    """Dtypes, shapes and a checksum of sampled values of a batch.

    Equal batches have equal fingerprints; those of batches with other rows or another order differ,
    unless only a few entries of a large tensor differ.
    """
    words, sum_ = [], 0
    for leaf in tf.nest.flatten(nest, expand_composites=True):
        if leaf is None or isinstance(leaf, tf.experimental.Optional):
            words.append("none")
            continue
        if not (tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)):
            leaf = np.asarray(leaf)
        sample = _sample(leaf)
        words.append(f"{sample.dtype} {list(leaf.shape)}")
        sum_ = zlib.crc32(_bytes(sample), sum_)
    return f"{', '.join(words)}: {sum_:08x}"


def _sample(leaf: Any) -> Any:
    """Evenly spaced entries of a tensor or array, as a flat array."""
    size = int(np.prod(leaf.shape))
    # An odd stride reaches all columns of a matrix; an even one may reach only a few.
    step = max(1, size // MOST_NUMBERS) | 1
    if tf.is_tensor(leaf) and "CPU" not in leaf.device:  # only the sample leaves the device
        return tf.reshape(leaf, [-1])[::step].numpy()
    return np.asarray(leaf).reshape(-1)[::step]


def _bytes(sample: Any) -> bytes:
    if sample.dtype == object:
        return b"\0".join(
            each if isinstance(each, bytes) else str(each).encode("utf-8", "surrogatepass")
            for each in sample
        )
    return bytes(np.ascontiguousarray(sample).tobytes())
