"""The package's only gather, in rank order.

`CollectiveGatherV2`, like every collective whose result depends on an order, uses TensorFlow's
order of processes: by task name, compared as text. Task 10 comes before task 2, so that this is not
the rank order from eleven processes on, or in any group whose ranks differ in their number of
digits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.base.types import Tensor
from opensmp.distributed.launch.cluster import task_name


def tasks_in_order(ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks of a group in TensorFlow's order of their processes, by name: `(10, 100, 2, 9)`."""
    return tuple(sorted(ranks, key=task_name))


def gather_by_rank(
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    group: Any,
    instance: Any,
    tokens: Sequence[Tensor] = (),
) -> Tensor:
    """Concatenates a tensor of each rank along the first axis, in rank order.

    Must run on the host device of this process, the current device; all ranks call it with the same
    dtype (float32, float64, int32 or int64) and known shape of one dimension or more. Operations
    that share one of the resources `tokens` run in the order in which they were made.
    """
    tensor = tf.convert_to_tensor(tensor)
    rows = tf.raw_ops.CollectiveGatherV2(
        input=tensor,
        group_size=len(ranks),
        group_key=group,
        instance_key=instance,
        ordering_token=tokens,
        timeout_seconds=0,  # any other value leaves a thread behind
    )
    shape = tensor.shape.as_list()
    order = _where_each_is(tuple(ranks))
    if order is not None:
        by_task = tf.reshape(rows, [len(ranks), *shape])
        rows = tf.reshape(tf.gather(by_task, order), [len(ranks) * shape[0], *shape[1:]])
    rows.set_shape([len(ranks) * shape[0], *shape[1:]])
    return rows


@functools.lru_cache(maxsize=1024)
def _where_each_is(ranks: tuple[int, ...]) -> Any:
    """Position of each rank in TensorFlow's order; None if that is the rank order."""
    by_task = tasks_in_order(ranks)
    if by_task == ranks:
        return None
    places = {rank: place for place, rank in enumerate(by_task)}
    return np.array([places[rank] for rank in ranks], np.int32)
