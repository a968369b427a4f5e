from __future__ import annotations

import keras
import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.errors import CheckpointError
from opensmp.saving.checkpoint.contents import OBJECT_GRAPH, Contents, Facts, Place, of_replica

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def contents(place, elsewhere=(), **more):
    """Variables `a` and `b`, and an iterator, in a process that lacks some of the variables."""
    variables = {name: keras.Variable(1.0, name=name) for name in "ab"}
    for name in elsewhere:
        _private.give_up(variables[name], name)
    checkpoint = tf.train.Checkpoint(
        **{name: variable.value for name, variable in variables.items() if name not in elsewhere},
        **{name: _private.storage(variables[name]) for name in elsewhere},
        data=iter(tf.data.Dataset.range(3)),
        **more,
    )
    return Contents(checkpoint, place)


def keys(made, facts):
    found = {value.name.partition("/.")[0] for value in made.share(facts)}
    return found - {"save_counter"}


def test_each_value_is_written_once_by_the_first_that_has_it():
    first = contents(Place(0, 0), elsewhere="b")
    second = contents(Place(0, 1), elsewhere="a")
    facts = [first.facts, second.facts]
    assert keys(first, facts) == {"a", "data", OBJECT_GRAPH}
    assert keys(second, facts) == {"b"}


def test_of_a_copy_the_value_of_the_process_that_changes_it_is_written():
    made = []
    for member, kept in enumerate("ba"):
        copy = keras.Variable(1.0)
        _private.set_copy(copy, kept == "b")
        made.append(contents(Place(0, member), seed=_private.storage(copy)))
    facts = [each.facts for each in made]
    assert "seed" not in keys(made[0], facts)
    assert "seed" in keys(made[1], facts)


def test_other_replicas_write_where_their_data_are_and_nothing_else():
    made = [contents(Place(replica, 0)) for replica in range(2)]
    facts = [each.facts for each in made]
    assert keys(made[0], facts) == {"a", "b", "data", OBJECT_GRAPH}
    assert keys(made[1], facts) == {"replica-1/data"}
    assert of_replica("x", 0) == "x"


def test_a_value_that_nobody_has_is_an_error():
    made = contents(Place(0, 0), elsewhere="b")
    with pytest.raises(CheckpointError, match=r"No process has a value for b/"):
        made.share([made.facts])


def test_other_objects_in_another_process_are_an_error_that_names_them():
    first, second = contents(Place(0, 0)), contents(Place(0, 1), c=tf.Variable(1.0))
    with pytest.raises(CheckpointError, match=rf"only in rank 1: c{VALUE}"):
        first.share([first.facts, second.facts])


def test_digests_depend_on_the_keys_alone():
    one, two = (Facts(Place(0, n), ("a", "b"), frozenset("ab"[n])) for n in range(2))
    assert one.digest == two.digest
    assert one.digest != Facts(Place(0, 0), ("a",), frozenset()).digest
