"""Kinds of configuration values: how each is checked, and read from text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol

from opensmp.base.message_text import did_you_mean, shown
from opensmp.base.strict_json import JsonFault, parse_json

MOST_PARTITIONS = 100_000
"""Larger values are almost certainly typing errors, and loops over the partitions would not end."""

MOST_MICROBATCHES = 1_000_000
"""As `MOST_PARTITIONS`, for microbatches."""

_DEVICE_NAME = re.compile(r"(?:/?device:)?(CPU|GPU):([0-9]{1,9})", re.IGNORECASE | re.ASCII)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


class Kind(Protocol):
    """Validator of one key. Both methods raise `ValueError` with a hint or an empty message."""

    @property
    def accepted(self) -> str:
        """The accepted values, in words."""

    def check(self, value: Any) -> Any:
        """Returns the value in its canonical form."""

    def read(self, text: str) -> Any:
        """Converts the text of an environment variable to a value that still has to be checked."""


class IntegerKind(NamedTuple):
    """An integer from `minimum` to `maximum`."""

    minimum: int
    maximum: int

    @property
    def accepted(self) -> str:
        """See `Kind`."""
        return f"an integer >= {self.minimum} and <= {self.maximum}"

    def check(self, value: Any) -> int:
        """See `Kind`."""
        # bool is a subclass of int but not accepted; NumPy integers are not ints but accepted.
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError
        number = int(value)
        if not self.minimum <= number <= self.maximum:
            raise ValueError
        return number

    def read(self, text: str) -> int:
        """See `Kind`."""
        if not _INTEGER.fullmatch(text.strip()):
            raise ValueError
        return int(text)


def is_count(value: Any, most: int) -> bool:
    """Whether a value is an integer from 1 to `most`."""
    try:
        IntegerKind(1, most).check(value)
    except ValueError:
        return False
    return True


class OptionalIntegerKind(NamedTuple):
    """An integer or None."""

    integer: IntegerKind

    @property
    def accepted(self) -> str:
        """See `Kind`."""
        return f"{self.integer.accepted}, or None to choose automatically"

    def check(self, value: Any) -> int | None:
        """See `Kind`."""
        return None if value is None else self.integer.check(value)

    def read(self, text: str) -> int:
        """See `Kind`."""
        return self.integer.read(text)


class BooleanKind(NamedTuple):
    """A boolean, in text also 1/0, yes/no and on/off."""

    accepted: str = "True or False"

    def check(self, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise ValueError
        return value

    def read(self, text: str) -> bool:
        """See `Kind`."""
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE


class ChoiceKind(NamedTuple):
    """One of several strings."""

    choices: tuple[str, ...]

    @property
    def accepted(self) -> str:
        """See `Kind`."""
        *others, last = map(repr, self.choices)
        return f"{', '.join(others)} or {last}"

    def check(self, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str):
            raise ValueError
        if value not in self.choices:
            raise ValueError(did_you_mean(value, self.choices))
        return value

    def read(self, text: str) -> str:
        """See `Kind`."""
        return text.strip()


class PipelineKind(NamedTuple):
    """One of several strings, the path of a JSON file, or a function."""

    choices: tuple[str, ...]

    @property
    def accepted(self) -> str:
        """See `Kind`."""
        return (
            f"{', '.join(map(repr, self.choices))}, the path of a schedule's file that ends with "
            "'.json', or a function of a task graph"
        )

    def check(self, value: Any) -> Any:
        """See `Kind`."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            if value in self.choices:
                return value
            if value.endswith(".json") and "\0" not in value:
                return value
            raise ValueError(did_you_mean(value, self.choices))
        # A class is callable too, but makes an object of itself.
        if not callable(value) or isinstance(value, type):
            raise ValueError
        return value

    def read(self, text: str) -> str:
        """See `Kind`."""
        return text.strip()


class DevicesKind(NamedTuple):
    """`"cpu"`, `"gpu"`, distinct logical devices or None; device names are normalized."""

    accepted: str = (
        "'cpu', 'gpu', a list of different logical devices such as ['CPU:0', 'CPU:1'], "
        "or None to choose automatically"
    )

    def check(self, value: Any) -> str | tuple[str, ...] | None:
        """See `Kind`."""
        if value is None:
            return None
        if isinstance(value, str):
            if value.lower() not in ("cpu", "gpu"):
                raise ValueError
            return value.lower()
        # Bytes and ranges are sequences too, but never of names.
        if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray | range):
            raise ValueError
        if not value:
            raise ValueError
        if len(value) > MOST_PARTITIONS:
            raise ValueError(f"these are {len(value)}, more than {MOST_PARTITIONS} partitions")
        names = tuple(_device_name(item) for item in value)
        if len(set(names)) < len(names):
            raise ValueError("a device cannot hold two partitions")
        return names

    def read(self, text: str) -> str | list[str]:
        """See `Kind`."""
        word = text.strip()
        if word.lower() in ("cpu", "gpu"):
            return word
        return [item.strip() for item in word.split(",")]


class PlanKind(NamedTuple):
    """A path, a dict of paths by model name or None; a dict becomes sorted pairs."""

    accepted: str = (
        "the path of a plan's JSON file, a dict of such paths by the name of the model, or None"
    )

    def check(self, value: Any) -> str | tuple[tuple[str, str], ...] | None:
        """See `Kind`."""
        if value is None:
            return None
        if isinstance(value, tuple) and all(map(_is_named_path, value)):
            value = dict(value)
        if not isinstance(value, Mapping):
            return path_of(value)
        if not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError("name the models")
        # Sorted pairs keep the configuration hashable.
        return tuple(sorted((name, path_of(path)) for name, path in value.items()))

    def read(self, text: str) -> Any:
        """See `Kind`."""
        return word_or_json(text)


def word_or_json(text: str) -> Any:
    """Returns a text without the spaces around it, or the dict that it is in JSON."""
    word = text.strip()
    if not word.startswith("{"):
        return word
    try:
        return parse_json(word)
    except JsonFault as error:
        raise ValueError(f"it is not JSON that can be used ({error})") from None


def _is_named_path(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def path_of(value: Any) -> str:
    """Returns a path as text; raises `ValueError` if it is none."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError
    path = os.fspath(value)
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ValueError
    return path


def _device_name(item: Any) -> str:
    match = _DEVICE_NAME.fullmatch(item.strip()) if isinstance(item, str) else None
    if match is None:
        raise ValueError(f"{shown(item, 40)} is not a logical device")
    return f"{match[1].upper()}:{int(match[2])}"
