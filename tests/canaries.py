"""What the canaries of private names are tried on."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from opensmp import _private


def graph_with(*shapes: list[int]) -> tuple[Any, list[Any]]:
    """A new function graph and placeholders in it."""
    graph = _private.new_graph("canary")
    with graph.as_default():
        return graph, [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]


def waiting_variable(**kwargs: Any) -> Any:
    """A Keras variable that has no memory yet."""
    with keras.StatelessScope(initialize_variables=False):
        return keras.Variable(keras.initializers.Constant(3.0), shape=(2,), **kwargs)


def elsewhere() -> Any:
    """A kernel of shape (3, 2) that was given up."""
    layer = keras.layers.Dense(2)
    layer.build([1, 3])
    _private.give_up(layer.kernel, "kernel of rank 7")
    return layer.kernel
