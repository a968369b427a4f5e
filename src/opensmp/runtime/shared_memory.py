"""Moves tensors between processes of one machine through memory that both see.

The collectives would copy a tensor five times on its way through gRPC and two sockets, on the
cores that compute. Here the sender copies it into memory that it shares with the receiver, and
the collectives carry only the word that it is there. Nobody waits in Python for anybody: the
receiver copies the tensor out when the word has come.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp.errors import CommunicationError
from opensmp.runtime.localise import Transfer
from opensmp.runtime.transport import Transport

Op = Any
Tensor = Any
Pair = tuple[int, int]
Array = np.ndarray[Any, Any]
Gather = Callable[[Any], list[Any]]

SMALLEST_BYTES = 64 * 1024
"""Smaller tensors are not worth the two calls of Python."""

MOST_BYTES = 256 * 1024 * 1024
"""Most memory of one step that one process shares with another. It is held as long as the step."""

_NONCE_BYTES = 16
_ALIGNMENT = 64
_COUNTERS = 2  # per slot: how often it was written, how often read
_PATIENCE_SECONDS = 60.0
_CAN_SHARE = hasattr(os, "memfd_create")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_DTYPES = frozenset(
    (*_FLOATS, *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)


class Slot(NamedTuple):
    """Where in the memory of a pair of processes a tensor lies.

    Attributes:
        number: Position among the slots of the pair.
        offset: First byte.
        shape: Shape of the tensor.
        dtype: Its dtype.
    """

    number: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Room(NamedTuple):
    """What one process sends to another by shared memory in one step.

    Attributes:
        slots: Number of a transfer to its slot.
        size: Bytes of the memory.
    """

    slots: Mapping[int, Slot]
    size: int


def rooms(transfers: Sequence[Transfer], machines: Sequence[str]) -> dict[Pair, Room]:
    """Which transfers go by shared memory, and where they lie in it.

    Args:
        transfers: All transfers of a step.
        machines: Where each process of the replica runs.

    Returns:
        By pair of source and target; the same in all processes.
    """
    chosen: dict[Pair, list[tuple[int, Transfer]]] = {}
    for number, transfer in enumerate(transfers):
        if machines[transfer.source] == machines[transfer.target] and _fits(transfer.tensor):
            chosen.setdefault((transfer.source, transfer.target), []).append((number, transfer))
    found = {}
    for pair, listed in chosen.items():
        slots: dict[int, Slot] = {}
        offset = _aligned(_NONCE_BYTES + 8 * _COUNTERS * len(listed))
        for number, transfer in listed:
            assert transfer.tensor is not None
            shape = tuple(transfer.tensor.shape.as_list())
            dtype = np.dtype(transfer.tensor.dtype.as_numpy_dtype)
            size = _num_bytes(transfer.tensor)
            if offset + size <= MOST_BYTES:
                slots[number] = Slot(len(slots), offset, shape, dtype)
                offset = _aligned(offset + size)
        if slots:
            found[pair] = Room(slots, offset)
    return found


def _fits(tensor: Tensor | None) -> bool:
    if tensor is None or not tensor.shape.is_fully_defined():
        return False
    return tensor.dtype.name in _DTYPES and _num_bytes(tensor) >= SMALLEST_BYTES


def _num_bytes(tensor: Tensor) -> int:
    return int(tensor.shape.num_elements() * tensor.dtype.size)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


class Memory:
    """The memory of a room, as one of its two processes sees it.

    Args:
        room: What is in it.
        descriptor: The open file that the memory belongs to; it may be closed afterwards.
    """

    def __init__(self, room: Room, descriptor: int) -> None:
        self._room = room
        self._bytes = mmap.mmap(descriptor, room.size)
        count = _COUNTERS * len(room.slots)
        counters = np.frombuffer(self._bytes, np.int64, count, _NONCE_BYTES)
        self._written, self._read = counters[::_COUNTERS], counters[1::_COUNTERS]

    @property
    def nonce(self) -> bytes:
        """By which the receiver knows that it has opened the right memory."""
        return self._bytes[:_NONCE_BYTES]

    @nonce.setter
    def nonce(self, value: bytes) -> None:
        self._bytes[:_NONCE_BYTES] = value

    def put(self, number: int, value: Array) -> Array:
        """Copies a tensor in; gives the number of the use, for the receiver."""
        slot = self._room.slots[number]
        self._wait_until_read(slot)
        np.copyto(self._view(slot), value)
        self._written[slot.number] += 1
        return np.asarray(self._written[slot.number] % 2**31, np.int32)

    def get(self, number: int, use: Array) -> Array:
        """Copies the tensor of a use out."""
        slot = self._room.slots[number]
        written = self._written[slot.number]
        if written % 2**31 != use or self._read[slot.number] != written - 1:
            raise CommunicationError(
                f"A tensor of shape {slot.shape} and dtype {slot.dtype} came through shared "
                f"memory out of turn: expected use {self._read[slot.number] + 1}, received "
                f"{use} of {written}. An earlier step was interrupted; start all ranks again."
            )
        value: Array = self._view(slot).copy()
        self._read[slot.number] += 1
        return value

    def _view(self, slot: Slot) -> Array:
        count = int(np.prod(slot.shape))
        return np.frombuffer(self._bytes, slot.dtype, count, slot.offset).reshape(slot.shape)

    def _wait_until_read(self, slot: Slot) -> None:
        """The receiver may be a moment behind, since it gets the word before it copies."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while self._read[slot.number] != self._written[slot.number]:
            if time.monotonic() > end:
                raise CommunicationError(
                    f"A tensor of shape {slot.shape} and dtype {slot.dtype} was sent through "
                    f"shared memory and not taken out for {_PATIENCE_SECONDS:.0f} s. The "
                    "receiving rank has stopped in the middle of a step; start all ranks again."
                )
            time.sleep(50e-6)


def share(all_rooms: Mapping[Pair, Room], process: int, gather: Gather) -> dict[Pair, Memory]:
    """Makes the memory that this process shares with others.

    It belongs to no file, so that nothing is left behind however the processes end.

    Args:
        all_rooms: The rooms of all pairs of the replica, the same in all its processes.
        process: Position of this process in the replica.
        gather: Gathers an object of each process of the replica.

    Returns:
        The memory of this process's pairs. A pair whose processes cannot see each other's
        memory, because they run in different containers, is left out, in both processes.
    """
    if not all_rooms:
        return {}
    memories: dict[Pair, Memory] = {}
    offered: dict[Pair, tuple[int, int, bytes]] = {}
    for pair in [pair for pair in all_rooms if pair[0] == process and _CAN_SHARE]:
        descriptor = os.memfd_create("opensmp")
        os.ftruncate(descriptor, all_rooms[pair].size)
        memories[pair] = memory = Memory(all_rooms[pair], descriptor)
        memory.nonce = secrets.token_bytes(_NONCE_BYTES)
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
    """The memory that another process offers; None if it is not to be seen from here."""
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


class SharedMemoryTransport:
    """Transfers by shared memory where there is some, else by another transport.

    Args:
        rest: Carries all else, and the word that a tensor is there.
        all_rooms: What goes by shared memory.
        memories: The memory of this process's pairs, from `share`.
        device: Host device of this process.
    """

    def __init__(
        self,
        rest: Transport,
        all_rooms: Mapping[Pair, Room],
        memories: Mapping[Pair, Memory],
        device: str,
    ) -> None:
        self._rest = rest
        self._rooms = all_rooms
        self._memories = memories
        self._device = device

    def send(self, transfer: Transfer, number: int, tensor: Tensor) -> Op:
        """Emits the sending end; see `Transport`."""
        memory = self._memory(transfer, number)
        if memory is None:
            return self._rest.send(transfer, number, tensor)

        def put(value: Array) -> Array:
            return memory.put(number, value)

        with tf.device(self._device):
            word = tf.numpy_function(put, [tensor], tf.int32, stateful=False, name="share")
            word.set_shape([])
            return self._rest.send(transfer, number, word)

    def receive(self, transfer: Transfer, number: int) -> tuple[Tensor, list[Op]]:
        """Emits the receiving end; see `Transport`."""
        memory = self._memory(transfer, number)
        if memory is None:
            return self._rest.receive(transfer, number)

        def get(use: Array) -> Array:
            return memory.get(number, use)

        assert transfer.tensor is not None
        word, posted = self._rest.receive(dataclasses.replace(transfer, tensor=None), number)
        with tf.device(self._device):
            value = tf.numpy_function(
                get, [word], transfer.tensor.dtype, stateful=False, name="shared"
            )
            value.set_shape(transfer.tensor.shape)
        return value, posted

    def _memory(self, transfer: Transfer, number: int) -> Memory | None:
        pair = transfer.source, transfer.target
        if pair not in self._memories or number not in self._rooms[pair].slots:
            return None
        return self._memories[pair]
