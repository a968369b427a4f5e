"""Canaries of custom gradients."""

from __future__ import annotations

import contextlib

import pytest
import tensorflow as tf

from opensmp import _private


@pytest.mark.parametrize("takes", [True, False])
def test_reads_in_custom_gradients(takes):
    reads = []

    @contextlib.contextmanager
    def collect():
        reads.append({})
        yield reads[-1]

    def read():
        reads[-1][id(value)] = value
        return value

    @tf.custom_gradient
    def scaled(x):
        factor = read()

        def with_variables(upstream, variables):
            assert all(each is value for each in variables)
            return upstream * factor, [upstream * 100.0 for _ in variables]

        return x * factor, with_variables if takes else lambda upstream: upstream * factor

    graph = tf.Graph()
    with graph.as_default():
        x, value = tf.constant(2.0), tf.constant(3.0)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_private.reads_in_custom_gradients(collect))
            if not takes:
                stack.enter_context(pytest.raises(TypeError, match="argument 'variables'"))
            y = scaled(x)
        if takes:
            found = tf.gradients(y, [x, value])
            with tf.compat.v1.Session(graph=graph) as session:
                assert session.run([y, *found]) == [6.0, 3.0, 100.0]
