"""Detects objects passed to TensorFlow functions that cannot take them as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf


class _Refusing(tf.__internal__.dispatch.GlobalOpDispatcher):
    """Dispatcher that TensorFlow calls after a function has failed to convert its arguments."""

    def __init__(self, kind: type, refuse: Callable[[Any, str], None]) -> None:
        self._kind, self._refuse = kind, refuse

    def handle(self, op: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        for leaf in _leaves([args, kwargs]):
            if isinstance(leaf, self._kind):
                self._refuse(leaf, _name_of(op))
        return self.NOT_SUPPORTED


def refuse_in_api_calls(kind: type, refuse: Callable[[Any, str], None]) -> None:
    """Calls `refuse` where a TensorFlow function is given an object of a type that is no tensor.

    In a graph, TensorFlow replaces the error of a conversion function by its own. The public hook
    covers one named function, or dispatches on tensor arguments only.
    """
    _Refusing(kind, refuse).register()


def _leaves(nest: Any) -> Iterator[Any]:
    """Leaves of nested lists and dicts; `tf.nest` would also take apart objects that support it."""
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
