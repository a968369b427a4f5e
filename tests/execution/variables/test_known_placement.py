from __future__ import annotations

import gc

import keras

from opensmp.config import Config
from opensmp.distributed.world import World
from opensmp.execution.variables import known_placement
from opensmp.execution.variables.known_placement import known_homes, note_homes, placed_before


def world() -> World:
    return World(Config.resolve({"partitions": 2}), ("/device:CPU:0", "/device:CPU:1"))


def test_homes_are_those_of_one_configuration():
    first, second = world(), world()
    one, other, never = (keras.Variable(1.0) for _ in range(3))
    places = {id(one): 1, id(other): 0, id(never): 1}
    note_homes(first, [one, other], places)
    assert known_homes(first, [one, other, never]) == {id(one): 1, id(other): 0}
    assert known_homes(second, [one, other, never]) == {}
    assert placed_before(first, [one, other, never]) == []
    assert placed_before(second, [one, other, never]) == [one, other]
    note_homes(second, [one], {id(one): 0})
    assert known_homes(second, [one, other]) == {id(one): 0}
    assert placed_before(second, [one, other]) == [other]


def test_variables_that_are_gone_are_forgotten():
    here, variable = world(), keras.Variable(1.0)
    key = id(variable)
    note_homes(here, [variable], {key: 1})
    assert key in known_placement._homes
    del variable
    gc.collect()
    assert key not in known_placement._homes


def test_variables_without_a_place_are_left_out():
    here, variable = world(), keras.Variable(1.0)
    note_homes(here, [variable], {})
    assert known_homes(here, [variable]) == {}
