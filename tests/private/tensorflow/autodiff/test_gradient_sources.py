"""Canaries of tensors that are no sources of gradients."""

from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp import _private
from opensmp.errors import StepError


def test_note_source():
    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            inside = x * x
            result = inside * 3.0
        _private.note_source(inside, StepError("not with respect to this"))
        with pytest.raises(StepError, match="not with respect to this"):
            tape.gradient(result, {"inside": inside, "x": x})
        with pytest.raises(StepError, match="not with respect to this"):
            tape.jacobian(result, inside)
        return tape.gradient(result, x)

    assert float(run(tf.constant(2.0))) == 12.0


def test_check_sources():
    _private.check_sources()
    once = tf.GradientTape.gradient
    _private.check_sources()
    assert tf.GradientTape.gradient is once
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    assert float(tape.gradient(y, x, unconnected_gradients="zero")) == 4.0


@pytest.mark.parametrize("vectorized", [False, True])
def test_refuse_jacobian(vectorized):
    _private.check_sources()
    names = []

    def refusal(name):
        names.append(name)
        return StepError("no rows of this")

    @tf.custom_gradient
    def square(x):
        def gradient(upstream):
            _private.refuse_jacobian(refusal)
            return upstream * 2.0 * x

        return x * x, gradient

    x = tf.constant([[2.0, 3.0]])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = square(x)
    assert tape.gradient(y, x).numpy().tolist() == [[4.0, 6.0]]
    for ask in (tape.jacobian, tape.batch_jacobian):
        with pytest.raises(StepError, match="no rows of this"):
            ask(y, x, experimental_use_pfor=vectorized)
    assert set(names) == {"jacobian", "batch_jacobian"}
    assert tape.gradient(y, x).numpy().tolist() == [[4.0, 6.0]]
