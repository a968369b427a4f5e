"""`smp.shard`: the shard of the data that a model replica trains on."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from opensmp.distributed.world import DP_GROUP, current
from opensmp.errors import ConfigError

_UNKNOWN = (tf.data.UNKNOWN_CARDINALITY, tf.data.INFINITE_CARDINALITY)


def shard(data: Any, batched: bool = False) -> Any:
    """Returns this replica's shard of a dataset or of arrays.

    All ranks of a replica get the same shard and different replicas get disjoint shards. All shards
    have the same length, because a replica with more batches than the others would wait for them
    forever. For a dataset of unknown length, such as one from a generator, the trailing elements
    that do not suffice for all replicas are dropped. With one replica, all data is returned.

    If you shuffle before sharding, use the same seed on all ranks; otherwise some examples would be
    lost and others duplicated.

    Args:
        data: A `tf.data.Dataset`, or an array, a tensor, or a nest of these.
        batched: Whether the elements of the dataset are batches to be split over the replicas, so
            that all replicas together see the same batches as a single process; otherwise whole
            elements are distributed round-robin. Arrays and tensors are always split along their
            first axis: concatenating the shards gives the original.

    Returns:
        A dataset, or the same nest.

    Raises:
        NotInitializedError: `smp.init` has not been called.
        ConfigError: The number of elements, or of examples in an array, is not a multiple of the
            number of replicas.
        tf.errors.InvalidArgumentError: While a dataset runs: the same for a batch of it.

    Example:
        ```python
        dataset = tf.data.Dataset.from_tensor_slices((images, labels))
        dataset = dataset.shuffle(10_000, seed=0).batch(128, drop_remainder=True)
        dataset = smp.shard(dataset, batched=True)  # 32 of each 128 with 4 replicas
        ```
    """
    world = current("smp.shard")
    number, count = world.rank_in(DP_GROUP), len(world.group(DP_GROUP))
    if not isinstance(data, tf.data.Dataset):
        return tf.nest.map_structure(lambda leaf: _part(leaf, number, count), data)
    if count == 1:
        return data
    if batched:
        is_tuple = isinstance(data.element_spec, tuple)

        @tf.autograph.experimental.do_not_convert
        def part(*batch: Any) -> Any:
            parts = tf.nest.map_structure(lambda leaf: _part(leaf, number, count), batch)
            return parts if is_tuple else parts[0]

        return data.map(part, num_parallel_calls=tf.data.AUTOTUNE)
    length = int(data.cardinality())
    if length not in _UNKNOWN and length % count:
        raise ConfigError(
            f"smp.shard: a dataset of {length} elements cannot be divided among {count} replicas. "
            f"Expected: a multiple of {count}. Use dataset.take({length // count * count}), or "
            "batches, drop_remainder=True and smp.shard(dataset, batched=True)."
        )
    if length != tf.data.UNKNOWN_CARDINALITY:
        return data.shard(count, number)

    @tf.autograph.experimental.do_not_convert
    def mine(*window: Any) -> Any:
        element = tf.data.Dataset.zip(window if len(window) > 1 else window[0])
        return element.skip(number).take(1)

    return data.window(count, drop_remainder=True).flat_map(mine)


def _part(leaf: Any, number: int, count: int) -> Any:
    """Slice `number` of `count` equal slices along the first axis."""
    if not hasattr(leaf, "shape"):
        leaf = tf.convert_to_tensor(leaf)
    shape = tuple(leaf.shape)
    length = shape[0] if shape else 0
    if length is not None:
        if not shape or length % count:
            raise ConfigError(
                f"smp.shard: an array of shape {shape} cannot be divided among {count} replicas. "
                f"Expected: a first dimension that is a multiple of {count}."
                + (f" Leave {length % count} examples out, or add some." if shape else "")
            )
        each = length // count
        return leaf[number * each : (number + 1) * each]
    length = tf.shape(leaf)[0]
    check = tf.debugging.assert_equal(
        length % count,
        0,
        message=f"smp.shard: a batch cannot be divided among {count} replicas. Use batch sizes "
        f"that are multiples of {count}, and drop_remainder=True.",
    )
    with tf.control_dependencies([] if check is None else [check]):
        each = length // count
        return leaf[number * each : (number + 1) * each]
