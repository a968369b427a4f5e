"""Runs in which TensorFlow itself reorders nothing.

Two things of TensorFlow add numbers in another order for a split model than for a whole one.
The graph optimizer rewrites sums wherever it sees all of their terms, and a border between
partitions hides some from it. A `tf.GradientTape` and `tf.gradients` add three or more
contributions to one gradient in different orders, and a partition is differentiated with
the latter, whatever the user's step uses. Here the optimizer is off and plain Keras takes
its gradients with `tf.gradients` too; what still differs is of our own making.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import keras
import tensorflow as tf

Tensor = Any


@contextlib.contextmanager
def without_graph_optimizer() -> Iterator[None]:
    """Leaves graphs as they were traced."""
    option = "disable_meta_optimizer"
    before = tf.config.optimizer.get_experimental_options().get(option, False)
    tf.config.optimizer.set_experimental_options({option: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: before})


@contextlib.contextmanager
def tapes_as_graph_gradients() -> Iterator[None]:
    """Makes every `tf.GradientTape` take its gradients with `tf.gradients`."""
    with mock.patch.object(tf, "GradientTape", _GraphTape):
        yield


class _GraphTape:
    """The interface of `tf.GradientTape` over `tf.gradients`."""

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        self._watches_variables = watch_accessed_variables
        self._watched: set[int] = set()

    def __enter__(self) -> _GraphTape:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def watch(self, tensors: Any) -> None:
        self._watched |= {id(_variable(t)) for t in tf.nest.flatten(tensors)}

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
    ) -> Any:
        wanted = [_variable(source) for source in tf.nest.flatten(sources)]
        found = tf.gradients(
            tf.nest.flatten(target),
            wanted,
            grad_ys=None if output_gradients is None else tf.nest.flatten(output_gradients),
            unconnected_gradients=unconnected_gradients,
        )
        seen = [g if self._sees(source) else None for g, source in zip(found, wanted, strict=True)]
        return tf.nest.pack_sequence_as(sources, seen)

    def _sees(self, source: Any) -> bool:
        is_variable = isinstance(source, tf.Variable)
        return not is_variable or self._watches_variables or id(source) in self._watched


def _variable(source: Any) -> Any:
    return source.value if isinstance(source, keras.Variable) else source
