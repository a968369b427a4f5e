"""Waits of a graph for counters in shared memory.

No Python runs for what has arrived when it is needed, the usual case. For what has not, the graph
asks a polling thread, which puts a token into a TensorFlow queue that the graph waits for: no
operation blocks a thread while it waits, and a step that fails can end. The longer a wait, the less
often the thread polls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.base.types import Op, Tensor
from opensmp.distributed.collectives.scalars import scalar
from opensmp.distributed.transport.thread_priority import sleep_precisely, wake_promptly
from opensmp.distributed.watchdog import monitor

Array = np.ndarray[Any, Any]

_SHORTEST_SLEEP_SECONDS = 20e-6
_LONGEST_SLEEP_SECONDS = 0.1
_SHARE_OF_WAIT = 0.01  # maximum delay of detection, as a fraction of the wait
_IN_FLIGHT = 2  # tokens that a queue may hold


def pause(waited: float) -> float:
    """Seconds to sleep until the next poll, after `waited` seconds of waiting."""
    return min(max(_SHARE_OF_WAIT * waited, _SHORTEST_SLEEP_SECONDS), _LONGEST_SLEEP_SECONDS)


def in_place(value: Array) -> Tensor:
    """A tensor that uses the memory of an array."""
    return tf.experimental.dlpack.from_dlpack(value.__dlpack__())


def write_row(place: Tensor, index: Tensor, row: Tensor) -> Op:
    """Writes a row of a tensor in shared memory, in place."""
    return tf.raw_ops.InplaceUpdate(x=place, i=[index], v=tf.expand_dims(row, 0)).op


class _Asked(NamedTuple):
    run: int  # the number that a run waits for
    moment: float  # time of the request


class Arrivals:
    """Waits for counters that other processes increase.

    Args:
        counters: The counters, int64, in shared memory.
        device: Host device of this process.
        name: Name of the polling thread.
    """

    def __init__(self, counters: Array, device: str, name: str) -> None:
        self._values = counters
        self._device = device
        self._closed = False
        self._is_interrupted = False
        self._changed = threading.Condition()
        self._asked: dict[int, _Asked] = {}
        self._queues: dict[int, Any] = {}
        self._positions: dict[int, Any] = {}
        with tf.init_scope(), tf.device(device):
            self.counters = in_place(counters)
        self._thread = threading.Thread(target=self._look, name=name, daemon=True)
        self._thread.start()

    def queue(self, number: int, positions: int | Sequence[int]) -> Tensor:
        """The handle of the queue of wait `number`, which is for the least of some counters."""
        with self._changed, tf.init_scope(), tf.device(self._device):
            if number not in self._queues:
                self._queues[number] = tf.queue.FIFOQueue(_IN_FLIGHT, [tf.int64], [[]])
                self._positions[number] = positions
            return self._queues[number].queue_ref

    def wait(
        self, counters: Tensor, positions: Tensor, number: Tensor, queue: Tensor, run: Tensor
    ) -> Tensor:
        """Inserts a wait until the counters at some positions have reached `run`.

        Returns `run` or a greater number, and a smaller one after an interrupt.
        """

        def ask() -> Tensor:
            asked = _private.host_call(self._ask, [number, run], tf.int64, stateful=False)
            with tf.control_dependencies([asked]):
                came = tf.raw_ops.QueueDequeueV2(handle=queue, component_types=[tf.int64])
            # Uses `asked`, because TensorFlow removes a stateless Python call without consumers.
            return tf.reshape(tf.minimum(came, asked), [])

        values = tf.gather(counters, positions)
        least = values if values.shape.rank == 0 else tf.reduce_min(values)
        return tf.cond(least >= run, lambda: tf.identity(run), ask)

    def _ask(self, number: Any, run: Any) -> Any:
        """Asks the polling thread for a number that a run waits for."""
        with self._changed:
            self._asked[int(number)] = _Asked(int(run), time.monotonic())
            self._changed.notify()
        return run

    def interrupt(self) -> None:
        """Makes pending and later waits fail until `restart`."""
        with self._changed:
            self._is_interrupted = True
            self._changed.notify()

    def restart(self) -> None:
        """Forgets all that was waited for."""
        with self._changed, tf.init_scope(), tf.device(self._device):
            self._is_interrupted = False
            self._asked.clear()
            for queue in self._queues.values():
                while int(queue.size()):
                    queue.dequeue()

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
        return pause(time.monotonic() - max(asked.moment for asked in self._asked.values()))

    def _tell(self) -> None:
        """Puts tokens into the queues of requests that have arrived or are interrupted."""
        for number, asked in list(self._asked.items()):
            if np.min(self._values[self._positions[number]]) >= asked.run:
                self._put(number, asked.run)
            elif self._is_interrupted:
                self._put(number, -1)

    def _put(self, number: int, value: int) -> None:
        del self._asked[number]
        token, queue = scalar(value, tf.int64), self._queues[number].queue_ref
        tf.raw_ops.QueueEnqueueV2(handle=queue, components=[token])
