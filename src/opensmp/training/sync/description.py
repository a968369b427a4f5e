"""Descriptions of values that are equal in all processes for equal values."""

from __future__ import annotations

import enum
import functools
import inspect
import os
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opensmp import _private
from opensmp.training.sync.fingerprint import fingerprint

_DEEPEST = 12
_MOST_SHOWN = 16
_COUNTER = re.compile(r"_\d+(?=/|$)")
_NUMBERS = (bool, int, float, np.generic)
_LEFT_OUT = frozenset({"seed", "shared_object_id", "build_config"})
"""Configuration keys to skip: seeds drawn by Keras, ids, and duplicates of shapes."""


def described(value: Any, deepest: int = _DEEPEST) -> str:
    """Describes a value, without object ids and without counters in automatic names.

    Numbers, strings and containers are described by value; Keras objects by class and
    configuration; functions by name, location in the code, and the numbers and strings in their
    closure and defaults; other objects by class and public numeric attributes.
    """
    if deepest == 0:
        return "..."
    inner = functools.partial(described, deepest=deepest - 1)
    if value is None or isinstance(value, (str, bytes)):
        return repr(value)
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, _NUMBERS):
        return _number(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, tf.DType):
        return repr(value.name)
    if isinstance(value, (keras.Variable, tf.Variable, keras.KerasTensor)):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return _mapping(value, inner)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, type):
        return name_of(value)
    if isinstance(value, types.MethodType):
        return f"{inner(value.__func__)} of {name_of(type(value.__self__))}"
    if callable(value) and hasattr(value, "__qualname__"):
        return _function(value, inner)
    if isinstance(value, np.ndarray) or (not hasattr(value, "get_config") and tf.is_tensor(value)):
        return _array(value)  # checked last, because tf.is_tensor is slow
    return f"{name_of(type(value))}({', '.join(_parts(value, inner))})"


def name_of(kind: Any) -> str:
    """Module and qualified name of a class or function; the public module for those of Keras."""
    module = getattr(kind, "__module__", None) or ""
    package, *parts = module.split(".")
    if package == "keras" and len(parts) > 1 and parts[0] == "src":
        module = f"keras.{parts[1]}"
    return f"{module}.{getattr(kind, '__qualname__', type(kind).__name__)}"


def without_counters(name: str) -> str:
    """A name or path without the counters that Keras appends to equal names: `"dense_2/kernel"`."""
    return _COUNTER.sub("", name)


def config_of(value: Any) -> dict[str, Any] | None:
    """The configuration of an object; None if it has none."""
    if not hasattr(value, "get_config"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns about functions that it cannot store
        try:
            config = value.get_config()
        except Exception:  # a user's class with arguments that are not plain values
            return None
    return dict(config) if isinstance(config, Mapping) else None


def numbers_of(value: Any) -> dict[str, Any]:
    """The public numeric attributes of an object, such as a loss, that its configuration may lack.

    Empty for layers, whose constructor arguments Keras records itself.
    """
    if isinstance(value, keras.layers.Layer):
        return {}
    held = getattr(value, "__dict__", {})
    return {
        name: each
        for name, each in held.items()
        if isinstance(each, _NUMBERS) and not name.startswith("_") and name != "built"
    }


def _parts(value: Any, inner: Any) -> Iterator[str]:
    found = {**numbers_of(value), **(config_of(value) or {})}
    within = _private.function_within(value)
    if within is not None:  # replaces the same function as Keras would store it
        found["fn"], found["arguments of fn"] = within
    for name in sorted(found):
        if name not in _LEFT_OUT:
            yield f"{name}={_named(name, found[name], inner)}"


def _mapping(value: Mapping[Any, Any], inner: Any) -> str:
    if value.get("class_name") == "__lambda__":  # bytecode that contains the file's path
        return "a lambda"
    pairs = [
        f"{inner(key)}: {_named(key, each, inner)}"
        for key, each in value.items()
        if not (isinstance(key, str) and key in _LEFT_OUT)
    ]
    return f"{{{', '.join(sorted(pairs))}}}"


def _named(name: Any, value: Any, inner: Any) -> str:
    if name == "name" and isinstance(value, str):
        return repr(without_counters(value))
    text: str = inner(value)
    return text


def _number(value: Any) -> str:
    """Describes a number; float32 values with float32 precision, such as 0.01."""
    with np.errstate(all="ignore"):
        if isinstance(value, float) and float(np.float32(value)) == value:
            return str(np.float32(value))
    return repr(value)


def _array(value: Any) -> str:
    if tf.is_tensor(value) and not hasattr(value, "numpy"):
        return f"tensor {value.dtype} {value.shape}"
    size = int(np.prod(value.shape))
    return str(np.asarray(value).tolist()) if size <= _MOST_SHOWN else fingerprint(value)


def _function(value: Any, inner: Any) -> str:
    value = inspect.unwrap(value)
    code = getattr(value, "__code__", None)
    if code is None:
        return name_of(value)
    text = f"{name_of(value)} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    held = dict(zip(code.co_freevars, value.__closure__ or (), strict=False))
    made_with = [
        f"{name}={inner(cell.cell_contents)}" for name, cell in held.items() if _is_plain(cell)
    ]
    made_with += [inner(each) for each in value.__defaults__ or ()]
    return f"{text} with {', '.join(made_with)}" if made_with else text


def _is_plain(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, (str, *_NUMBERS))
    except ValueError:  # not yet set
        return False
