"""A file without a name that holds tensors while memory does not.

Its blocks are allocated when a step runs, not when it is traced, so that runs that overlap, such as
iterations of a `tf.while_loop`, never write over each other.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from opensmp.errors import StepError

Array = np.ndarray[Any, Any]

MOST_COPIES = 16
"""Copies of one tensor that are kept if nothing reads them, as after an error. TensorFlow runs at
most 10 iterations of a loop at once."""

_ALIGNMENT = 64  # TensorFlow uses an array without a copy if it is aligned like this
_PAGE = 4096


class Block(NamedTuple):
    """A part of the file, in bytes."""

    offset: int
    size: int


def nameless_file(folder: str) -> int:
    """Creates a file that the system deletes when nothing has it open or mapped any more."""
    descriptor, path = tempfile.mkstemp(dir=folder, prefix="opensmp-")
    os.unlink(path)
    return descriptor


class SpillFile:
    """A file in a folder, which the system deletes when this process ends, however it ends.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._descriptor = nameless_file(folder)
        self._free: list[Block] = []  # by offset, none adjacent
        self._size = 0
        self._lock = threading.Lock()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            os.close(self._descriptor)

    @property
    def num_bytes(self) -> int:
        """Size of the file, including what is free in it."""
        return self._size

    @property
    def used_bytes(self) -> int:
        """Size of the allocated blocks."""
        with self._lock:
            return self._size - sum(block.size for block in self._free)

    def write(self, data: Array) -> Block:
        """Writes an array of bytes into a block of its own."""
        block = self._allocate(len(data))
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:].data, block.offset + written)
        except OSError as error:
            self.free(block)
            raise StepError(
                f"offload: {len(data)} bytes could not be written to a file in the folder "
                f"'{self.folder}', which holds {self.used_bytes} bytes for this process: "
                f"{error.strerror}. Make room there, set offload_folder to a folder on another "
                "disk, or offload fewer partitions."
            ) from error
        return block

    def read(self, block: Block, size: int) -> Array:
        """Returns the first `size` bytes of a block, aligned for TensorFlow."""
        room = np.empty(size + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        data = room[start : start + size]
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [data[done:].data], block.offset + done)
            if not count:
                raise StepError(
                    f"offload: a file in the folder '{self.folder}' ended {size - done} bytes "
                    "early: something else has changed it. Start again from a checkpoint."
                )
            done += count
        return data

    def free(self, block: Block) -> None:
        """Lets other tensors use a block."""
        with self._lock:
            merged = block
            rest = []
            for other in self._free:
                if other.offset + other.size == merged.offset:
                    merged = Block(other.offset, other.size + merged.size)
                elif merged.offset + merged.size == other.offset:
                    merged = Block(merged.offset, merged.size + other.size)
                else:
                    rest.append(other)
            self._free = sorted([*rest, merged])

    def _allocate(self, size: int) -> Block:
        size = -(-size // _PAGE) * _PAGE
        with self._lock:
            for i, block in enumerate(self._free):
                if block.size >= size:
                    rest = Block(block.offset + size, block.size - size)
                    self._free[i : i + 1] = [rest] if rest.size else []
                    return Block(block.offset, size)
            found = Block(self._size, size)
            if self._free and sum(self._free[-1]) == self._size:  # its end is that of the file
                found = Block(self._free.pop().offset, size)
            self._size = found.offset + size
            return found


class Spill:
    """One tensor of a step, of which each run writes a copy of its own.

    Args:
        file: The file.
        shape: Shape of the tensor.
        dtype: Its dtype, in NumPy.

    Attributes:
        own_reads: How often the graph that writes a copy reads it.
    """

    def __init__(self, file: SpillFile, shape: Sequence[int], dtype: Any) -> None:
        self._file = file
        self._shape = tuple(shape)
        self._dtype = np.dtype(dtype)
        self._numbers = itertools.count()
        self._copies: dict[int, Block] = {}  # by number, the oldest first
        self._reads: dict[int, int] = {}
        self._lock = threading.Lock()
        self._requests: list[int] = []
        self.own_reads = 0

    def request(self, reads: int) -> None:
        """Records that a graph is complete, runs of which read a copy so often."""
        if reads or not self._requests:
            self._requests = [*filter(None, self._requests), reads]

    @property
    def num_reads(self) -> int | None:
        """How often a copy is read before it is free; None if that is not known."""
        if len(self._requests) != 1:  # none yet, or several, which run in any number
            return None
        return self.own_reads + self._requests[0]

    def write(self, value: Array) -> Any:
        """Writes a copy, and returns its number."""
        number = next(self._numbers)
        if self.num_reads == 0:
            return np.int64(number)
        block = self._file.write(value.reshape(-1).view(np.uint8))
        with self._lock:
            self._copies[number] = block
            while len(self._copies) > MOST_COPIES:
                self._forget(next(iter(self._copies)))
        return np.int64(number)

    def read(self, number: Any, _: Any = None) -> Array:
        """Returns a copy."""
        key = int(number)
        size = math.prod(self._shape) * self._dtype.itemsize
        with self._lock:
            block = self._copies.get(key)
        data = None if block is None else self._file.read(block, size)
        with self._lock:
            if data is None or key not in self._copies:
                raise StepError(
                    "offload: residuals of a call of the model are not there any more: their "
                    f"gradients were taken more than {MOST_COPIES} calls later, or a second time "
                    "by a function that was traced later. Take all gradients in the function that "
                    'calls the model, or set "offload" to "none".'
                )
            self._reads[key] = self._reads.get(key, 0) + 1
            if self._reads[key] == self.num_reads:
                self._forget(key)
        found: Array = data.view(self._dtype).reshape(self._shape)
        return found

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            for key in list(self._copies):
                self._forget(key)

    def _forget(self, number: int) -> None:
        self._reads.pop(number, None)
        self._file.free(self._copies.pop(number))
