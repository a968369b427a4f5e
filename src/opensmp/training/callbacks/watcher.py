"""Callbacks that watch training without deciding anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


class Watcher(keras.callbacks.Callback):
    """A callback that decides nothing, so that ranks need not agree after each of its hooks."""

    def on_train_error(self, error: BaseException) -> None:
        """Is called if `fit` ends with an error, which Keras tells no callback."""


@contextlib.contextmanager
def watched(callbacks: Any) -> Iterator[None]:
    """Context of a `fit` call that tells the watchers among its callbacks of its error."""
    try:
        yield
    except BaseException as error:
        for each in tf.nest.flatten(callbacks or ()):
            if isinstance(each, Watcher):
                each.on_train_error(error)
        raise
