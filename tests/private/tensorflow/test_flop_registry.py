"""Canaries of statistics of operations."""

from __future__ import annotations

import tensorflow as tf
from canaries import graph_with

from opensmp import _private


def test_registered_flops():
    _, (x, y) = graph_with([2, 3], [3, 4])
    with x.graph.as_default():
        product = (x @ y).op
        other = tf.reshape(x, [-1]).op
    assert _private.registered_flops(product, [[2, 3], [3, 4]], [[2, 4]]) == 2 * 2 * 3 * 4
    assert _private.registered_flops(other, [[2, 3], [1]], [[6]]) in (None, 0.0)
