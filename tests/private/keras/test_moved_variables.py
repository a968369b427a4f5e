"""Canaries of variables that come from other processes."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from canaries import elsewhere

from opensmp import _private


def test_with_slots():
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    _private.place_updates_with_variables()
    optimizer = keras.optimizers.Adam()
    optimizer.build([layer.kernel])
    found = _private.with_slots(layer.kernel)
    assert found[0] is layer.kernel
    assert [id(v) for v in found[1:]] == [
        id(v) for v in optimizer.variables if tuple(v.shape) == (3, 2)
    ]


def test_take_in():
    kernel = elsewhere()
    stored = kernel.value
    _private.take_in(kernel, np.full((3, 2), 5.0, "float32"), "CPU:2")
    assert not _private.is_elsewhere(kernel)
    assert kernel.value is stored  # optimizers and checkpoints know it by this object
    assert kernel.value.device.endswith("CPU:2")
    assert kernel.numpy().tolist() == [[5.0, 5.0]] * 3
    kernel.assign_add(tf.ones([3, 2]))
    assert kernel.numpy().tolist() == [[6.0, 6.0]] * 3
    _private.give_up(kernel, "kernel of rank 7")  # and it may go again
    assert _private.is_elsewhere(kernel)


def test_is_lent():
    kernel = elsewhere()
    assert not _private.is_lent(kernel)
    _private.lend(kernel, np.ones((3, 2), "float32"))
    assert _private.is_lent(kernel)
    _private.take_back(kernel)
    assert not _private.is_lent(kernel)


def test_place_of():
    assert _private.place_of(elsewhere()) == "kernel of rank 7"
