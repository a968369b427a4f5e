"""Canaries of calls of TensorFlow's own functions."""

from __future__ import annotations

import pytest
import tensorflow as tf

from opensmp import _private


class Lookalike:
    """No tensor."""


class Refused(ValueError):
    """Names the function."""


def refuse(value, function):
    raise Refused(function)


_private.refuse_in_api_calls(Lookalike, refuse)


@pytest.mark.parametrize("where", ["eager", "graph"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tf.add", lambda one: tf.add(one, 1.0)),
        ("tf.clip_by_global_norm", lambda one: tf.clip_by_global_norm([tf.ones([2]), one], 1.0)),
        ("tf.concat", lambda one: tf.concat([one, one], 0)),
        ("tf.maximum", lambda one: tf.maximum(tf.ones([2]), y=one)),
        ("tf.convert_to_tensor", lambda one: tf.convert_to_tensor(one)),
    ],
)
def test_refuse_in_api_calls(name, call, where):
    def run():
        call(Lookalike())

    with pytest.raises(Refused, match=f"^{name}$"):
        (run if where == "eager" else tf.function(run, autograph=False))()


def test_refuse_in_api_calls__leaves_other_errors_as_they_are():
    with pytest.raises((TypeError, ValueError)):
        tf.add(object(), 1.0)
