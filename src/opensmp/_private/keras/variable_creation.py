"""Variables at the moment before they take memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

_METHOD = "_initialize_with_initializer"

_lock = threading.Lock()
_watchers: list[tuple[int, Callable[[tuple[int, ...]], None]]] = []
_original: list[Any] = []


def _owner() -> Any:
    """The class of TensorFlow's variables in Keras; the public one is below it."""
    return next(kind for kind in keras.Variable.__mro__ if _METHOD in vars(kind))


@contextlib.contextmanager
def before_variables(note: Callable[[tuple[int, ...]], None]) -> Iterator[None]:
    """Context in which a function gets the shape of each new Keras variable of this thread.

    It is called before the initial value is made, which is the first thing that takes memory;
    an error that it raises leaves through the layer that wanted the variable. Keras has no public
    place for that: `tf.variable_creator_scope` sees a function that makes the value, and no shape.

    Args:
        note: Gets the shape.
    """
    watcher = (threading.get_ident(), note)
    with _lock:
        if not _watchers:
            _original[:] = [vars(_owner())[_METHOD]]
            setattr(_owner(), _METHOD, _watched)
        _watchers.append(watcher)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(watcher)
            if not _watchers:
                setattr(_owner(), _METHOD, _original[0])


def _watched(self: Any, initializer: Any) -> None:
    for thread, note in list(_watchers):
        if thread == threading.get_ident():
            note(tuple(self._shape))
    _original[0](self, initializer)
