"""Calls of TensorFlow's own functions with objects that are no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf


class _Refusing(tf.__internal__.dispatch.GlobalOpDispatcher):
    """Told of calls of TensorFlow functions that have failed."""

    def __init__(self, kind: type, refuse: Callable[[Any, str], None]) -> None:
        self._kind, self._refuse = kind, refuse

    def handle(self, op: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        for leaf in _leaves([args, kwargs]):
            if isinstance(leaf, self._kind):
                self._refuse(leaf, _name_of(op))
        return self.NOT_SUPPORTED


def refuse_in_api_calls(kind: type, refuse: Callable[[Any, str], None]) -> None:
    """Has a function called where TensorFlow cannot take an object for a tensor.

    In a graph TensorFlow buries the error of a conversion function in one of its own. There is
    a public hook by name of one function or by number of its tensors only.

    Args:
        kind: Class of the objects.
        refuse: Takes the object and the name of TensorFlow's function; raises.
    """
    _Refusing(kind, refuse).register()


def _leaves(nest: Any) -> Iterator[Any]:
    """What lies in lists and dicts; `tf.nest` takes objects apart that ask for it."""
    if isinstance(nest, Mapping):
        nest = list(nest.values())
    if isinstance(nest, (list, tuple)):
        for each in nest:
            yield from _leaves(each)
    else:
        yield nest


def _name_of(op: Any) -> str:
    names = getattr(op, "_tf_api_names", ())
    public = [name for name in names if not name.startswith("raw_ops.")]
    own = getattr(op, "__name__", "function").removesuffix("_with_dispatch").removesuffix("_v2")
    return f"tf.{min(public or [own], key=len)}"
