"""Canaries of variables and their memory."""

from __future__ import annotations

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from canaries import elsewhere, waiting_variable

from opensmp import _private
from opensmp.errors import ElsewhereError


def test_is_initialized():
    assert _private.is_initialized(keras.Variable(1.0))
    assert not _private.is_initialized(waiting_variable())
    _private.take_pending_variables()


def test_variable_dtype():
    seen = {}

    class Half(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=())

        def call(self, x):
            seen["public"], seen["stored"] = self.scale.dtype, _private.variable_dtype(self.scale)
            return x * self.scale

    Half(dtype="mixed_float16")(tf.ones([2]))
    assert seen == {"public": "float16", "stored": tf.float32}


def test_take_pending_variables():
    _private.take_pending_variables()
    first, second = waiting_variable(), waiting_variable()
    taken = _private.take_pending_variables()
    assert [id(v) for v in taken] == [id(first), id(second)]
    assert _private.take_pending_variables() == []
    keras.layers.Dense(1)(tf.ones([1, 1]))  # would initialise what it finds there
    assert not _private.is_initialized(first)


@pytest.mark.parametrize("fails", [False, True])
def test_own_pending_variables(fails):
    earlier, placed = waiting_variable(), waiting_variable()
    with contextlib.suppress(KeyError), _private.own_pending_variables():
        assert _private.take_pending_variables() == []
        made = waiting_variable()
        _private.initialize_on(placed, "CPU:0")
        if fails:
            raise KeyError
    assert [id(v) for v in _private.take_pending_variables()] == [id(earlier), id(made)]


@pytest.mark.parametrize("in_function", [False, True])
def test_initialize_on(in_function):
    variable = waiting_variable()
    _private.take_pending_variables()

    def run():
        with tf.init_scope():
            _private.initialize_on(variable, "CPU:2")

    (tf.function(run) if in_function else run)()
    assert variable.value.device.endswith("CPU:2")
    assert variable.numpy().tolist() == [3.0, 3.0]


def test_storage():
    variable = keras.Variable(1.0)
    assert isinstance(_private.storage(variable), tf.Variable)
    _private.storage(variable).assign(2.0)
    assert float(variable) == 2.0


def test_move_to():
    variable = keras.Variable(np.arange(3.0), trainable=False, name="moved")
    storage = variable.value
    _private.move_to(variable, "CPU:3")
    assert variable.value is storage  # optimizers and checkpoints know it by this object
    assert variable.value.device.endswith("CPU:3")
    assert variable.numpy().tolist() == [0.0, 1.0, 2.0]
    assert variable.trainable is False
    variable.assign([1.0, 1.0, 1.0])
    assert variable.numpy().tolist() == [1.0, 1.0, 1.0]


def test_give_up():
    """No memory, an error for readers, but a place in graphs."""
    waiting, ready = keras.layers.Dense(2), keras.layers.Dense(2)
    with keras.StatelessScope(initialize_variables=False):
        waiting.build([1, 3])
    _private.take_pending_variables()
    ready.build([1, 3])
    for variable in (waiting.kernel, ready.kernel):
        _private.give_up(variable, "kernel of rank 7")
        with pytest.raises(ElsewhereError, match="kernel of rank 7 was read"):
            variable.numpy()

        read = tf.function(functools.partial(tf.convert_to_tensor, variable.value))
        assert read.get_concrete_function().outputs[0].shape == [3, 2]


def test_is_elsewhere():
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    _private.give_up(layer.kernel, "kernel")
    assert _private.is_elsewhere(layer.kernel)
    assert _private.is_elsewhere(layer.kernel.value)
    assert not _private.is_elsewhere(layer.bias)


@pytest.mark.parametrize("compiled", [False, True])
def test_variable_access(compiled):
    variable = tf.Variable([1.0, 2.0])
    written = {}

    def write(which, value):
        written[id(which)] = value
        return True

    def run():
        other = tf.constant([10.0, 20.0])
        with _private.variable_access(lambda v: other if v is variable else None, write):
            results = [variable + 0.0, tf.gather(variable, 1), variable.read_value()]
            variable.assign_add([1.0, 1.0])
            results.append(written[id(variable)])
            variable.assign([5.0, 5.0])
            results.append(written[id(variable)])
            variable.assign_sub([1.0, 1.0])
            results.append(written[id(variable)])
        return results

    found = [t.numpy().tolist() for t in (tf.function(run) if compiled else run)()]
    assert found == [[10, 20], 20, [10, 20], [11, 21], [5, 5], [9, 19]]
    assert variable.numpy().tolist() == [1.0, 2.0]


def test_set_copy():
    variable = keras.Variable(1.0)
    assert _private.is_kept_here(variable)
    _private.set_copy(variable, True)
    assert not _private.is_kept_here(variable)
    assert not _private.is_kept_here(_private.storage(variable))
    assert float(variable.numpy()) == 1.0
    _private.set_copy(variable, False)
    assert _private.is_kept_here(variable)


def test_is_kept_here():
    kernel = elsewhere()
    _private.set_copy(kernel, False)
    assert not _private.is_kept_here(kernel)


def test_lend__of_a_copy_that_can_be_read():
    variable = keras.Variable(1.0)
    _private.set_copy(variable, True)
    _private.lend(variable, np.float32(5.0))
    assert float(variable.numpy()) == 5.0
    _private.take_back(variable)
    assert float(variable.numpy()) == 1.0
    variable.assign(2.0)
    assert float(variable.numpy()) == 2.0


def test_lend():
    kernel = elsewhere()
    _private.lend(kernel, np.full((3, 2), 5.0, np.float32))
    assert kernel.numpy().tolist() == [[5.0, 5.0]] * 3


def test_take_back():
    kernel = elsewhere()
    _private.lend(kernel, np.zeros((3, 2), np.float32))
    _private.take_back(kernel)
    with pytest.raises(ElsewhereError, match="kernel of rank 7 was read"):
        kernel.numpy()


def test_assignments_elsewhere_ignored():
    kernel, here = elsewhere(), keras.Variable([1.0])
    with _private.assignments_elsewhere_ignored():
        kernel.assign(np.ones((3, 2)))
        here.assign([2.0])
    assert here.numpy().tolist() == [2.0]
    with pytest.raises(ElsewhereError):
        kernel.numpy()


def test_shed_slots():
    _private.place_updates_with_variables()
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build([variable])
    _private.shed_slots(variable)  # all replicas update it
    assert not any(map(_private.is_elsewhere, optimizer.variables))
    _private.move_to(variable, "CPU:1")
