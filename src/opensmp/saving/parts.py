"""Parts of a checkpoint: files in TensorFlow's format that together make the whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import tensorflow as tf

Tensor = Any

_HOST = "CPU:0"
_WORTH_A_THREAD_BYTES = 16 << 20


class Named(NamedTuple):
    """A tensor and its key in the files."""

    name: str
    slice_spec: str
    tensor: Tensor


def write_part(prefix: str, values: Sequence[Named], threads: int) -> list[str]:
    """Writes tensors to files, several at a time if that is worth it.

    Args:
        prefix: What the names of the files begin with.
        values: The tensors.
        threads: The largest number of threads.

    Returns:
        The prefix of each set of files that was written.

    Raises:
        OSError, tf.errors.OpError: The files cannot be written.

    Example:
        ```python
        write_part("/tmp/part-0", [Named("step", "", tf.constant(7))], threads=1)
        ```
    """
    groups = divided(values, [size(value.tensor) for value in values], threads)
    prefixes = [f"{prefix}-{number}" for number in range(len(groups))]
    run_all(_write, list(zip(prefixes, groups, strict=True)))
    return prefixes


def _write(prefix: str, values: Sequence[Named]) -> None:
    with tf.device(_HOST):
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=[value.name for value in values],
            shape_and_slices=[value.slice_spec for value in values],
            tensors=[value.tensor for value in values],
        )


def merge_parts(prefixes: Sequence[str], prefix: str) -> None:
    """Makes one checkpoint of parts; their files are renamed.

    Args:
        prefixes: Those of the parts.
        prefix: That of the checkpoint.
    """
    with tf.device(_HOST):
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=list(prefixes), destination_prefix=prefix, delete_old_dirs=False
        )


def read_tensors(
    prefix: str, names: Sequence[str], dtypes: Sequence[Any], sizes: Sequence[int], threads: int
) -> list[Tensor]:
    """Reads tensors to host memory, several at a time if that is worth it.

    Args:
        prefix: That of the checkpoint.
        names: Keys of the tensors.
        dtypes: Their dtypes, as they are in the files.
        sizes: Their bytes, roughly.
        threads: The largest number of threads.

    Raises:
        tf.errors.OpError: The files cannot be read, or a checksum in them is wrong.
    """
    groups = divided(list(range(len(names))), sizes, threads)

    def read(*indices: int) -> list[Tensor]:
        with tf.device(_HOST):
            tensors: list[Tensor] = tf.raw_ops.RestoreV2(
                prefix=prefix,
                tensor_names=[names[i] for i in indices],
                shape_and_slices=[""] * len(indices),
                dtypes=[dtypes[i] for i in indices],
            )
        return tensors

    found = run_all(read, groups)
    tensors = dict(
        pair
        for group, values in zip(groups, found, strict=True)
        for pair in zip(group, values, strict=True)
    )
    return [tensors[i] for i in range(len(names))]


def divided(items: Sequence[Any], sizes: Sequence[int], threads: int) -> list[list[Any]]:
    """Divides items into groups of about equal size, in order; none is empty.

    There are no more groups than threads, and no more than are worth a thread each.

    Args:
        items: The items.
        sizes: Bytes of each.
        threads: The largest number of groups.

    Example:
        ```python
        divided("abc", [100 << 20, 50 << 20, 50 << 20], threads=2)  # [["a"], ["b", "c"]]
        ```
    """
    if not items:
        return []
    total = sum(sizes)
    count = max(1, min(threads, total // _WORTH_A_THREAD_BYTES))
    groups: list[list[Any]] = [[] for _ in range(count)]
    done = 0
    for item, bytes_of_item in zip(items, sizes, strict=True):
        # The group that the middle of the item falls into.
        middle = done + bytes_of_item // 2
        groups[min(count - 1, middle * count // max(1, total))].append(item)
        done += bytes_of_item
    return [group for group in groups if group]


def run_all(function: Any, arguments: Sequence[Sequence[Any]]) -> list[Any]:
    """Calls a function with several sets of arguments, each on a thread of its own."""
    if len(arguments) < 2:
        return [function(*each) for each in arguments]
    with ThreadPoolExecutor(len(arguments)) as pool:
        return [future.result() for future in [pool.submit(function, *a) for a in arguments]]


def size(tensor: Tensor) -> int:
    """Bytes of a tensor, roughly."""
    return int(tensor.shape.num_elements() or 1) * max(1, tensor.dtype.size or 1)


def usable_threads(local_size: int) -> int:
    """How many threads a process may use beside the others of its machine."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_size))
