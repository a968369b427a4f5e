"""Hook that runs before a new Keras variable allocates memory."""

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
    """The Keras base class of `keras.Variable` that defines the patched method."""
    return next(kind for kind in keras.Variable.__mro__ if _METHOD in vars(kind))


@contextlib.contextmanager
def before_variables(note: Callable[[tuple[int, ...]], None]) -> Iterator[None]:
    """Context in which `note` receives the shape of each Keras variable that this thread creates.

    It is called before the initial value is computed, which is the first allocation; an error that
    it raises propagates through the layer that creates the variable. Keras has no public hook:
    `tf.variable_creator_scope` sees only a function that computes the value, without a shape.
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
