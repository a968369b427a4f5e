"""Memory shared by two processes of one machine, and its layout.

Each transfer of a step has a slot: two buffers for the tensor, used alternately from run to run,
and a counter with the number of the last run whose tensor was written. Transfers share buffers if
one is read in every run before the other is sent. The only other shared number
is that of the runs that the receiver has ended. Each number has one writer, which changes it after
the data it refers to; a reader that reads the number first and the data afterwards sees complete
data. x86 processors guarantee this order; on others no memory is shared.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opensmp.base.types import Tensor
from opensmp.distributed.transport.transfer import Transfer

Pair = tuple[int, int]
Array = np.ndarray[Any, Any]
Gather = Callable[[Any], list[Any]]

MOST_BYTES = 512 * 1024 * 1024
"""Maximum shared memory per step and pair of processes; held as long as the step exists."""

PLACES = 2
"""Buffers per tensor: one for this run, one for the next."""

_NONCE_BYTES = 16
_ALIGNMENT = 64
_ENDED = 64  # offset of the number of runs that the receiver has ended
_COUNTERS = 128
_WORD = np.dtype(np.int32)  # TensorFlow copies these faster than single bytes
_CAN_SHARE = hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_DTYPES = frozenset(
    ("bool", *_FLOATS, *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)


class Slot(NamedTuple):
    """Location of a tensor in the memory of a pair of processes.

    Attributes:
        position: Index among the slots of the pair.
        offset: First byte of the first of its buffers, which are contiguous; the same for slots
            that use them one after the other.
        num_bytes: Size of the tensor; 0 if the transfer has no tensor.
    """

    position: int
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Offset at which the next slot begins."""
        return _aligned(self.offset + PLACES * self.num_bytes)


class Room(NamedTuple):
    """Layout of the memory by which one process sends to another in one step: slot by transfer."""

    slots: Mapping[int, Slot]
    size: int


def rooms(
    transfers: Sequence[Transfer], machines: Sequence[str], read_before: Sequence[int] = ()
) -> dict[Pair, Room]:
    """Chooses the transfers that use shared memory, and lays it out by pair of source and target.

    `machines` are those of the processes of the replica. `read_before` has for each transfer a bit
    set of those that are read in every run before it is sent, whose buffers it may use. The result
    is the same in all processes.
    """
    chosen: dict[Pair, list[tuple[int, Transfer]]] = {}
    for number, transfer in enumerate(transfers):
        if machines[transfer.source] == machines[transfer.target] and _fits(transfer.tensor):
            chosen.setdefault((transfer.source, transfer.target), []).append((number, transfer))
    found = {}
    for pair, listed in chosen.items():
        slots: dict[int, Slot] = {}
        last: list[int] = []  # the transfer that uses each buffer last
        offset = _aligned(_COUNTERS + 8 * len(listed))
        earlier = read_before or [0] * len(transfers)
        # A transfer that another one may follow has a smaller set.
        for number, transfer in sorted(listed, key=lambda each: earlier[each[0]].bit_count()):
            num_bytes = _num_bytes(transfer.tensor)
            for i, other in enumerate(last):
                if earlier[number] >> other & 1 and slots[other].num_bytes == num_bytes:
                    slots[number] = Slot(len(slots), slots[other].offset, num_bytes)
                    last[i] = number
                    break
            else:
                slot = Slot(len(slots), offset, num_bytes)
                if slot.end <= MOST_BYTES:
                    slots[number] = slot
                    offset = slot.end
                    last.append(number)
        if slots:
            found[pair] = Room(slots, offset)
    return found


def _fits(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    known = tensor.dtype.name in _DTYPES and tensor.shape.is_fully_defined()
    return bool(known and tensor.shape.num_elements())


def _num_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.shape.num_elements() * tensor.dtype.size)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


class Memory:
    """The memory of one room, mapped into one of its two processes.

    Args:
        room: The layout.
        descriptor: The open file of the memory; may be closed afterwards.

    Attributes:
        counters: By position of a slot, the last run for which it was written; int64.
        ended: Number of runs that the receiver has ended, shape `[1]`, int64.
    """

    def __init__(self, room: Room, descriptor: int) -> None:
        self._bytes = mmap.mmap(descriptor, room.size)
        self.counters = np.frombuffer(self._bytes, np.int64, len(room.slots), _COUNTERS)
        self.ended = np.frombuffer(self._bytes, np.int64, 1, _ENDED)

    @property
    def nonce(self) -> bytes:
        """Random bytes by which the receiver checks that it has opened the right memory."""
        return self._bytes[:_NONCE_BYTES]

    def offer(self) -> None:
        """Writes the nonce, after which another process may open the memory."""
        self._bytes[:_NONCE_BYTES] = secrets.token_bytes(_NONCE_BYTES)

    def places(self, slot: Slot) -> Array:
        """The buffers of a slot, shape `[PLACES, words]`; int32, or uint8 for odd sizes."""
        word = np.dtype(np.uint8 if slot.num_bytes % _WORD.itemsize else _WORD)
        count = PLACES * slot.num_bytes // word.itemsize
        return np.frombuffer(self._bytes, word, count, slot.offset).reshape(PLACES, -1)


def share(all_rooms: Mapping[Pair, Room], process: int, gather: Gather) -> dict[Pair, Memory]:
    """Creates and opens the memory that this process shares with others, by pair.

    It belongs to no named file, so that nothing is left behind however the processes end. All
    processes of the replica call it. Both processes leave a pair out if one cannot open the other's
    memory, as in different containers.
    """
    if not all_rooms:
        return {}
    memories: dict[Pair, Memory] = {}
    offered: dict[Pair, tuple[int, int, bytes]] = {}
    for pair in [pair for pair in all_rooms if pair[0] == process and _CAN_SHARE]:
        descriptor = os.memfd_create("opensmp")
        os.ftruncate(descriptor, all_rooms[pair].size)
        memories[pair] = memory = Memory(all_rooms[pair], descriptor)
        memory.offer()
        offered[pair] = os.getpid(), descriptor, memory.nonce
    offers = {pair: offer for each in gather(offered) for pair, offer in each.items()}
    for pair in [pair for pair in all_rooms if pair[1] == process and pair in offers]:
        memory_or_none = _opened(all_rooms[pair], *offers[pair])
        if memory_or_none is not None:
            memories[pair] = memory_or_none
    seen = {pair for each in gather([p for p in memories if p[1] == process]) for pair in each}
    for _, descriptor, _ in offered.values():
        os.close(descriptor)
    return {pair: memory for pair, memory in memories.items() if pair in seen}


def _opened(room: Room, process_id: int, descriptor: int, nonce: bytes) -> Memory | None:
    """Opens the memory that another process offers; None if it cannot be accessed."""
    try:
        own = os.open(f"/proc/{process_id}/fd/{descriptor}", os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(own).st_size != room.size:
            return None
        memory = Memory(room, own)
    finally:
        os.close(own)
    return memory if memory.nonce == nonce else None
