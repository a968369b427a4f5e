"""Moves tensors between processes of one machine through memory that both see.

The collectives would copy a tensor five times on its way through gRPC and two sockets, on the
cores that compute. Here the sender copies it into memory that it shares with the receiver and
raises a semaphore that lies there too. A thread of the receiver, asleep until then, puts a
tensor that lies in this memory into a queue of TensorFlow's, from which the step takes and
copies it: no operation of a step blocks a thread while it waits, and a step that fails ends
although something is waited for. Each tensor has two places, which take turns from step to step:
what comes for the next step does not touch what this one may still have to copy.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp.runtime import failures
from opensmp.runtime.localise import Transfer
from opensmp.runtime.promptness import wake_promptly
from opensmp.runtime.transport import Received, Sent, Transport

Op = Any
Tensor = Any
Pair = tuple[int, int]
Array = np.ndarray[Any, Any]
Gather = Callable[[Any], list[Any]]

MOST_BYTES = 512 * 1024 * 1024
"""Most memory of one step that one process shares with another. It is held as long as the step."""

_NONCE_BYTES = 16
_ALIGNMENT = 64
_SEMAPHORE = 64  # where it lies; a sem_t takes 32 bytes
_COUNTERS = 128  # the runs that the receiver has ended, and then:
_PER_SLOT = 2  # how often it was written, and a place in the ring of arrivals
_PLACES = 2  # for a tensor of this step, and one of the next
_LONGEST_SLEEP_SECONDS = 0.01
_ORDER = np.dtype(np.int32)  # of what is sent where only the order matters
_DONE = np.zeros([], np.int32)
_libc = ctypes.CDLL(None, use_errno=True)
_CAN_SHARE = hasattr(os, "memfd_create") and hasattr(_libc, "sem_init")
_post: Any = getattr(_libc, "sem_post", None)
_wait: Any = getattr(_libc, "sem_wait", None)
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_DTYPES = frozenset(
    ("bool", *_FLOATS, *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)


class Slot(NamedTuple):
    """Where in the memory of a pair of processes a tensor lies.

    Attributes:
        number: Position among the slots of the pair.
        offset: First byte of the first of its places, which follow each other.
        shape: Shape of the tensor.
        dtype: Its dtype.
    """

    number: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def room(self) -> int:
        """Bytes of one place."""
        return _aligned(int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize)


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
        offset = _aligned(_COUNTERS + 8 * (1 + _PER_SLOT * len(listed)))
        for number, transfer in listed:
            shape, dtype = _looks(transfer.tensor)
            slot = Slot(len(slots), offset, shape, dtype)
            if offset + _PLACES * slot.room <= MOST_BYTES:
                slots[number] = slot
                offset += _PLACES * slot.room
        if slots:
            found[pair] = Room(slots, offset)
    return found


def _fits(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    known = tensor.dtype.name in _DTYPES and tensor.shape.is_fully_defined()
    return bool(known and tensor.shape.num_elements())


def _made_by(op: Op) -> Tensor:
    """Something small that is there when an operation is done, in each step anew.

    A constant would be sent while TensorFlow optimises the graph, and never again.
    """
    for tensor in op.outputs:
        if tensor.dtype.name in _DTYPES:
            return tensor
    with tf.control_dependencies([op]):
        return tf.random.uniform([], maxval=2, dtype=tf.int32)


def _looks(tensor: Tensor | None) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of what travels."""
    if tensor is None:
        return (), _ORDER
    return tuple(tensor.shape.as_list()), np.dtype(tensor.dtype.as_numpy_dtype)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


class Memory:
    """The memory of a room, as one of its two processes sees it.

    Args:
        room: What is in it.
        descriptor: The open file that the memory belongs to; it may be closed afterwards.
    """

    def __init__(self, room: Room, descriptor: int) -> None:
        # All that can be made beforehand is: what runs for a tensor finds its code and data
        # driven out of the cache by what was computed meanwhile.
        self._slots = room.slots
        self._numbers = {slot.number: number for number, slot in room.slots.items()}
        self._bytes = mmap.mmap(descriptor, room.size)
        self._views = {number: self._places(slot) for number, slot in room.slots.items()}
        self._semaphore = ctypes.byref(ctypes.c_char.from_buffer(self._bytes, _SEMAPHORE))
        count = len(room.slots)
        end = _COUNTERS + 8 * (1 + _PER_SLOT * count)
        counters = memoryview(self._bytes)[_COUNTERS:end].cast("q")
        self._ended = counters[:1]
        self._written, self._arrivals = counters[1 : 1 + count], counters[1 + count :]
        self._read = [0] * count
        self._passed = 0  # how many tensors have gone through, counted by each process for itself
        self._lock = threading.Lock()

    @property
    def nonce(self) -> bytes:
        """By which the receiver knows that it has opened the right memory."""
        return self._bytes[:_NONCE_BYTES]

    def offer(self) -> None:
        """Makes the memory ready for another process to open."""
        _check(_libc.sem_init(self._semaphore, 1, 0))
        self._bytes[:_NONCE_BYTES] = secrets.token_bytes(_NONCE_BYTES)

    def put(self, number: int, value: Array) -> None:
        """Copies a tensor in and tells the receiver; waits until its place is free."""
        position = self._slots[number].number
        count = self._written[position]
        if self._ended[0] + _PLACES <= count:
            self._wait_for_runs(count + 1 - _PLACES)
        np.copyto(self._views[number][count % _PLACES], value)
        with self._lock:
            self._written[position] = count + 1
            self._arrivals[self._passed % len(self._arrivals)] = position
            self._passed += 1
            _check(_post(self._semaphore))

    def take(self, arrived: Callable[[int, int], None]) -> bool:
        """Waits until a tensor is there, or `wake` was called, and tells about it.

        Args:
            arrived: Called with the transfer's number and the place where the tensor lies, until
                `end_run`.

        Returns:
            Whether a tensor came.
        """
        while _wait(self._semaphore):
            if ctypes.get_errno() != errno.EINTR:
                _check(-1)
        position = self._arrivals[self._passed % len(self._arrivals)]
        count = self._read[position]
        if self._written[position] == count:
            return False
        self._passed += 1
        self._read[position] = count + 1
        arrived(self._numbers[position], count % _PLACES)
        return True

    def places(self, number: int) -> list[Array]:
        """The places of a transfer's tensor, as arrays."""
        return self._views[number]

    def end_run(self) -> None:
        """Tells the sender that a run of the step needs nothing any more of what came for it."""
        self._ended[0] += 1

    def wake(self) -> None:
        """Wakes who waits in `take`."""
        _check(_post(self._semaphore))

    def _places(self, slot: Slot) -> list[Array]:
        count = int(np.prod(slot.shape, dtype=np.int64))
        return [
            np.frombuffer(self._bytes, slot.dtype, count, slot.offset + place * slot.room).reshape(
                slot.shape
            )
            for place in range(_PLACES)
        ]

    def _wait_for_runs(self, count: int) -> None:
        """The receiver may be a moment behind, or a slow step."""
        pause = 50e-6
        while self._ended[0] < count:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_SLEEP_SECONDS)


def _check(result: int) -> None:
    """Raises what a function of the C library for semaphores has failed with."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"a semaphore in shared memory: {os.strerror(number)}")


class Inbox:
    """What comes to this process from another one, in a queue of TensorFlow's per transfer.

    A thread fills the queues until `close`.

    Args:
        room: What comes.
        memory: Where it lies.
        device: Host device of this process.
    """

    def __init__(self, room: Room, memory: Memory, device: str) -> None:
        self._memory = memory
        self._device = device
        self._closed = False
        with tf.device(device):
            self._queues = {
                number: tf.queue.FIFOQueue(_PLACES, [tf.as_dtype(slot.dtype)], [slot.shape])
                for number, slot in room.slots.items()
            }
        self._handles = {number: queue.queue_ref for number, queue in self._queues.items()}
        self._tensors = {
            number: [_in_place(value) for value in memory.places(number)] for number in room.slots
        }
        self._thread = threading.Thread(target=self._fill, name="opensmp-inbox", daemon=True)
        self._thread.start()

    def take(self, number: int) -> tuple[Tensor, Op]:
        """Emits what gives the next tensor of a transfer, as soon as it is there.

        Returns:
            The tensor, and the operation that waits for it.
        """
        with tf.device(self._device):
            arrived = self._queues[number].dequeue(name="shared")
            if self._tensors[number][0] is None:
                return arrived, arrived.op
            # Of its own memory: results of a step may be looked at long after it.
            return tf.raw_ops.Snapshot(input=arrived), arrived.op

    def end_run(self) -> None:
        """To be called when a run of the step has ended."""
        self._memory.end_run()

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._memory.wake()

    def _fill(self) -> None:
        wake_promptly()
        try:
            with tf.device(self._device):
                while not self._closed:
                    self._memory.take(self._put)
        except Exception as error:  # whoever waits for a tensor would wait for ever
            if not self._closed:
                failures.fail(f"what came through shared memory was lost: {error!r}")

    def _put(self, number: int, place: int) -> None:
        tensor = self._tensors[number][place]
        if tensor is None:
            tensor = tf.constant(self._memory.places(number)[place])
        tf.raw_ops.QueueEnqueueV2(handle=self._handles[number], components=[tensor])


def _in_place(value: Array) -> Tensor | None:
    """A tensor that lies in the memory of an array; None if there can be none of its dtype."""
    if value.dtype.kind not in "fiu":
        return None
    return tf.experimental.dlpack.from_dlpack(value.__dlpack__())


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

    It is for one graph, and lives as long as the graph does.

    Args:
        rest: Carries all else.
        all_rooms: What goes by shared memory.
        memories: The memory of this process's pairs, from `share`.
        process: Position of this process in the replica.
        device: Host device of this process.
    """

    def __init__(
        self,
        rest: Transport,
        all_rooms: Mapping[Pair, Room],
        memories: Mapping[Pair, Memory],
        process: int,
        device: str,
    ) -> None:
        self._rest = rest
        self._rooms = all_rooms
        self._memories = memories
        self._device = device
        graph = tf.compat.v1.get_default_graph()
        self._inboxes = {}
        for pair, memory in memories.items():
            if pair[1] == process:
                with tf.init_scope():
                    inbox = Inbox(all_rooms[pair], memory, device)
                weakref.finalize(graph, inbox.close)
                self._inboxes[pair] = inbox

    def send(self, transfer: Transfer, number: int) -> Sent:
        """Emits the sending end; see `Transport`."""
        memory = self._memory(transfer, number)
        if memory is None:
            return self._rest.send(transfer, number)

        only_order = transfer.tensor is None

        def put(value: Array) -> Array:
            memory.put(number, _DONE if only_order else value)
            return _DONE

        with tf.device(self._device):
            # Not stateful, for TensorFlow runs stateful ones in the order they were made in.
            sent = _made_by(transfer.op) if only_order else transfer.tensor
            word = tf.numpy_function(put, [sent], tf.int32, stateful=False, name="share")
        return Sent(word.op, waits=False)

    def receive(self, transfer: Transfer, number: int) -> Received:
        """Emits the receiving end; see `Transport`."""
        if self._memory(transfer, number) is None:
            return self._rest.receive(transfer, number)
        tensor, waiting = self._inboxes[transfer.source, transfer.target].take(number)
        # Not early: if a call fails while this one waits, TensorFlow may report that this one
        # was cancelled, and not why.
        return Received(tensor, [waiting], early=False)

    def end_run(self) -> None:
        """See `Transport`."""
        for inbox in self._inboxes.values():
            inbox.end_run()
        self._rest.end_run()

    def _memory(self, transfer: Transfer, number: int) -> Memory | None:
        pair = transfer.source, transfer.target
        if pair not in self._memories or number not in self._rooms[pair].slots:
            return None
        return self._memories[pair]
