"""Detects changes of a model's Python attributes, which require a new trace.

An eager call of a plain Keras model runs its Python code each time; a partitioned model runs a
graph that was traced once. Comparing the attributes that the code may read shows when the trace is
stale. Changes of global variables and of closures are not detected, as with `tf.function`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from opensmp import _private

_DEPTH = 4
_PLAIN = frozenset({type(None), bool, int, str, bytes})
_NUMBERS = (float, complex, np.generic)
_LISTS = (list, tuple)
_NAMESPACES = (types.ModuleType, type)
_LIBRARIES = frozenset({"builtins", "keras", "keras_hub", "numpy", "opensmp", "tensorflow"})


class _Same:
    """Compares an object by identity, and keeps it alive."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def attributes(model: Any) -> tuple[Any, ...]:
    """Snapshot of a model's attributes, for comparison with a later one.

    Covers the layers in the model at any depth. Numbers, strings and arrays compare by value;
    lists, dicts and plain objects by their entries; everything else (tensors, variables, layers,
    functions) by identity.
    """
    return tuple(
        (_Same(layer), *_entries(vars(layer), 0, _private.BOOKKEEPING))
        for layer in _private.all_layers(model)
    )


def _entries(values: Mapping[Any, Any], depth: int, ignored: frozenset[str]) -> tuple[Any, ...]:
    return tuple(
        (name, _token(value, depth + 1))
        for name, value in list(values.items())  # another thread may set one meanwhile
        if name not in ignored and not str(name).startswith("_smp_")
    )


def _token(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, _NUMBERS):
        return kind, repr(value)  # nan is not equal to itself
    if depth > _DEPTH:
        return _Same(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16)
        return value.shape, value.dtype.str, digest.digest()
    if isinstance(value, _LISTS):
        return kind, tuple(_token(each, depth + 1) for each in value)
    if isinstance(value, Mapping):
        return kind, _entries(value, depth, frozenset())
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return tuple(_token(each, depth + 1) for each in parts)
    return _Same(value), *_fields(value, depth)


def _fields(value: Any, depth: int) -> tuple[Any, ...]:
    """Attributes of an object of a user-defined class; nothing for other objects."""
    kind: Any = type(value)
    if _is_opaque(kind) or isinstance(value, _NAMESPACES):
        return ()
    if dataclasses.is_dataclass(value):
        found = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    else:
        found = getattr(value, "__dict__", {})
    return _entries(found, depth, frozenset())


@functools.cache
def _is_opaque(kind: Any) -> bool:
    """Whether objects of a class compare by identity only: library classes and Keras objects."""
    known = (keras.layers.Layer, keras.Variable, keras.metrics.Metric, keras.optimizers.Optimizer)
    return kind.__module__.partition(".")[0] in _LIBRARIES or issubclass(kind, known)
