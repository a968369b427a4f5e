"""Canaries of slots that lie elsewhere between updates."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf

from opensmp import _private


class Noted:
    """A keeper that notes what it is given, and the values at that time."""

    def __init__(self):
        self.kept = []

    def device_of_slots(self, device):
        return device.replace("CPU:1", "CPU:2")

    def moves(self, slot):
        return "CPU:2" not in slot.device

    def keep(self, slot):
        self.kept.append((slot, float(tf.reduce_sum(slot.value()))))


@pytest.fixture
def keeper():
    _private.place_updates_with_variables()
    made = Noted()
    _private.keep_slots_with(made)
    yield made
    _private.keep_slots_with(None)


def test_keep_slots_with(keeper):
    """Keras makes and updates the slots of each variable where the patches hear of it."""
    variable = keras.Variable([1.0, 1.0])
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5)
    update = tf.function(lambda: optimizer.apply_gradients([(tf.ones([2]), variable)]))
    for _ in range(3):
        update()
    (slot,) = [each._value for each in optimizer.variables if each.shape.rank]
    assert {id(each) for each, _ in keeper.kept} == {id(slot)}
    assert [value for _, value in keeper.kept][-3:] == [-2.0, -3.0, -3.5]  # after each update


def test_keep_slots_with__device(keeper):
    with tf.device("CPU:1"):
        variable = keras.Variable([1.0, 1.0])
    optimizer = keras.optimizers.Adam()
    optimizer.build([variable])
    slots = [each._value for each in optimizer.variables if each.shape.rank]
    assert {each.device[-5:] for each in slots} == {"CPU:2"}
    optimizer.apply_gradients([(tf.ones([2]), variable)])
    assert keeper.kept == []
    _private.move_to(variable, "CPU:3")
    assert {each.device[-5:] for each in slots} == {"CPU:3"}
    assert {id(each) for each, _ in keeper.kept} == {id(each) for each in slots}
