"""Gathers the sparse gradients of replicas by concatenating their slices.

The slices stay sparse even where the dense gradient would be smaller: some Keras optimizers, such
as Adam, square each slice rather than the sum of those of one row, so that the dense gradient would
give other results than the whole batch in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from opensmp.base.types import Tensor
from opensmp.distributed.collectives.reduce import all_reduce, gather_rows
from opensmp.distributed.launch import cluster

_GATHERED = (tf.float32, tf.float64)


def slices_of_all(
    slices: tf.IndexedSlices, ranks: Sequence[int], *, name: str, is_even: bool = False
) -> tf.IndexedSlices:
    """Concatenates the slices of all ranks, in rank order. All of them call it.

    Their number may be known only when the graph runs, and be 0. `is_even` says that all ranks have
    the same number, which saves counting them.
    """
    members = tuple(ranks)
    values, indices = map(tf.convert_to_tensor, (slices.values, slices.indices))
    if len(members) == 1:
        return tf.IndexedSlices(values, indices, slices.dense_shape)
    known = values.shape.is_fully_defined() and indices.shape.is_fully_defined()
    if known and is_even and values.dtype in _GATHERED:
        values, indices = (gather_rows(t, members, name=name) for t in (values, indices))
        return tf.IndexedSlices(values, indices, slices.dense_shape)
    # The numbers of slices differ: each rank pads with zeros where the others have theirs.
    me = members.index(cluster.needed(name, members).rank)
    own = tf.shape(indices)[0]
    (counts,) = all_reduce(
        [own * tf.one_hot(me, len(members), dtype=tf.int32)], members, name=f"counting for {name}"
    )
    around = [tf.reduce_sum(counts[:me]), tf.reduce_sum(counts[me + 1 :])]

    def padded(tensor: Tensor) -> Tensor:
        return tf.pad(tensor, [around] + [[0, 0]] * (tensor.shape.rank - 1))

    values, indices = all_reduce([padded(values), padded(indices)], members, name=name)
    return tf.IndexedSlices(values, indices, slices.dense_shape)
