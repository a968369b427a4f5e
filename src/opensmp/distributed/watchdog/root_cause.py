"""Finds the operation that has failed first, and its place, when a step fails.

TensorFlow reports the first error of each device. When an operation of a partition fails,
everything that waits is cancelled before the enclosing call has ended, so that often only the
cancellation is reported. Such a step is rerun on one device, with the operations of each call in
sequence: then a call ends before anything is cancelled.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from opensmp import _private

_CALL = re.compile(r"[\w./-]*smp_\d+[A-Z]\d+(?:\.\d+)?\w*")
_MOST_PLACES = 100_000
_NUM_SHOWN = 6

_PASSES = {"F": "forward", "B": "backward", "W": "backward", "R": "backward"}


class Place(NamedTuple):
    """Where a call of a step runs: kind of action, partition, microbatch, names of layers."""

    kind: str
    partition: int
    microbatch: int
    layers: Sequence[str] = ()

    def __str__(self) -> str:
        more = len(self.layers) - _NUM_SHOWN
        names = [f"'{name}'" for name in self.layers[:_NUM_SHOWN]]
        names += [f"{more} more"] * (more > 0)
        of = f" of layer{'s' * (len(self.layers) != 1)} {', '.join(names)}" if names else ""
        kind = _PASSES.get(self.kind, "backward")
        return f"partition {self.partition}, microbatch {self.microbatch}: in the {kind} pass{of}"


_places: dict[str, Place] = {}
_careful = False


def note(call: str, place: Place) -> None:
    """Records where a call runs."""
    if len(_places) >= _MOST_PLACES:
        _places.clear()
    _places[call] = place


def is_careful() -> bool:
    """Whether the step being traced runs on one device, with its operations in sequence."""
    return _careful


def call(work: Callable[[], Any], again: bool) -> Any:
    """Makes a call, if `again` twice to find the cause; its error says where it happened."""
    try:
        return work()
    except tf.errors.OpError as error:
        cause = error
        if again and isinstance(error, tf.errors.CancelledError) and _places:
            cause = _cause(work) or error
        explained = _explained(cause)
        if explained is error:
            raise
        raise explained from error


def _cause(work: Callable[[], Any]) -> tf.errors.OpError | None:
    with _carefully():
        try:
            work()
        except tf.errors.CancelledError:
            return None
        except tf.errors.OpError as error:
            return error
    return None


def _explained(error: tf.errors.OpError) -> tf.errors.OpError:
    """The error with the place added to its message."""
    text = error.message
    place = next((_places[name] for name in _CALL.findall(text) if name in _places), None)
    if place is None or str(place) in text:
        return error
    try:
        return type(error)(error.node_def, error.op, f"{text}\n\nThis happened in {place}.")
    except TypeError:  # a user's class with another constructor
        return error


@contextlib.contextmanager
def _carefully() -> Iterator[None]:
    global _careful
    _private.trace_apart_while(is_careful)
    _careful = True
    try:
        yield
    finally:
        _careful = False
