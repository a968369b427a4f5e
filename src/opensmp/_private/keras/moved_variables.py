"""Variables that come to this process from another one, with their values."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from opensmp._private.keras.variables import _LENT, _slots, outside_of_functions
from opensmp._private.tensorflow.variable_placement import ELSEWHERE, readable_kind


def with_slots(variable: Any) -> list[Any]:
    """A variable, and those that optimizers have made for it, in the order of their making."""
    return [variable, *_slots(variable)]


def take_in(variable: Any, value: Any, device: str) -> None:
    """Gives a variable that was given up its memory in this process again.

    The `tf.Variable` stays the same object, as in `move_to`; slots are variables of their own
    here.

    Args:
        variable: Keras' variable, or a `tf.Variable`.
        value: Its value, an array.
        device: Where its memory is to be.
    """
    stored = getattr(variable, "_value", variable)
    with tf.init_scope(), tf.device(device), outside_of_functions():
        memory = tf.Variable(
            value,
            trainable=stored.trainable,
            dtype=stored.dtype,
            aggregation=stored.aggregation,
            synchronization=stored.synchronization,
            shape=stored.shape,
        )
    stored._handle, stored._handle_name = memory._handle, memory._handle_name
    if hasattr(stored, ELSEWHERE):
        delattr(stored, ELSEWHERE)
        stored.__class__ = readable_kind(stored)


def is_lent(variable: Any) -> bool:
    """Whether a variable of another process can be read here for a while, see `lend`."""
    return hasattr(getattr(variable, "_value", variable), _LENT)


def place_of(variable: Any) -> str:
    """Path and rank of a variable of another process, as it was given up."""
    return str(getattr(getattr(variable, "_value", variable), ELSEWHERE))
