"""Stamps: operations in a step's graph that record when each call starts and ends.

A stamped step is a separate trace of the same function, kept in addition to the plain one: within
`listening`, each `tf.function` call uses a trace that was made within `listening`. So a step
inside a `tf.function` is stamped too, and the plain traces remain free of stamps.
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
from opensmp.base.types import Op, Tensor
from opensmp.compiler.schedule.actions import Action

FIT = "fit"
"""Name of the training steps of Keras."""


class Measurement(NamedTuple):
    """The times of one run of a stamped step.

    Attributes:
        name: Name of the step's function, or `FIT`.
        actions: The scheduled actions that run in this process.
        partitions: The partition of each action.
        devices: The device of each partition; an empty string for partitions of other processes,
            which have no actions here.
        seconds: Start and end of each action, shape `[len(actions), 2]`, float64, seconds since
            the epoch on the host's clock.
    """

    name: str
    actions: tuple[Action, ...]
    partitions: tuple[int, ...]
    devices: tuple[str, ...]
    seconds: np.ndarray[Any, np.dtype[np.float64]]


Listener = Callable[[Measurement], None]

_listeners: list[Listener] = []


def has_listeners() -> bool:
    """Whether steps that are traced now are stamped."""
    return bool(_listeners)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Context in which `listener` is called with the measurement of each `smp.step` run."""
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
        self._unknown: Tensor | None = None  # TensorFlow would fold calls of a constant

    def start(self, args: Sequence[Tensor]) -> Tensor:
        """Emits a stamp that waits for `args` on the current device."""
        with tf.control_dependencies([t for t in args if tf.is_tensor(t)]):
            return self._stamp()

    def around(
        self,
        action: Action,
        args: Sequence[Tensor],
        emit: Callable[[], tuple[Op, list[Tensor]]],
        start: Tensor | None = None,
    ) -> tuple[Op, Op, Op, list[Tensor]]:
        """Emits a call between two stamps on the current device; the first waits for all `args`.

        `start` is the first stamp, if another call of the same task came before.

        Returns the first stamp's operation, which is the one to delay; the call; the second stamp's
        operation; and the call's results, which become available after the second stamp.
        """
        start = self.start(args) if start is None else start
        with tf.control_dependencies([start]):
            call, results = emit()
        with tf.control_dependencies([call]):
            end = self._stamp()
        # Readers of a result would otherwise race with the second stamp.
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
        """Adds the operation that passes a run's measurement to the listeners.

        `orders` contains the actions that run, by partition; `own` the partitions of this process.
        """
        # Stamps of other processes' actions would run here too, at arbitrary times.
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
        # The number makes each stamp unique, because TensorFlow merges identical operations.
        # tf.timestamp is stateful, and automatic control dependencies would order stateful
        # operations by creation; a PartitionedCall counts as stateless.
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
