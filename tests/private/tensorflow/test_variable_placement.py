"""Canaries of variables whose reads are followed."""

from __future__ import annotations

import contextlib

import keras
import pytest
import tensorflow as tf
from canaries import elsewhere

from opensmp import _private
from opensmp._private.tensorflow import variable_placement
from opensmp.errors import ElsewhereError

HERE = _private.Home(0, (1,), "here")


class Follower:
    """Notes what it is told; gives ones for what is elsewhere."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def is_plain(self) -> bool:
        return False

    def read(self, variable):
        self.told.append("elsewhere")
        value = tf.ones(variable.shape)
        _private.record_read(variable, value)
        return value

    def has_read(self, variable, value):
        self.told.append("read")

    def assigns(self, variable):
        self.told.append("assigned")


@contextlib.contextmanager
def followed():
    before, follower = variable_placement._follower, Follower()
    _private.follow_reads(follower)
    try:
        yield follower
    finally:
        _private.follow_reads(before)


def test_follow_reads():
    variable, away = keras.Variable([[1.0, 2.0]]), elsewhere()
    _private.set_home(variable, HERE)

    @tf.function(autograph=False)
    def function():
        total = tf.reduce_sum(variable + 1.0) + tf.reduce_sum(tf.gather(variable.value, [0]))
        variable.assign([[3.0, 4.0]])
        away.assign(tf.zeros([3, 2]))
        return total + tf.reduce_sum(0.5 * away)

    with followed() as follower:
        assert float(function()) == 5.0 + 3.0 + 3.0
    assert follower.told == ["read", "read", "assigned", "assigned", "elsewhere"]
    assert variable.numpy().tolist() == [[3.0, 4.0]]


def test_set_home():
    variable = tf.Variable(1.0)
    _private.set_home(variable, HERE)
    assert isinstance(variable, tf.Variable)
    assert float(variable.assign_add(1.0)) == 2.0
    assert float(0.5 * variable) == 1.0


def test_home_of():
    variable = keras.Variable(1.0)
    assert _private.home_of(variable) is None
    _private.set_home(variable, HERE)
    assert _private.home_of(variable) == _private.home_of(variable.value) == HERE
    _private.give_up(variable, "v of rank 1")
    assert _private.home_of(variable) == HERE


def test_home_of_handle():
    variable = keras.Variable(1.0)
    _private.set_home(variable, HERE)
    function = tf.function(lambda: variable.value + 1.0, autograph=False).get_concrete_function()
    ((outer, _),) = _private.captures(function.graph)
    assert _private.home_of_handle(outer) == HERE
    assert _private.home_of_handle(tf.constant(1)) is None


def test_not_followed():
    variable = keras.Variable(1.0)
    _private.set_home(variable, HERE)
    with followed() as follower, _private.not_followed():
        tf.function(lambda: variable.value + 1.0, autograph=False)()
    assert follower.told == []


def test_is_followed():
    assert _private.is_followed()
    with _private.not_followed():
        assert not _private.is_followed()
    assert _private.is_followed()


def test_note_assigned():
    away = elsewhere()
    with followed() as follower:
        _private.note_assigned(away)
        assert follower.told == []  # outside of a function

        def function():
            with _private.not_followed():
                _private.note_assigned(away)

        tf.function(function, autograph=False)()
    assert follower.told == ["assigned"]


def test_record_read():
    away = elsewhere()

    @tf.function(autograph=False)
    def function():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(3.0 * away)
        return tape.gradient(total, away.value)

    with followed():
        assert function().numpy().tolist() == [[3.0, 3.0]] * 3


@pytest.mark.parametrize(
    "read",
    [
        lambda v: 0.9 * v,
        lambda v: 0.9 * v.value,
        lambda v: tf.multiply(0.9, v.value),
        lambda v: tf.raw_ops.MatMul(a=v.value, b=v.value),
        lambda v: v.value @ v.value,
        lambda v: v.value[0],
        lambda v: v.value == 1.0,
        lambda v: tf.gather(v.value, [0]),
        lambda v: tf.gather_nd(v.value, [[0, 0]]),
        lambda v: tf.nn.embedding_lookup(v.value, [0]),
        lambda v: tf.reduce_sum(v),
        lambda v: tf.stack([v.value]),
        lambda v: v.value.read_value(),
        lambda v: v.numpy(),
        lambda v: tf.function(lambda w: w + 1.0, autograph=False)(v.value),
        lambda v: v.assign_add(tf.ones([3, 2])),
    ],
)
def test_no_read_outside_of_graphs_gets_past(read):
    """TensorFlow's fast path, written in C, reads by the handle and would give an empty tensor."""
    with pytest.raises(ElsewhereError, match="kernel of rank 7 was"):
        read(elsewhere())


def test_an_operation_that_has_the_handle_fails_by_name():
    kernel = elsewhere().value
    with pytest.raises(tf.errors.FailedPreconditionError, match="kernel of rank 7, which was read"):
        tf.raw_ops.ReadVariableOp(resource=kernel.handle, dtype=tf.float32)


def test_assignments_are_dropped():
    kernel = elsewhere()
    kernel.assign(tf.ones([3, 2]))
    kernel.value.scatter_nd_update([[0, 0]], [1.0])
    assert not kernel.value.is_initialized()
