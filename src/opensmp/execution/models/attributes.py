"""What Python has set in a model, to see whether its call may compute something else now.

An eager call of a plain Keras model runs its Python code each time; that of a split model runs a
graph that was traced once. What the code reads of the model's own attributes is compared here, so
that the graph is made anew after a change. Global variables, and what functions close over, are not
seen, as `tf.function` does not see them.
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

# What a bare layer has too and a call may depend on; the rest of that is Keras' own bookkeeping.
_OF_KERAS = frozenset(
    {"_dtype_policy", "_trainable", "activity_regularizer", "autocast", "supports_masking"}
)


class _Same:
    """Equal to itself alone: stands for an object that is not looked into, and keeps it alive."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def attributes(model: Any) -> tuple[Any, ...]:
    """Something that equals what it was before unless an attribute was set in the meantime.

    Args:
        model: The model; layers in it, at any depth, count as well.

    Returns:
        Numbers, texts and arrays by value, lists, dicts and plain objects by their entries, all
        else (tensors, variables, layers, functions) by identity.
    """
    ignored = _bookkeeping()
    return tuple(
        (_Same(layer), *_entries(vars(layer), 0, ignored)) for layer in _private.all_layers(model)
    )


def _entries(values: Mapping[Any, Any], depth: int, ignored: frozenset[str]) -> tuple[Any, ...]:
    return tuple(
        (name, _token(value, depth + 1))
        for name, value in values.items()
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
    """What a plain object of the user's own has; nothing for others."""
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
    """Whether objects of a class are not looked into: those of libraries, and Keras' own kinds."""
    known = (keras.layers.Layer, keras.Variable, keras.metrics.Metric, keras.optimizers.Optimizer)
    return kind.__module__.partition(".")[0] in _LIBRARIES or issubclass(kind, known)


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """Names of what Keras sets in layers and models by itself."""
    inputs = keras.Input((1,))
    bare = [
        keras.layers.Layer(),
        keras.Sequential([inputs, keras.layers.Layer()]),
        keras.Model(inputs, keras.layers.Identity()(inputs)),
    ]
    for model in bare[1:]:
        model.compile("sgd", "mse")
    found = {name for layer in bare for name in vars(layer)}
    return frozenset(found | {"history", "stop_training"}) - _OF_KERAS
