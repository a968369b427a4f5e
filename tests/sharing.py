"""Transfers between two processes that are one, for tests of shared memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp.distributed.transport.shared_memory import Memory, Pair, Room, share
from opensmp.distributed.transport.transfer import Transfer

LARGE = [20_000]
HERE = ["a", "a"]
"""The machines of two processes."""


def transfer(
    shape: Sequence[int | None], dtype: Any = "float32", source: int = 0, target: int = 1
) -> Transfer:
    """A transfer of a tensor of some shape."""
    with tf.Graph().as_default():
        tensor = tf.compat.v1.placeholder(dtype, shape)
    return Transfer(tensor.op, tensor, source, target)


def share_in_two_threads(
    all_rooms: Mapping[Pair, Room],
) -> tuple[dict[Pair, Memory], dict[Pair, Memory]]:
    """`share` as two processes would call it: what each of them gets."""
    barrier = threading.Barrier(2)
    box: dict[tuple[int, int], Any] = {}
    results: dict[int, dict[Pair, Memory]] = {}

    def run(process: int) -> None:
        count = iter(range(100))

        def gather(value: Any) -> list[Any]:
            key = next(count)
            box[key, process] = value
            barrier.wait(60)
            return [box[key, 0], box[key, 1]]

        results[process] = share(all_rooms, process, gather)

    threads = [threading.Thread(target=run, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]
