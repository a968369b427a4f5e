"""Canaries of forward-mode accumulators."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf

from opensmp import _private

ONE = tf.constant(1.0)


def following():
    _private.follow_accumulators()
    _private.follow_accumulators()  # changes nothing a second time
    return tf.autodiff.ForwardAccumulator(ONE, ONE)


def test_follow_accumulators():
    with following() as outer, tf.autodiff.ForwardAccumulator(ONE, ONE * 3.0) as inner:
        y = ONE * 2.0
        assert _private.accumulators() == [outer, inner]
    assert float(outer.jvp(y)) == 2.0
    assert float(inner.jvp(y)) == 6.0


def test_accumulators():
    assert _private.accumulators() == []
    with following() as one:
        assert _private.accumulators() == [one]
        with tf.GradientTape():
            assert _private.accumulators() == [one]
    with pytest.raises(KeyError), following():
        raise KeyError
    assert _private.accumulators() == []


@pytest.mark.parametrize("where", ["eager", "graph"])
def test_without_accumulators(where):
    def run(x):
        with (
            tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as outer,
            tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as inner,
        ):
            with _private.without_accumulators():
                assert _private.accumulators() == []
                assert not _private.tape_is_active()
                with tf.GradientTape():
                    assert _private.tape_is_active()
                unseen = x**3
            seen = x**3
        assert inner.jvp(unseen) is None
        # In the order in which they were entered: the outer one sees what the inner one did.
        return outer.jvp(inner.jvp(seen)), inner.jvp(seen)

    following()
    second, first = (run if where == "eager" else tf.function(run, autograph=False))(ONE * 2.0)
    assert (float(second), float(first)) == (12.0, 12.0)


@pytest.mark.parametrize("where", ["eager", "graph"])
def test_is_accumulated(where):
    weight = keras.Variable([1.0])

    def run(x):
        variable = weight.value
        with tf.autodiff.ForwardAccumulator(variable, tf.ones([1])) as acc:
            assert _private.is_accumulated([acc], variable)
            assert _private.is_accumulated([acc], variable * x)
            assert not _private.is_accumulated([acc], x)
        with tf.autodiff.ForwardAccumulator(x, x) as acc:
            assert _private.is_accumulated([acc], x)
            assert not _private.is_accumulated([acc], variable)
        assert not _private.is_accumulated([], x)

    (run if where == "eager" else tf.function(run, autograph=False))(ONE)
