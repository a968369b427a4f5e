"""Canaries of gradient tapes."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from opensmp import _private


def test_tape_is_active():
    assert not _private.tape_is_active()
    with tf.GradientTape() as tape:
        assert _private.tape_is_active()
        with tape.stop_recording():
            assert not _private.tape_is_active()
    assert not _private.tape_is_active()


def test_is_watched():
    x, y = tf.constant(1.0), tf.constant(1.0)
    assert not _private.is_watched(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        assert _private.is_watched(x)
        assert not _private.is_watched(y)


def test_stop_recording():
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with _private.stop_recording():
            hidden = x * x
        y = x * 3.0 + hidden
    assert float(tape.gradient(y, x)) == 3.0


def test_lifted():
    @tf.function
    def run(x):
        with tf.GradientTape(), _private.lifted():
            assert tf.executing_eagerly()
            inner = tf.constant(3.0)
            with tf.GradientTape() as tape:
                tape.watch(inner)
                y = inner * inner
            slope = tape.gradient(y, inner)
        return x * float(slope)

    assert float(run(tf.constant(1.0))) == 6.0


@pytest.mark.parametrize("tape", [True, False])
def test_with_gradient(tape):
    @tf.function
    def run(x):
        with tf.GradientTape() as recorder:
            recorder.watch(x)
            with _private.stop_recording():
                y, z = x * 2.0, x * 3.0
            y, z = _private.with_gradient([y, z], [x], lambda dy, dz: [10.0 * dy + dz])
            total = y + z
        return y, z, recorder.gradient(total, x) if tape else tf.gradients(total, x)[0]

    assert [float(value) for value in run(tf.constant(1.0))] == [2.0, 3.0, 11.0]


def test_is_bridge():
    with tf.Graph().as_default():
        x = tf.constant(1.0)
        (y,) = _private.with_gradient([tf.identity(x)], [x], lambda upstream: [upstream])
        assert _private.is_bridge(y.op)
        assert not _private.is_bridge(tf.identity_n([x])[0].op)


def test_record_call():
    variable = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        with _private.stop_recording():
            result = 3.0 * variable
        _private.record_call([result], [variable], [], lambda upstream: [5.0 * upstream])
    np.testing.assert_array_equal(tape.gradient(result, variable), [5.0, 5.0])


def test_recording():
    x = tf.constant(2.0)
    with _private.stop_recording(), _private.recording(), tf.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    assert float(tape.gradient(y, x)) == 4.0


def test_watches_variable():
    weight, other = tf.Variable(1.0), tf.Variable(2.0)
    assert not _private.watches_variable(weight)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weight)
        with _private.stop_recording():
            assert _private.watches_variable(weight)
            assert not _private.watches_variable(other)
    with tf.GradientTape():
        assert _private.watches_variable(other)


def test_release_gradients():
    held = tf.function(lambda x: x)  # anything that a weak reference can point to
    seen = []

    def gradient(upstream, held=held):
        return [upstream]

    def refuse(args, upstream):
        seen.append((len(args), len(upstream)))
        return [100.0 * each for each in upstream]

    reference = weakref.ref(held)
    graph = tf.Graph()
    with graph.as_default():
        x = tf.constant(2.0)
        (y,) = _private.with_gradient([tf.identity(x)], [x], gradient)
        _private.release_gradients(graph, refuse)
        del held, gradient
        gc.collect()
        assert reference() is None
        (found,) = tf.gradients(y, x)
        with tf.compat.v1.Session(graph=graph) as session:
            assert session.run(found) == 100.0
    assert seen == [(1, 1)]
