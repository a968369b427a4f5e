from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from canaries import elsewhere
from small import device_index

from opensmp import _private
from opensmp.errors import ElsewhereError
from opensmp.execution.variables.placement import mark_copies, place

DEVICES = ("/device:CPU:1", "/device:CPU:2", "/device:CPU:3")


def waiting(value: float = 1.0) -> keras.Variable:
    with keras.StatelessScope(initialize_variables=False):
        variable = keras.Variable(keras.initializers.Constant(value), shape=(2,))
    _private.take_pending_variables()
    return variable


def test_a_variable_that_waits_gets_its_memory_at_home():
    variables = [waiting(float(i)) for i in range(3)]
    homes = {id(v): 2 - i for i, v in enumerate(variables)}
    place(variables, homes, DEVICES, default_partition=0)
    assert [device_index(v.value) for v in variables] == [3, 2, 1]
    assert [v.numpy().tolist() for v in variables] == [[0, 0], [1, 1], [2, 2]]


def test_a_variable_that_waits_and_has_no_home_goes_to_the_default_partition():
    variable = waiting()
    place([variable], {}, DEVICES, default_partition=1)
    assert device_index(variable.value) == 2


def test_a_variable_moves_home_with_its_value():
    variable = keras.Variable(np.arange(4.0))
    place([variable], {id(variable): 2}, DEVICES, default_partition=0)
    assert device_index(variable.value) == 3
    assert variable.numpy().tolist() == [0, 1, 2, 3]


def test_a_variable_that_is_at_home_is_left_alone():
    with tf.device("CPU:2"):
        variable = keras.Variable(1.0)
    storage = variable.value
    place([variable], {id(variable): 1}, DEVICES, default_partition=0)
    assert variable.value is storage


def test_a_built_variable_without_a_home_stays_where_it_is():
    variable = keras.Variable(1.0)
    place([variable], {}, DEVICES, default_partition=2)
    assert device_index(variable.value) == 0


def test_a_variable_of_tensorflow_stays_where_its_owner_made_it():
    variable = tf.Variable(1.0)
    place([variable], {id(variable): 2}, DEVICES, default_partition=0)
    assert device_index(variable) == 0


@pytest.mark.parametrize("trainable", [True, False])
def test_what_a_variable_is_stays_when_it_moves(trainable):
    variable = keras.Variable(1.0, trainable=trainable, dtype="float16", name="half")
    place([variable], {id(variable): 1}, DEVICES, default_partition=0)
    assert variable.trainable is trainable
    assert variable.value.trainable is trainable
    assert variable.value.dtype == tf.float16
    assert variable.path == "half"


def test_variables_that_another_process_changes_are_copies_until_they_move_here():
    here, there, unused = (keras.Variable(1.0) for _ in range(3))
    variables = [here, there, unused, tf.Variable(1.0)]
    homes = {id(here): 0, id(there): 1}
    mark_copies(variables, homes, elsewhere={1: 3})
    assert [_private.is_kept_here(v) for v in variables] == [True, False, True, True]
    mark_copies(variables, homes, elsewhere={})
    assert all(map(_private.is_kept_here, variables))


def test_what_lies_in_another_process_is_never_given_an_empty_value():
    variable = elsewhere()
    place([variable], {}, DEVICES, default_partition=0)
    assert _private.is_elsewhere(variable)
    with pytest.raises(ElsewhereError, match="partition 1 of this process"):
        place([variable], {id(variable): 1}, DEVICES, default_partition=0)
    assert _private.is_elsewhere(variable)
