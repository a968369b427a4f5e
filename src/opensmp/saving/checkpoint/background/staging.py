"""Staging memory on the host: copies of values that training may change during the write."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.saving.checkpoint.bundle.tensor_bundle import PAGE_BYTES, Entry
from opensmp.saving.checkpoint.shards import Named

_WORTH_BYTES = 1 << 20  # smaller ones stay tensors: their checksums would be slow
_ALIGNMENT = 64
_PLAIN = frozenset(
    {tf.float16, tf.float32, tf.float64, tf.bfloat16}
    | {tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64}
)


class Staging:
    """Host memory for the values of one checkpoint, reused for the next one.

    Writing to memory that the operating system has just allocated takes ten times as long as
    writing to memory that has been used before. TensorFlow's copy-on-write of variables with other
    references is slow for this reason.
    """

    def __init__(self) -> None:
        self.memory: Any = np.zeros(0, np.uint8)

    def take(self, values: list[Named]) -> list[Entry]:
        """Moves large numeric values from the list to `memory`; returns their places.

        Each tensor is released as soon as it is copied. Values that are small, or are not plain
        numbers, stay in the list.
        """
        taken = [value for value in values if _fits(value)]
        kept = [value for value in values if not _fits(value)]
        values.clear()
        values += kept
        entries = _places(taken)
        if entries:
            self._reserve(entries[-1].offset + entries[-1].size)
        for entry in entries:
            np.copyto(
                self.memory[entry.offset : entry.offset + entry.size], _bytes(taken.pop(0).tensor)
            )
        return entries

    def _reserve(self, size: int) -> None:
        if self.memory.size >= size:
            return
        self.memory = np.zeros(0, np.uint8)  # free the old memory before allocating the new one
        size = -(-size // PAGE_BYTES) * PAGE_BYTES
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(
                f"{size / 2**20:,.0f} MiB of host memory for a copy of the values could not be "
                "had. Without background=True no copy is needed."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # 512 times fewer page faults at the first use
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        self.memory = np.frombuffer(pages, np.uint8)


def _fits(value: Named) -> bool:
    tensor = value.tensor
    return (
        tensor.dtype in _PLAIN
        and not value.slice_spec
        and _size(tensor) >= _WORTH_BYTES
        and "CPU" in tensor.device
    )


def _size(tensor: Any) -> int:
    return int(tensor.shape.num_elements() * tensor.dtype.size)


def _places(values: Sequence[Named]) -> list[Entry]:
    """Offsets of values in a block of memory."""
    entries = []
    offset = 0
    for name, _, tensor in values:
        size = _size(tensor)
        dtype = tensor.dtype.as_datatype_enum
        entries.append(Entry(name, dtype, tuple(tensor.shape), offset, size))
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return entries


def _bytes(tensor: Any) -> Any:
    """The bytes of a tensor in host memory, without a copy."""
    if tensor.dtype == tf.bfloat16:  # unknown to Python's buffer protocol
        with tf.device(tensor.device):
            tensor = tf.bitcast(tensor, tf.uint16)
    return np.asarray(memoryview(tensor)).reshape(-1).view(np.uint8)
