"""Optimizer patches: slots that lie elsewhere between updates, as in files or on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tensorflow as tf

_LAST = "_smp_last_kept"


class Keeper(Protocol):
    """Decides where the slots of variables lie, and moves them there after each update."""

    def device_of_slots(self, device: str) -> str:
        """The device of the slots of variables on a device."""

    def moves(self, slot: tf.Variable) -> bool:
        """Whether `keep` is to be called for a slot after updates."""

    def keep(self, slot: tf.Variable) -> None:
        """Moves the value of a slot; called eagerly, also by functions as they run."""


_keeper: Keeper | None = None


def keep_slots_with(keeper: Keeper | None) -> None:
    """Sets what keeps the slots of optimizers; None: they stay with their variables."""
    global _keeper
    _keeper = keeper


def slot_device(device: str) -> str:
    """The device of the slots of variables on a device."""
    return device if _keeper is None else _keeper.device_of_slots(device)


def keep_now(slots: Sequence[Any]) -> None:
    """Moves the values of slots, before a function that is being traced runs."""
    for slot in _moved(slots):
        with tf.init_scope():
            _keeper.keep(slot)  # type: ignore[union-attr]


def updating(slots: Sequence[Any], work: Callable[[], Any]) -> Any:
    """Does the update of one variable, and moves its slots after it.

    The updates of a device come one after another, so that the slots of one variable at a time are
    in memory.
    """
    moved = _moved(slots)
    if not moved:
        return work()
    keep_now(moved)
    if tf.executing_eagerly():
        result = work()
        keep_now(moved)
        return result
    graph = tf.compat.v1.get_default_graph()
    last = _last_of(graph)
    devices = sorted({slot.device for slot in moved})
    with tf.control_dependencies([last[device] for device in devices if device in last]):
        result = work()
    for device in devices:
        last[device] = _keep_in_graph([slot for slot in moved if slot.device == device], device)
    return result


def _last_of(graph: Any) -> dict[str, Any]:
    """By device, the operation that moved slots last in a graph."""
    if not hasattr(graph, _LAST):
        setattr(graph, _LAST, {})
    found: dict[str, Any] = getattr(graph, _LAST)
    return found


def _keep_in_graph(slots: Sequence[tf.Variable], device: str) -> tf.Operation:
    """An operation that moves slots; as it takes their handles, it has its turn among updates."""

    def keep(*_: Any) -> None:
        if _keeper is not None:
            for slot in slots:
                _keeper.keep(slot)

    with tf.device(device):
        return tf.py_function(keep, [slot.handle for slot in slots], [])


def _moved(slots: Sequence[Any]) -> list[tf.Variable]:
    if _keeper is None:
        return []
    stored = [getattr(slot, "_value", slot) for slot in slots]
    return [each for each in stored if each is not None and _keeper.moves(each)]
