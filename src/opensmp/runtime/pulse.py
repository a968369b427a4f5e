"""Notices that a run of a step was cancelled, though it does not end.

When an operation fails, TensorFlow cancels all that waits in the same run, and the run ends. Only a
collective operation that waits for the other side for the first time cannot be cancelled: the run
would never end, and no error would be seen. So a loop runs beside the step, that takes beats out of
a queue. It is cancelled with all else; if then a beat lies in the queue for long while the process
computes nothing, the collectives are interrupted, and the run ends with the error that it has.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from opensmp import _private
from opensmp.runtime.idleness import computes
from opensmp.runtime.waits import used_by_others

Op = Any
Tensor = Any

_BEAT_SECONDS = 1.0
_LOST_SECONDS = 6.0
_STOP = -1


class Pulse:
    """The beats of the runs of one step.

    Args:
        device: Host device of this process.
        interrupt: What to do when a run was cancelled and does not end.
    """

    def __init__(self, device: str, interrupt: Callable[[], None]) -> None:
        self._device = device
        self._interrupt = interrupt
        self._changed = threading.Condition()
        self._runs = 0  # that have begun, and is odd while one lasts
        self._closed = False
        with tf.init_scope(), tf.device(device):
            self._queue = tf.queue.FIFOQueue(8, [tf.int64], [[]])

    def emit(self, run: Tensor) -> Op:
        """Emits the loop.

        Args:
            run: Number of the run, scalar int64, above 0; there when the run has begun.

        Returns:
            The operation, which must run, and ends after `end`.
        """
        reference = self._queue.queue_ref

        def beat(queue: Tensor, number: Tensor) -> Tensor:
            def take(_: Tensor) -> Tensor:
                (came,) = tf.nest.flatten(
                    tf.raw_ops.QueueDequeueV2(handle=queue, component_types=[tf.int64])
                )
                return tf.reshape(came, [])

            return tf.while_loop(lambda came: came != _STOP, take, [number])

        with tf.init_scope():
            function = tf.function(
                beat, autograph=False, experimental_attributes={"_noinline": True}
            ).get_concrete_function(tf.TensorSpec([], tf.resource), tf.TensorSpec([], tf.int64))
        with tf.device(self._device):
            (last,) = tf.raw_ops.PartitionedCall(
                args=[reference, run],
                Tout=[tf.int64],
                f=function,
                name="pulse",
                **_private.call_attributes(),
            )
        graph = tf.compat.v1.get_default_graph()
        weakref.finalize(graph, self._close)
        threading.Thread(target=self._watch, name="opensmp-pulse", daemon=True).start()
        return last.op

    def begin(self) -> None:
        """To be called when a run begins."""
        with self._changed:
            self._runs += 1
            self._changed.notify()

    def end(self) -> None:
        """To be called when all else of a run has ended."""
        with self._changed:
            self._runs += 1
        self._put(_STOP)

    def restart(self) -> None:
        """To be called when no run lasts, whatever has become of the last one."""
        with self._changed, tf.init_scope(), tf.device(self._device):
            self._runs += self._runs % 2
            while int(self._queue.size()):
                self._queue.dequeue()

    def _put(self, value: int) -> None:
        with tf.init_scope(), tf.device(self._device):
            self._queue.enqueue(tf.constant(value, tf.int64))

    def _waiting(self) -> int:
        with tf.init_scope(), tf.device(self._device):
            return int(self._queue.size())

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        lost: tuple[int, float, float] | None = None  # run, since when, processor seconds then
        while True:
            with self._changed:
                while not self._closed and self._runs % 2 == 0:
                    self._changed.wait()
                if self._closed:
                    return
                run = self._runs
                self._changed.wait(_BEAT_SECONDS)
                if self._closed or run != self._runs:
                    lost = None
                    continue
                is_taken = not self._waiting()
                if is_taken:
                    self._put(run)  # within the lock: the run may end, and its queue is then full
            now, worked = time.monotonic(), used_by_others()[0]
            if (
                is_taken
                or lost is None
                or lost[0] != run
                or computes(worked - lost[2], now - lost[1])
            ):
                lost = (run, now, worked)
            elif now - lost[1] > _LOST_SECONDS:
                self._interrupt()
                lost = None
