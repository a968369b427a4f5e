"""Sends and receives tensors between processes of one machine through shared memory.

The collectives would copy a tensor five times through gRPC and two sockets, on the cores that
compute. Here an operation of the sender's step copies it into shared memory, and one of the
receiver's copies it out. No Python runs for a tensor that has arrived when it is needed, the usual
case in a pipeline that keeps up (see `arrivals`); Python code that runs only now and then is slow,
because computations evict it from the cache.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.distributed.transport.arrivals import Arrivals, in_place, pause, write_row
from opensmp.distributed.transport.collective import CollectiveTransport, Received, Sent, Transport
from opensmp.distributed.transport.shared_memory import PLACES, Memory, Pair, Room, Slot
from opensmp.distributed.transport.transfer import Transfer
from opensmp.errors import CommunicationError

_NOWHERE = -1  # an invalid buffer index
_NOT_CONSTANT = 1024  # elements; graphs hold smaller tensors as constants


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
            self._counters = in_place(memory.counters)

    def wait_for_room(self, run: int) -> None:
        """Blocks until the receiver has read the buffers that this run overwrites."""
        begun = time.monotonic()
        while self._memory.ended[0] < run - PLACES:
            if self._is_interrupted:
                raise CommunicationError("Another rank has failed.")
            time.sleep(pause(time.monotonic() - begun))

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
                    places = in_place(self._memory.places(slot))
                words = _words(transfer.tensor, places.dtype)
                written = write_row(places, tf.cast(run % PLACES, tf.int32), words)
            with tf.control_dependencies([written]):
                return write_row(self._counters, tf.constant(slot.position), run)


class Inbox:
    """Receives in this process from another one."""

    def __init__(self, memory: Memory, device: str) -> None:
        self._memory = memory
        self._device = device
        self._functions: dict[Any, Any] = {}
        self.arrivals = Arrivals(memory.counters, device, "opensmp-inbox")
        with tf.init_scope(), tf.device(device):
            self._heard = tf.zeros([_NOT_CONSTANT], tf.int64)

    def take(self, slot: Slot, transfer: Transfer, run: Tensor) -> Tensor:
        """Inserts a call that returns a transfer's tensor on arrival; int64 if it has none."""
        tensor = transfer.tensor
        dtype = tf.int64 if tensor is None else tensor.dtype
        with tf.init_scope(), tf.device(self._device):
            queue = self.arrivals.queue(slot.position, slot.position)
            places = [] if tensor is None else [in_place(self._memory.places(slot))]
            shape = None if tensor is None else tuple(tensor.shape)
            function = self._function(shape, dtype, *(each.dtype for each in places))
        with tf.device(self._device):
            (result,) = tf.raw_ops.PartitionedCall(
                args=[self.arrivals.counters, tf.constant(slot.position), queue, run, *places],
                Tout=[dtype],
                f=function,
                name="shared",
                **_private.call_attributes(),
            )
        if tensor is None:
            # Nothing reads the result; operations wait for it by control edges. TensorFlow's
            # optimizer removes such operations, unless they write in place.
            with tf.device(self._device):
                return write_row(self._heard, tf.constant(0), result).outputs[0]
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
            came = self.arrivals.wait(counters, position, position, queue, run)
            if shape is None:
                return tf.gather(counters, tf.where(came >= run, position, int(_NOWHERE)))
            # A smaller number than the run's means an interrupt: the gather at index -1 fails.
            place = tf.where(came >= run, run % PLACES, _NOWHERE)
            words = tf.gather(*rest, tf.cast(place, tf.int32))
            return _from_words(words, shape, dtype)

        specs = [tf.TensorSpec(self.arrivals.counters.shape, tf.int64)]
        specs += [tf.TensorSpec([], each) for each in (tf.int32, tf.resource, tf.int64)]
        specs += [tf.TensorSpec([PLACES, None], each) for each in word]
        function = tf.function(take, autograph=False, experimental_attributes={"_noinline": True})
        found = self._functions[key] = function.get_concrete_function(*specs)
        return found

    def end_run(self) -> None:
        """Must be called when a run of the step has ended."""
        self._memory.ended[0] += 1

    def interrupt(self) -> None:
        """See `Transport`."""
        self.arrivals.interrupt()

    def restart(self, run: int) -> None:
        """See `Transport`."""
        self.arrivals.restart()
        self._memory.ended[0] = run

    def close(self) -> None:
        """Ends the polling thread."""
        self.arrivals.close()


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
