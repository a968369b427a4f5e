"""Variables whose ownership, and value, moves to this process from another one."""

from __future__ import annotations

from typing import Any

from opensmp._private.keras.shards import set_shard
from opensmp._private.keras.variables import _LENT, _slots, give_memory
from opensmp._private.tensorflow.variable_placement import ELSEWHERE, readable_kind


def with_slots(variable: Any) -> list[Any]:
    """A variable followed by its optimizer slots, in creation order."""
    return [variable, *_slots(variable)]


def take_in(variable: Any, value: Any, device: str) -> None:
    """Allocates memory here for a variable that was given up, and marks it readable again.

    The `tf.Variable` stays the same object, as in `move_to`. Slots are not included: call this for
    each slot as well.
    """
    stored = getattr(variable, "_value", variable)
    give_memory(stored, lambda: value, device)
    set_shard(stored, False)
    if hasattr(stored, ELSEWHERE):
        delattr(stored, ELSEWHERE)
        stored.__class__ = readable_kind(stored)


def is_lent(variable: Any) -> bool:
    """Whether `lend` currently makes a variable of another process readable here."""
    return hasattr(getattr(variable, "_value", variable), _LENT)


def place_of(variable: Any) -> str:
    """Path and owning rank of a variable of another process, as recorded by `give_up`."""
    return str(getattr(getattr(variable, "_value", variable), ELSEWHERE))
