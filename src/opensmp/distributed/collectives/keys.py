"""Group and instance keys that pair the collective operations of different processes.

TensorFlow pairs collectives by two 32-bit keys. A group key fixes ranks and devices for the life of
the process; an instance key fixes operation, dtype, shape and source. Reusing a key with a second
meaning does not fail: it delivers uninitialized memory, or hangs. Therefore this module makes all
keys, computes them from their meaning only, so that they are the same in every process, and rejects
a second meaning.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from opensmp.errors import CommunicationError

_FIELD_BITS = 10  # per field of a regular group's key: start, stride, count
_HASHED = 1 << 30  # group keys from here on are hashes

_MOST = (1 << 31) - 1

_ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)  # irregular bits


class KeyRegistry:
    """Hands out keys and records their meanings. One per process; see `registry`."""

    def __init__(self) -> None:
        self._groups: dict[int, object] = {}
        self._instances: dict[tuple[int, int], tuple[object, ...]] = {}
        self._lock = threading.Lock()

    def group(self, ranks: Sequence[int], devices: Sequence[str] | None = None) -> int:
        """The key of a group of ascending ranks, the same in every process.

        Evenly spaced ranks below 1024, such as all groups of a world and all pairs, have a unique
        key; other groups get a hash, checked for collisions. Other `devices` than CPU:0 of each
        process make another group.
        """
        members = tuple(int(rank) for rank in ranks)
        if not members or any(a >= b for a, b in itertools.pairwise(members)):
            raise ValueError(f"ranks of a group must be different and ascending, not {members}")
        meaning: object = members if devices is None else (members, tuple(devices))
        key = _regular(members) if devices is None else None
        if key is None:
            key = _HASHED + _hash(meaning, _MOST - _HASHED)
        with self._lock:
            known = self._groups.setdefault(key, meaning)
        if known != meaning:
            raise CommunicationError(
                f"The groups {known} and {meaning} have the same key {key}. Expected: at most one "
                "of two such groups in a run. Use another number of processes or partitions."
            )
        return key

    def instance(self, group: int, meaning: tuple[object, ...]) -> int:
        """The key of one use of a group, the same in every process.

        `meaning` is all that distinguishes it from other uses: direction, dtype, shape, tensor,
        microbatch, as strings, numbers, None and tuples of them.
        """
        key = 1 + _hash(meaning, _MOST - 1)
        with self._lock:
            known = self._instances.setdefault((group, key), meaning)
        if known != meaning:
            raise CommunicationError(
                f"Instance key {key} of group {group} means {known} and cannot mean {meaning} as "
                "well: TensorFlow would deliver one as the other. Change a name or a shape of the "
                "model, so that the numbers change."
            )
        return key


registry = KeyRegistry()
"""The key registry of this process."""


def instance_of_shape(shape: Any) -> Any:
    """An int32 scalar >= 1, the instance key for a shape that is known only when the graph runs.

    It may equal that of any other use, so that the tensor needs a group of its own, in which such
    keys represent its shapes. Two shapes of the same length collide with a probability of 1 in
    2^31.
    """
    # Mixes each size and its index by the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast
    # splittable pseudorandom number generators", 2014); products keep their lower 64 bits.
    places = tf.constant([(i + 1) * _ODD[0] % (1 << 62) for i in range(shape.shape[0])], tf.int64)
    mixed = tf.cast(shape, tf.int64) + places
    for odd, bits in zip(_ODD[1:], (30, 27), strict=True):
        mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, _int64(bits))) * odd
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, _int64(31)))
    return tf.cast(1 + tf.reduce_sum(mixed) % (_MOST - 1), tf.int32)


def _int64(value: int) -> Any:
    return tf.constant(value, tf.int64)


def _regular(ranks: tuple[int, ...]) -> int | None:
    """Start, stride and count packed into one key; None unless the ranks are evenly spaced."""
    start, count = ranks[0], len(ranks)
    stride = ranks[1] - start if count > 1 else 1
    if ranks != tuple(range(start, start + count * stride, stride)):
        return None
    if max(start, stride, count) >> _FIELD_BITS:
        return None
    return (start << 2 * _FIELD_BITS) | (stride << _FIELD_BITS) | count


def _hash(meaning: object, below: int) -> int:
    # repr is the same in every process for strings, numbers and tuples of them; hash() is not.
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % below
