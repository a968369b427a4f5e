"""Parsing of settings that give a level to the whole model, or to partitions in a dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opensmp.base.message_text import did_you_mean, shown


def one_of(value: Any, choices: tuple[str, ...]) -> str:
    """Returns a level; raises `ValueError` with a hint if it is none of `choices`."""
    if isinstance(value, str) and value in choices:
        return value
    near = did_you_mean(value, choices)
    raise ValueError(near or f"{shown(value, 40)} is not one of {', '.join(map(repr, choices))}")


def pairs(value: Any, name: str = "") -> list[tuple[Any, Any]]:
    """Returns the entries of a dict, or of the pairs that it has become."""
    if isinstance(value, Mapping):
        return list(value.items())
    if is_pairs(value):
        return list(value)
    what = f"{name!r} is a dict with a level each; " if name else ""
    raise ValueError(f"{what}received {shown(value, 40)}")


def is_pairs(value: Any) -> bool:
    """Whether a value is a tuple of pairs, as a checked dict is."""
    return isinstance(value, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in value)


def partition_number(key: Any) -> int:
    """Returns the partition that a key of a dict names, also as JSON writes it."""
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10:
        return int(key)
    raise ValueError(f"{shown(key, 40)} is not the number of a partition")
