"""Stamps: operations in a step's graph that note when each call starts and ends.

A stamped step is another trace of the same function, kept beside the plain one: while
someone listens, every `tf.function` that is called looks for a trace made while someone
listened. So a step inside a `tf.function` is stamped too, and nothing of it stays behind.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.compiler.schedule.actions import Action

Op = Any
Tensor = Any


class Measurement(NamedTuple):
    """What one run of a stamped step measured.

    Attributes:
        name: Name of the step's function.
        actions: The actions of its schedule that run in this process.
        partitions: The partition of each.
        devices: The device of each partition; empty for those of other processes, of which
            there are no actions.
        seconds: Start and end of each action, shape `[len(actions), 2]`, float64, seconds
            since the epoch as the host sees them.
    """

    name: str
    actions: tuple[Action, ...]
    partitions: tuple[int, ...]
    devices: tuple[str, ...]
    seconds: np.ndarray[Any, np.dtype[np.float64]]


Listener = Callable[[Measurement], None]

_listeners: list[Listener] = []


def has_listeners() -> bool:
    """Whether steps that are traced now are to be stamped."""
    return bool(_listeners)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Context in which `listener` is told of every run of an `smp.step` function."""
    _private.trace_apart_while(has_listeners)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Stamps:
    """The stamps of one trace of a step."""

    def __init__(self) -> None:
        self._times: dict[Action, tuple[Tensor, Tensor]] = {}
        self._numbers = itertools.count()
        self._unknown: Tensor | None = None  # a constant would let TensorFlow call beforehand

    def around(
        self, action: Action, args: Sequence[Tensor], emit: Callable[[], tuple[Op, list[Tensor]]]
    ) -> tuple[Op, Op, Op, list[Tensor]]:
        """Emits a call between two stamps on the current device.

        Args:
            action: What the call does.
            args: The call's arguments; the first stamp waits for all of them.
            emit: Emits the call.

        Returns:
            The first stamp, which is what to hold back; the call; the second stamp; and the
            call's results, which are there once the second stamp is.
        """
        with tf.control_dependencies([t for t in args if tf.is_tensor(t)]):
            start = self._stamp()
        with tf.control_dependencies([start]):
            call, results = emit()
        with tf.control_dependencies([call]):
            end = self._stamp()
        # Whoever reads a result would race with the second stamp otherwise.
        with tf.control_dependencies([end]):
            delayed = [tf.identity(result) for result in results]
        for result, late in zip(results, delayed, strict=True):
            _private.copy_handle_data(result, late)
        self._times[action] = start, end
        return start.op, call, end.op, delayed

    def deliver(
        self,
        name: str,
        orders: Sequence[Sequence[Action]],
        devices: Sequence[str],
        own: Collection[int],
    ) -> None:
        """Adds to the graph what tells the listeners of a run.

        Args:
            name: Name of the step's function.
            orders: The actions that run, by partition.
            devices: Device of each partition.
            own: The partitions that run in this process.
        """
        # The stamps of others would be made here as well, and at any time.
        actions = tuple(a for p, order in enumerate(orders) if p in own for a in order)
        partitions = tuple(p for p, order in enumerate(orders) if p in own for _ in order)
        devices = tuple(device if p in own else "" for p, device in enumerate(devices))

        def tell(seconds: Any) -> None:
            measured = Measurement(name, actions, partitions, devices, np.array(seconds))
            for listener in list(_listeners):
                listener(measured)

        with tf.device("/device:CPU:0"):
            # Fetching the stamps of an action that does not run would make it run.
            seconds = tf.stack([tf.stack(self._times[action]) for action in actions])
            _private.host_call(tell, [seconds], [])

    def _stamp(self) -> Tensor:
        # The number makes every stamp another one: TensorFlow merges operations that look
        # the same. Automatic control dependencies would put stateful operations, as
        # tf.timestamp is, in the order of their creation; a call counts as stateless.
        if self._unknown is None:
            with tf.control_dependencies(None), tf.device("/device:CPU:0"):
                self._unknown = tf.timestamp()
        (seconds,) = tf.raw_ops.PartitionedCall(
            args=[self._unknown + tf.constant(next(self._numbers), tf.float64)],
            Tout=[tf.float64],
            f=_clock(),
            name="smp_stamp",
        )
        return seconds


@functools.cache
def _clock() -> Any:
    def read_clock(number: Tensor) -> Tensor:
        return tf.timestamp() + 0.0 * number

    with tf.init_scope():
        function = tf.function(
            read_clock, autograph=False, experimental_attributes={"_noinline": True}
        )
        return function.get_concrete_function(tf.TensorSpec([], tf.float64))
