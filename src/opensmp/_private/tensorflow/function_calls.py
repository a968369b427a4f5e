"""Hook around eager calls of `tf.function`s."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function.concrete_function import ConcreteFunction
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

_ORIGINAL = "_opensmp_original"

Around = Callable[[Any, Callable[[], Any]], Any]


def call_functions_by(around: Around) -> None:
    """Routes eager calls of all `tf.function`s through `around` from now on.

    A function may fail anywhere below a call that only the user's code makes, that of the outermost
    function. There is no public hook around that call.
    """
    for kind in (Function, ConcreteFunction):
        original = getattr(kind.__call__, _ORIGINAL, kind.__call__)
        kind.__call__ = _wrapped(original, around)


def _wrapped(original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return original(self, *args, **kwargs)
        return around(self, functools.partial(original, self, *args, **kwargs))

    setattr(call, _ORIGINAL, original)
    return call
