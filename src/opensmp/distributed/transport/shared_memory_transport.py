"""Sends and receives tensors between processes of one machine through shared memory.

The collectives would copy a tensor five times through gRPC and two sockets, on the cores that
compute. Here an operation of the sender's step copies it into shared memory, and one of the
receiver's copies it out. No Python runs for a tensor that has arrived when it is needed, the usual
case in a pipeline that keeps up; Python code that runs only now and then is slow, because
computations evict it from the cache.

For a tensor that has not arrived, the step asks a polling thread, which puts a token into a
TensorFlow queue that the step waits for: no operation blocks a thread while it waits, and a step
that fails can end. The longer a wait, the less often the thread polls.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.distributed.collectives.scalars import scalar
from opensmp.distributed.transport.collective import CollectiveTransport, Received, Sent, Transport
from opensmp.distributed.transport.shared_memory import PLACES, Array, Memory, Pair, Room, Slot
from opensmp.distributed.transport.thread_priority import sleep_precisely, wake_promptly
from opensmp.distributed.transport.transfer import Transfer
from opensmp.distributed.watchdog import monitor
from opensmp.errors import CommunicationError

_SHORTEST_SLEEP_SECONDS = 20e-6
_LONGEST_SLEEP_SECONDS = 0.1
_NOWHERE = -1  # an invalid buffer index
_NOT_CONSTANT = 1024  # elements; graphs hold smaller tensors as constants
_SHARE_OF_WAIT = 0.01  # maximum delay of detection, as a fraction of the wait


def _pause(waited: float) -> float:
    """Seconds to sleep until the next poll, after `waited` seconds of waiting."""
    return min(max(_SHARE_OF_WAIT * waited, _SHORTEST_SLEEP_SECONDS), _LONGEST_SLEEP_SECONDS)


def _in_place(value: Array) -> Tensor:
    """A tensor that uses the memory of an array."""
    return tf.experimental.dlpack.from_dlpack(value.__dlpack__())


def _write(place: Tensor, index: Tensor, row: Tensor) -> Op:
    """Writes a row of a tensor in shared memory, in place."""
    return tf.raw_ops.InplaceUpdate(x=place, i=[index], v=tf.expand_dims(row, 0)).op


def _words(tensor: Tensor, dtype: tf.DType) -> Tensor:
    """The bytes of a tensor as a vector of words, without a copy except for Booleans."""
    if tensor.dtype == tf.bool:
        tensor = tf.cast(tensor, tf.uint8)
    data = tf.reshape(tf.bitcast(tensor, tf.uint8), [-1])
    return data if dtype == tf.uint8 else tf.bitcast(tf.reshape(data, [-1, dtype.size]), dtype)


def _from_words(words: Tensor, shape: Sequence[int], dtype: tf.DType) -> Tensor:
    """Inverse of `_words`."""
    data = tf.bitcast(words, tf.uint8)
    if dtype == tf.bool:
        return tf.cast(tf.reshape(data, shape), tf.bool)
    return tf.bitcast(tf.reshape(data, [*shape, *([dtype.size] if dtype.size > 1 else [])]), dtype)


class Outbox:
    """Sends from this process to another one."""

    def __init__(self, memory: Memory, device: str) -> None:
        self._memory = memory
        self._device = device
        self._is_interrupted = False
        with tf.device(device):
            self._counters = _in_place(memory.counters)

    def wait_for_room(self, run: int) -> None:
        """Blocks until the receiver has read the buffers that this run overwrites."""
        begun = time.monotonic()
        while self._memory.ended[0] < run - PLACES:
            if self._is_interrupted:
                raise CommunicationError("Another rank has failed.")
            time.sleep(_pause(time.monotonic() - begun))

    def interrupt(self) -> None:
        """See `Transport`."""
        self._is_interrupted = True

    def restart(self) -> None:
        """See `Transport`; the receiver resets the memory."""
        self._is_interrupted = False

    def put(self, slot: Slot, transfer: Transfer, run: Tensor) -> Op:
        """Inserts the operations that send the tensor of a transfer in run number `run`."""
        with tf.device(self._device):
            written = transfer.op
            if transfer.tensor is not None:
                with tf.init_scope():
                    places = _in_place(self._memory.places(slot))
                words = _words(transfer.tensor, places.dtype)
                written = _write(places, tf.cast(run % PLACES, tf.int32), words)
            with tf.control_dependencies([written]):
                return _write(self._counters, tf.constant(slot.position), run)


class _Asked(NamedTuple):
    run: int  # the run that waits
    moment: float  # time of the request


class Inbox:
    """Receives in this process from another one."""

    def __init__(self, memory: Memory, device: str) -> None:
        self._memory = memory
        self._device = device
        self._closed = False
        self._is_interrupted = False
        self._changed = threading.Condition()
        self._asked: dict[int, _Asked] = {}  # by position of the slot
        self._queues: dict[int, Any] = {}
        self._functions: dict[Any, Any] = {}
        with tf.device(device):
            self._counters = _in_place(memory.counters)
            with tf.init_scope():
                self._heard = tf.zeros([_NOT_CONSTANT], tf.int64)
        self._thread = threading.Thread(target=self._look, name="opensmp-inbox", daemon=True)
        self._thread.start()

    def take(self, slot: Slot, transfer: Transfer, run: Tensor) -> Tensor:
        """Inserts a call that returns a transfer's tensor on arrival; int64 if it has none."""
        tensor = transfer.tensor
        dtype = tf.int64 if tensor is None else tensor.dtype
        with tf.init_scope(), tf.device(self._device):
            queue = self._queues[slot.position] = tf.queue.FIFOQueue(PLACES, [tf.int64], [[]])
            places = [] if tensor is None else [_in_place(self._memory.places(slot))]
            shape = None if tensor is None else tuple(tensor.shape)
            function = self._function(shape, dtype, *(each.dtype for each in places))
        with tf.device(self._device):
            (result,) = tf.raw_ops.PartitionedCall(
                args=[self._counters, tf.constant(slot.position), queue.queue_ref, run, *places],
                Tout=[dtype],
                f=function,
                name="shared",
                **_private.call_attributes(),
            )
        if tensor is None:
            # Nothing reads the result; operations wait for it by control edges. TensorFlow's
            # optimizer removes such operations, unless they write in place.
            with tf.device(self._device):
                return _write(self._heard, tf.constant(0), result).outputs[0]
        result.set_shape(tensor.shape)
        return result

    def _function(self, shape: tuple[int, ...] | None, dtype: tf.DType, *word: tf.DType) -> Any:
        """Function that receives a tensor, or a counter if the shape is None.

        A function call counts as stateless; stateful operations would be run in the order of the
        trace.
        """
        key = shape, dtype
        if key in self._functions:
            return self._functions[key]

        def take(counters: Tensor, position: Tensor, queue: Tensor, run: Tensor, *rest: Any) -> Any:
            def wait() -> Tensor:
                asked = _private.host_call(self._ask, [position, run], tf.int64, stateful=False)
                with tf.control_dependencies([asked]):
                    came = tf.raw_ops.QueueDequeueV2(handle=queue, component_types=[tf.int64])
                # Uses `asked`, because TensorFlow removes a stateless Python call without
                # consumers.
                return tf.reshape(tf.minimum(came, asked), [])

            is_there = tf.gather(counters, position) >= run
            came = tf.cond(is_there, lambda: tf.identity(run), wait)
            if shape is None:
                return tf.gather(counters, tf.where(came >= run, position, int(_NOWHERE)))
            # A smaller number than the run's means an interrupt: the gather at index -1 fails.
            place = tf.where(came >= run, run % PLACES, _NOWHERE)
            words = tf.gather(*rest, tf.cast(place, tf.int32))
            return _from_words(words, shape, dtype)

        specs = [tf.TensorSpec(self._counters.shape, tf.int64)]
        specs += [tf.TensorSpec([], each) for each in (tf.int32, tf.resource, tf.int64)]
        specs += [tf.TensorSpec([PLACES, None], each) for each in word]
        function = tf.function(take, autograph=False, experimental_attributes={"_noinline": True})
        found = self._functions[key] = function.get_concrete_function(*specs)
        return found

    def _ask(self, position: Any, run: Any) -> Any:
        """Asks the polling thread for a tensor that a run waits for."""
        with self._changed:
            self._asked[int(position)] = _Asked(int(run), time.monotonic())
            self._changed.notify()
        return run

    def end_run(self) -> None:
        """Must be called when a run of the step has ended."""
        self._memory.ended[0] += 1

    def interrupt(self) -> None:
        """See `Transport`."""
        with self._changed:
            self._is_interrupted = True
            self._changed.notify()

    def restart(self, run: int) -> None:
        """See `Transport`."""
        with self._changed, tf.init_scope(), tf.device(self._device):
            self._is_interrupted = False
            self._asked.clear()
            for queue in self._queues.values():
                while int(queue.size()):
                    queue.dequeue()
            self._memory.ended[0] = run

    def close(self) -> None:
        """Ends the polling thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _look(self) -> None:
        wake_promptly()
        sleep_precisely()
        try:
            with tf.device(self._device), self._changed:
                while not self._closed:
                    self._tell()
                    # A new request ends the sleep.
                    self._changed.wait(self._sleep())
        except Exception as error:  # else steps would wait forever
            if not self._closed:
                monitor.fail(f"what came through shared memory was lost: {error!r}")

    def _sleep(self) -> float | None:
        """Seconds until the next poll, according to the newest request."""
        if not self._asked:
            return None
        return _pause(time.monotonic() - max(asked.moment for asked in self._asked.values()))

    def _tell(self) -> None:
        """Puts tokens into the queues of requests that have arrived or are interrupted."""
        counters = self._memory.counters
        if self._is_interrupted:
            for position in [p for p, asked in self._asked.items() if counters[p] < asked.run]:
                del self._asked[position]
                queue = self._queues[position].queue_ref
                tf.raw_ops.QueueEnqueueV2(handle=queue, components=[tf.constant(-1, tf.int64)])
        for position in [p for p, asked in self._asked.items() if counters[p] >= asked.run]:
            run = scalar(self._asked.pop(position).run, tf.int64)
            queue = self._queues[position].queue_ref
            tf.raw_ops.QueueEnqueueV2(handle=queue, components=[run])


class SharedMemoryTransport(Transport):
    """Transfers over shared memory where possible, else over another transport.

    Serves one graph, and lives as long as the graph does.

    Args:
        rest: The transport for all other transfers.
        all_rooms: Layout of the transfers over shared memory.
        memories: The memory of this process's pairs, from `share`.
        process: Position of this process in the replica.
        device: Host device of this process.
        run: The number of the step's run, a scalar int64 that each run computes; available once
            `begin_run` has returned.
    """

    def __init__(
        self,
        rest: CollectiveTransport,
        all_rooms: Mapping[Pair, Room],
        memories: Mapping[Pair, Memory],
        process: int,
        device: str,
        run: Tensor,
    ) -> None:
        self._rest = rest
        self._rooms = all_rooms
        self._run = run
        self._outboxes: dict[Pair, Outbox] = {}
        self._inboxes: dict[Pair, Inbox] = {}
        graph = tf.compat.v1.get_default_graph()
        with tf.init_scope():
            for pair, memory in memories.items():
                if pair[0] == process:
                    self._outboxes[pair] = Outbox(memory, device)
                else:
                    inbox = self._inboxes[pair] = Inbox(memory, device)
                    weakref.finalize(graph, inbox.close)

    def send(self, transfer: Transfer, number: int) -> Sent:
        """Inserts the send operation; see `Transport`."""
        pair = transfer.source, transfer.target
        slot = self._rooms[pair].slots.get(number) if pair in self._outboxes else None
        if slot is None:
            return self._rest.send(transfer, number)
        return Sent(self._outboxes[pair].put(slot, transfer, self._run), waits=False)

    def receive(self, transfer: Transfer, number: int) -> Received:
        """Inserts the receive operation; see `Transport`."""
        pair = transfer.source, transfer.target
        slot = self._rooms[pair].slots.get(number) if pair in self._inboxes else None
        if slot is None:
            return self._rest.receive(transfer, number)
        value = self._inboxes[pair].take(slot, transfer, self._run)
        # Not early: the operation must check when the tensor is needed. And if a call fails while
        # this one waits, TensorFlow may report that this one was cancelled instead of the cause.
        return Received(value, [value.op], early=False)

    def begin_run(self, number: int) -> None:
        """See `Transport`."""
        for outbox in self._outboxes.values():
            outbox.wait_for_room(number)

    def end_run(self) -> None:
        """See `Transport`."""
        for inbox in self._inboxes.values():
            inbox.end_run()

    def interrupt(self) -> None:
        """See `Transport`."""
        for outbox in self._outboxes.values():
            outbox.interrupt()
        for inbox in self._inboxes.values():
            inbox.interrupt()

    def restart(self, number: int) -> None:
        """See `Transport`."""
        for outbox in self._outboxes.values():
            outbox.restart()
        for inbox in self._inboxes.values():
            inbox.restart(number)
