from __future__ import annotations

import tensorflow as tf

from opensmp import _private
from opensmp.saving.checkpoint.restoring.iterators import Iterators
from opensmp.saving.checkpoint.restoring.object_matching import Match

KEY = "data/.ATTRIBUTES/ITERATOR"
FIRST, SECOND = KEY + "_STATE", f"replica-1/{KEY}_STATE"


def at(position):
    iterator = iter(tf.data.Dataset.range(9))
    for _ in range(position):
        next(iterator)
    return iterator


def test_each_replica_goes_on_where_it_was():
    stored = {FIRST: None, SECOND: None}
    states = {FIRST: _private.iterator_state(at(3)), SECOND: _private.iterator_state(at(5))}
    for replica, expected in enumerate((3, 5)):
        mine = at(0)
        found = Iterators([Match(KEY, mine)], stored, replica, replicas=2)
        assert found.keys == (FIRST,)
        assert found.sources == ((FIRST, SECOND)[replica],)
        assert found.restore(states).error is None
        assert int(next(mine)) == expected


def test_iterators_of_another_number_of_replicas_are_left_as_they_are():
    for stored, replicas in (({FIRST: None, SECOND: None}, 1), ({FIRST: None}, 2)):
        found = Iterators([Match(KEY, at(0))], stored, 0, replicas)
        assert found.sources == ()
        assert f"and here are {replicas}" in found.left_out
        assert found.keys == (FIRST,)  # TensorFlow must not restore it either


def test_what_was_restored_can_be_undone():
    mine = at(2)
    found = Iterators([Match(KEY, mine)], {FIRST: None}, 0, 1)
    found.restore({FIRST: _private.iterator_state(at(7))})
    found.undo()
    assert int(next(mine)) == 2


def test_a_state_of_another_dataset_is_an_outcome_with_an_error():
    other = iter(tf.data.Dataset.range(9).batch(2).map(tf.identity))
    found = Iterators([Match(KEY, other)], {FIRST: None}, 0, 1)
    error = found.restore({FIRST: _private.iterator_state(at(1))}).error
    assert error.startswith("The iterator at data cannot go on where it was")


def test_other_objects_are_no_iterators():
    found = Iterators([Match("a", tf.Variable(1.0))], {"a": None}, 0, 2)
    assert (found.keys, found.sources, found.left_out) == ((), (), None)
