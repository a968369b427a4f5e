"""Shards of a checkpoint: files in TensorFlow's format, one set per process, that are merged."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp.base.types import Tensor
from opensmp.saving.atomic import to_disk
from opensmp.saving.checkpoint.directory.names import data_files, index_path

_HOST = "CPU:0"
_WORTH_A_THREAD_BYTES = 16 << 20
_LOWEST_PRIORITY = 19


class Named(NamedTuple):
    """A tensor and its key in the files."""

    name: str
    slice_spec: str
    tensor: Tensor


def write_part(prefix: str, values: Sequence[Named]) -> list[str]:
    """Writes tensors to files and flushes them to disk; returns the prefix, if there are any.

    Uses one thread: in measurements, two threads writing to one disk were not faster, and at times
    three times slower.
    """
    if not values:
        return []
    with tf.device(_HOST):
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=[value.name for value in values],
            shape_and_slices=[value.slice_spec for value in values],
            tensors=[value.tensor for value in values],
        )
    for path in (*data_files(prefix), index_path(prefix)):
        to_disk(path)
    return [prefix]


def merge_parts(prefixes: Sequence[str], prefix: str) -> None:
    """Merges shards of the given prefixes into checkpoint `prefix`, by renaming their files."""
    with tf.device(_HOST):
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=list(prefixes), destination_prefix=prefix, delete_old_dirs=False
        )


def read_tensors(
    prefix: str, names: Sequence[str], dtypes: Sequence[Any], sizes: Sequence[int], threads: int
) -> list[Tensor]:
    """Reads tensors, of about `sizes` bytes, into host memory, in parallel if they are large."""
    groups = divided(list(range(len(names))), sizes, threads)

    def read(indices: Sequence[int]) -> list[Tensor]:
        with tf.device(_HOST):
            tensors: list[Tensor] = tf.raw_ops.RestoreV2(
                prefix=prefix,
                tensor_names=[names[i] for i in indices],
                shape_and_slices=[""] * len(indices),
                dtypes=[dtypes[i] for i in indices],
            )
        return tensors

    with ThreadPoolExecutor(max(1, len(groups))) as pool:
        found = list(pool.map(read, groups))
    tensors = dict(
        pair
        for group, values in zip(groups, found, strict=True)
        for pair in zip(group, values, strict=True)
    )
    return [tensors[i] for i in range(len(names))]


def divided(items: Sequence[Any], sizes: Sequence[int], threads: int) -> list[list[Any]]:
    """Divides items into non-empty groups of about equal total size, in order.

    There are at most as many groups as threads, and as many as justify a thread each.
    """
    if not items:
        return []
    total = sum(sizes)
    count = max(1, min(threads, total // _WORTH_A_THREAD_BYTES))
    groups: list[list[Any]] = [[] for _ in range(count)]
    done = 0
    for item, bytes_of_item in zip(items, sizes, strict=True):
        # The group that contains the midpoint of the item.
        middle = done + bytes_of_item // 2
        groups[min(count - 1, middle * count // max(1, total))].append(item)
        done += bytes_of_item
    return [group for group in groups if group]


def at_low_priority(function: Callable[[], Any]) -> Any:
    """Runs a function on a thread of lowest priority; returns its result or raises its exception.

    The function must not start threads, nor call code that might: they would inherit the priority
    and remain slow.
    """

    def run() -> Any:
        with contextlib.suppress(OSError):  # not permitted on some systems
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        return function()

    with ThreadPoolExecutor(1, "opensmp-low-priority") as pool:
        try:
            done = pool.submit(run)
        except RuntimeError:  # the program is ending, so no other work competes
            return function()
        return done.result()


def on_host(tensor: Tensor) -> Tensor:
    """Copies a tensor from a GPU to host memory; other tensors are returned as they are."""
    if "GPU" not in tensor.device:
        return tensor
    with tf.device(_HOST):
        return tf.identity(tensor)


def usable_threads(local_size: int) -> int:
    """Number of threads that a process may use, given the number of processes on its machine."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_size))
