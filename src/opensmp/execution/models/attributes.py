"""Detects changes of a model's Python attributes, which require a new trace.

An eager call of a plain Keras model runs its Python code each time; a partitioned model runs a
graph that was traced once. Comparing the attributes that the code may read shows when the trace is
stale. Changes of global variables and of closures are not detected, as with `tf.function`.
"""

from __future__ import annotations

import argparse
import array
import collections
import functools
import hashlib
import operator
import sys
import types
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from opensmp import _private

_PLAIN = frozenset({type(None), bool, int, str, bytes})
_NUMBERS = (float, complex, np.generic)
_LISTS = (list, tuple, collections.deque)
_SETS = (set, frozenset)
_BYTES = (bytearray, array.array)
_LIBRARIES = sys.stdlib_module_names | {"keras", "keras_hub", "numpy", "opensmp", "tensorflow"}
_RECORDS = (types.SimpleNamespace, argparse.Namespace)
_END = object()
_MOST_OBJECTS = 16
"""How many objects deep fields are compared; an application may hang on a model's attribute."""


def attributes(model: Any) -> Attributes:
    """Snapshot of a model's attributes, for comparison with a later one.

    Covers the layers in the model at any depth. Numbers, strings, arrays and sets compare by value;
    lists, dicts and plain objects by their entries; everything else (tensors, variables, layers,
    functions) by identity.
    """
    snapshot = Attributes()
    for layer in _private.all_layers(model):
        snapshot.add(layer, vars(layer), _private.BOOKKEEPING)
    return snapshot


class Attributes:
    """Values of attributes, one after the other; see `attributes`.

    Two flat lists, as thousands of small objects would keep the garbage collector busy.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self._values: list[Any] = []  # compared by value; classes and ends of dicts are among them
        self._objects: list[Any] = []  # compared by identity, and kept alive
        self._seen: set[int] = set()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Attributes)
            and self._values == other._values
            and len(self._objects) == len(other._objects)
            and all(map(operator.is_, self._objects, other._objects))
        )

    def add(self, owner: Any, entries: Mapping[Any, Any], ignored: frozenset[str]) -> None:
        """Adds the attributes of an object, but those of the names `ignored`."""
        self._objects.append(owner)
        self._add_entries(entries, 0, ignored)
        self._add_classes(type(owner), 0)

    def _add_entries(
        self, entries: Mapping[Any, Any], depth: int, ignored: frozenset[str] = frozenset()
    ) -> None:
        """Adds the entries of a dict; `depth` counts the objects around it."""
        for name, value in list(entries.items()):  # another thread may set one meanwhile
            if name not in ignored and not str(name).startswith("_smp_"):
                self._values.append(name)
                self._add(value, depth)
        self._values.append(_END)

    def _add(self, value: Any, depth: int) -> None:
        kind: Any = type(value)
        self._values.append(kind)
        if kind in _PLAIN:
            self._values.append(value)
        elif isinstance(value, _NUMBERS):
            self._values.append(repr(value))  # nan is not equal to itself
        elif id(value) in self._seen:  # again, as in a cycle: its entries have been added
            self._objects.append(value)
        elif isinstance(value, type):
            self._objects.append(value)
            self._add_classes(value, depth)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            data: Any = np.ascontiguousarray(value).view(np.uint8)
            digest = hashlib.blake2b(data, digest_size=16).digest()
            self._values += [value.shape, value.dtype.str, digest]
        elif isinstance(value, _SETS):
            self._values.append(frozenset(value))
        elif isinstance(value, _BYTES):
            self._values.append(bytes(value))
        else:
            self._seen.add(id(value))
            self._add_parts(value, depth)
            if depth < _MOST_OBJECTS and not _is_opaque(kind):
                self._add_fields(value, depth + 1)

    def _add_parts(self, value: Any, depth: int) -> None:
        """Adds what a container consists of; else the object itself, and what it is bound to."""
        if isinstance(value, _LISTS):
            self._values.append(len(value))
            for each in value:
                self._add(each, depth)
        elif isinstance(value, np.ndarray):
            self._values.append(value.shape)
            for each in value.flat:
                self._add(each, depth)
        elif isinstance(value, Mapping):
            self._add_entries(value, depth)
        else:
            self._objects.append(value)
            if isinstance(value, functools.partial):
                for each in (value.func, value.args, value.keywords):
                    self._add(each, depth)
            elif isinstance(value, types.MethodType):
                self._add(value.__self__, depth)

    def _add_fields(self, value: Any, depth: int) -> None:
        """Adds the attributes of an object of a user-defined class, and of its class."""
        kind: Any = type(value)
        slots = {name: getattr(value, name) for name in _slots(kind) if hasattr(value, name)}
        self._add_entries({**slots, **getattr(value, "__dict__", {})}, depth)
        self._add_classes(kind, depth)

    def _add_classes(self, kind: type, depth: int) -> None:
        """Adds the attributes of user-defined classes among a class and its bases."""
        for base in kind.__mro__:
            if not _is_of_library(base) and id(base) not in self._seen:
                self._seen.add(id(base))
                self._add_entries(vars(base), depth)


@functools.cache
def _is_of_library(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


@functools.cache
def _is_opaque(kind: Any) -> bool:
    """Whether objects of a class compare by identity only: library classes and Keras objects."""
    if issubclass(kind, _RECORDS):
        return False
    known = (keras.layers.Layer, keras.Variable, keras.metrics.Metric, keras.optimizers.Optimizer)
    return _is_of_library(kind) or issubclass(kind, (*known, types.ModuleType, type))


@functools.cache
def _slots(kind: Any) -> tuple[str, ...]:
    """Names of the slots of a class and its bases."""
    found = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    return tuple(name for each in found for name in ([each] if isinstance(each, str) else each))
