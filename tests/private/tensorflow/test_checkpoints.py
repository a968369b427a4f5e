"""Canaries of `tf.train.Checkpoint`."""

from __future__ import annotations

import gc
import weakref

import keras
import tensorflow as tf

from opensmp import _private


def test_checkpoint_values():
    number = tf.Variable(3.0)
    values, graph = _private.checkpoint_values(tf.train.Checkpoint(number=number))
    found = {value.key: value for value in values}
    mine = found["number/.ATTRIBUTES/VARIABLE_VALUE"]
    assert mine.owner is number
    assert float(mine.read()) == 3.0
    assert graph
    iterator = iter(tf.data.Dataset.range(3))
    values, _ = _private.checkpoint_values(tf.train.Checkpoint(data=iterator))
    assert iterator in [value.owner for value in values]


def test_checkpoint_nodes():
    _, graph = _private.checkpoint_values(tf.train.Checkpoint(number=tf.Variable(3.0)))
    nodes = _private.checkpoint_nodes(graph)
    number = nodes[nodes[0].children["number"]]
    assert list(number.keys.values()) == ["number/.ATTRIBUTES/VARIABLE_VALUE"]


def test_checkpoint_root():
    model = keras.Sequential([keras.layers.Dense(1)])
    step = tf.Variable(0)
    checkpoint = tf.train.Checkpoint(model, step=step)
    root, attached = _private.checkpoint_root(checkpoint)
    assert root is model
    assert attached["step"] is step


def test_restore_where_values_are(tmp_path):
    path = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0)).write(str(tmp_path / "c"))
    _private.restore_where_values_are()
    here, away = keras.Variable(0.0), keras.Variable(0.0)
    _private.give_up(away, "another rank")
    tf.train.Checkpoint(a=here.value, b=_private.storage(away)).read(path)
    assert float(here.value) == 1.0
    assert _private.is_elsewhere(away)


def test_values_at_hand(tmp_path):
    path = tf.train.Checkpoint(a=tf.Variable(1.0)).write(str(tmp_path / "c"))
    _private.restore_where_values_are()
    variable = tf.Variable(0.0)
    read_before = {"a/.ATTRIBUTES/VARIABLE_VALUE": tf.constant(5.0)}
    with _private.values_at_hand(read_before):
        tf.train.Checkpoint(a=variable).read(path)
    assert float(variable) == 5.0
    assert not read_before


def test_before_late_restores(tmp_path):
    path = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0)).write(str(tmp_path / "c"))
    _private.restore_where_values_are()
    checkpoint = tf.train.Checkpoint(a=tf.Variable(0.0))
    seen = []
    status = checkpoint.read(path)
    _private.before_late_restores(status, lambda keys, owner: seen.append((keys, owner)))
    checkpoint.b = tf.Variable(0.0)
    assert seen == [(["b/.ATTRIBUTES/VARIABLE_VALUE"], checkpoint.b)]
    assert float(checkpoint.b) == 2.0


def test_keep_with_restore(tmp_path):
    class Thing:
        pass

    path = tf.train.Checkpoint(a=tf.Variable(1.0), b=tf.Variable(2.0)).write(str(tmp_path / "c"))
    checkpoint, thing = tf.train.Checkpoint(a=tf.Variable(0.0)), Thing()
    kept = weakref.ref(thing)
    _private.keep_with_restore(checkpoint.read(path), thing)
    del thing
    gc.collect()
    assert kept() is not None  # for b may still be made
    del checkpoint
    gc.collect()
    assert kept() is None


def test_iterator_state():
    iterator = iter(tf.data.Dataset.range(5))
    assert _private.iterator_state(iterator).dtype == tf.variant


def test_set_iterator_state():
    first, second = (iter(tf.data.Dataset.range(5)) for _ in range(2))
    next(first)
    _private.set_iterator_state(second, _private.iterator_state(first))
    assert int(next(second)) == 1


def test_track_all_variables():
    class Model(keras.Sequential):
        pass

    _private.track_all_variables(Model)
    model = Model([keras.layers.Dense(2), keras.layers.BatchNormalization()])
    model(tf.zeros([1, 3]))
    values, _ = _private.checkpoint_values(tf.train.Checkpoint(model=model))
    assert len(values) == len(model.variables)
