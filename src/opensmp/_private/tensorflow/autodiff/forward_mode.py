"""Forward-mode differentiation: tracks active `tf.autodiff.ForwardAccumulator`s."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

Accumulator = Any

_local = threading.local()


def follow_accumulators() -> None:
    """Starts to record which accumulators are active on each thread. Idempotent.

    TensorFlow does not list them, and its test for an active tape is also true for an accumulator.
    """
    owner = tf.autodiff.ForwardAccumulator
    if getattr(owner, "_smp_followed", False):
        return
    push, pop = owner._push_accumulator, owner._pop_accumulator

    def _push_accumulator(self: Accumulator) -> None:
        push(self)
        _stack().append(self)

    def _pop_accumulator(self: Accumulator) -> None:
        pop(self)
        _stack().remove(self)

    owner._push_accumulator, owner._pop_accumulator = _push_accumulator, _pop_accumulator
    owner._smp_followed = True


def accumulators() -> list[Accumulator]:
    """The accumulators that are active on this thread, innermost last."""
    return list(_stack())


@contextlib.contextmanager
def without_accumulators() -> Iterator[None]:
    """Context that suspends all accumulators of this thread; they keep their derivatives."""
    active = accumulators()
    for each in reversed(active):
        each._pop_accumulator()
    try:
        yield
    finally:
        for each in active:
            each._push_accumulator()


def is_accumulated(accumulators: Sequence[Accumulator], value: Any) -> bool:
    """Whether any of the accumulators has a derivative (JVP) of a tensor or `tf.Variable`."""
    return any(each.jvp(value) is not None for each in accumulators)


def _stack() -> list[Accumulator]:
    if not hasattr(_local, "stack"):
        _local.stack = []
    stack: list[Accumulator] = _local.stack
    return stack
