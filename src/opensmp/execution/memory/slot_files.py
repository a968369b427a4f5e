"""Keeps the optimizer's state of partitions elsewhere: in files, or in the memory of the host.

A slot of a partition on a CPU lies in a file of its own that is mapped into memory. The system
reads from the file what an update asks for, and takes back the memory of the rest when something
else needs it. TensorFlow's updates write their results into memory of their own, from which they
are copied into the file, one variable after another. A slot of a partition on an accelerator is a
variable of the host, as in ZeRO-Offload (Ren et al., "ZeRO-Offload: Democratizing Billion-Scale
Model Training", USENIX ATC 2021).
"""

from __future__ import annotations

import math
import mmap
import os
import re
from typing import Any

import numpy as np
import tensorflow as tf

from opensmp.config.offload import offloads_optimizer
from opensmp.distributed.transport.arrivals import in_place
from opensmp.distributed.world import World
from opensmp.errors import StepError
from opensmp.execution.memory.offload_places import on_cpu_device
from opensmp.execution.memory.spill_file import nameless_file

LEAST_BYTES = 1 << 20
"""Smaller slots stay in memory."""

_MAPPING = "_smp_mapping"
# Of each size of an element. NumPy does not have all of TensorFlow's types.
_INTEGER = {1: tf.uint8, 2: tf.uint16, 4: tf.uint32, 8: tf.uint64}


class SlotKeeper:
    """Where the slots of this process's optimizers lie.

    Args:
        world: The configuration and devices of the process.
    """

    def __init__(self, world: World) -> None:
        self._folder = world.config.offload_folder
        self._devices = tuple(
            world.devices[partition]
            for partition in world.my_partitions
            if offloads_optimizer(world.config.offload, partition)
        )

    @classmethod
    def of(cls, world: World) -> SlotKeeper | None:
        """The keeper of a process; None if its partitions offload no state of optimizers."""
        keeper = cls(world)
        return keeper if keeper._devices else None

    def device_of_slots(self, device: str) -> str:
        """See `opensmp._private.keras.kept_slots.Keeper`."""
        if on_cpu_device(device) or not device.endswith(self._devices):
            return device
        return re.sub(r"[^:/]+:\d+$", "CPU:0", device)

    def moves(self, slot: tf.Variable) -> bool:
        """See `opensmp._private.keras.kept_slots.Keeper`."""
        is_there = on_cpu_device(slot.device) and slot.device.endswith(self._devices)
        return is_there and slot.dtype.size in _INTEGER and _size_of(slot) >= LEAST_BYTES

    def keep(self, slot: tf.Variable) -> None:
        """Copies the value of a slot into its file, unless it is there, and frees its memory."""
        with tf.device(slot.device):
            value, size = slot.value(), _size_of(slot)
            if value.shape != slot.shape:  # it has no memory yet
                return
            known = getattr(slot, _MAPPING, None)
            if known is None or known.size != size:
                known = Mapping(str(self._folder), size)
                setattr(slot, _MAPPING, known)
            if not known.holds(value):
                known.write(value)
                slot.assign(known.tensor(slot.shape, slot.dtype))
        known.free_memory()


class Mapping:
    """A file without a name that is mapped into memory.

    Args:
        folder: An existing folder.
        size: Bytes.

    Raises:
        StepError: There is no room for it.
    """

    def __init__(self, folder: str, size: int) -> None:
        self.size = size
        descriptor = nameless_file(folder)
        try:
            # What has no room would end the process when it is written to.
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        except OSError as error:
            raise StepError(
                f"offload: {size} bytes of an optimizer's state could not be written to a file in "
                f"the folder '{folder}': {error.strerror}. Make room there, set offload_folder to "
                "a folder on another disk, or offload fewer partitions."
            ) from error
        finally:
            os.close(descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def holds(self, value: Any) -> bool:
        """Whether the memory of a tensor on a CPU is that of this file."""
        return bool(_bytes_of(value).ctypes.data == self._bytes.ctypes.data)

    def write(self, value: Any) -> None:
        """Copies a tensor into the file."""
        self._bytes[:] = _bytes_of(value)

    def tensor(self, shape: Any, dtype: Any) -> Any:
        """A tensor whose memory is the file; the mapping exists as long as it does."""
        integers = self._bytes.view(_INTEGER[dtype.size].as_numpy_dtype)
        return tf.reshape(tf.bitcast(in_place(integers), dtype), shape)

    def free_memory(self) -> None:
        """Lets the system have the memory; it reads from the file what is used again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _size_of(slot: tf.Variable) -> int:
    """Bytes of a slot; 0 if its shape is not known."""
    shape = slot.shape.as_list() if slot.shape.rank is not None else [0]
    return math.prod(size or 0 for size in shape) * int(slot.dtype.size)


def _bytes_of(value: Any) -> np.ndarray[Any, Any]:
    """The bytes of an eager tensor on a CPU, not copied."""
    integers = tf.bitcast(value, _INTEGER[value.dtype.size])
    return np.asarray(memoryview(integers)).reshape(-1).view(np.uint8)
