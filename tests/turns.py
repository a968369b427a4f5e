"""What takes long is tested in turns: a part each day, all of it with `-m "slow or not slow"`."""

from __future__ import annotations

import datetime
import os
import zlib
from collections.abc import Iterable
from typing import Any

import pytest


def day() -> int:
    """Number of the day; the environment variable TESTS_ROTATION takes its place."""
    chosen = os.environ.get("TESTS_ROTATION")
    return zlib.crc32(chosen.encode()) if chosen else datetime.date.today().toordinal()


def has_turn(number: int, of: int) -> bool:
    """Whether number `number` of `of` things has its turn today."""
    return day() % of == number % of


def has_days_turn(name: str, of: int) -> bool:
    """Whether what has a name has its turn today: on one day of so many, in an order of no rule.

    So it also meets, on some days, the turns that parts of it take one after another.
    """
    return zlib.crc32(f"{day()} {name}".encode()) % of == 0


def in_turn(things: Iterable[Any], of: int) -> list[Any]:
    """Parameters of a test: every so many of them has its turn, the others are slow."""
    return [
        pytest.param(thing, id=str(thing), marks=() if has_turn(number, of) else pytest.mark.slow)
        for number, thing in enumerate(things)
    ]


def turn(number: int, of: int) -> Any:
    """Decorator of a test that has its turn every `of` days, and is slow on the others."""
    return (lambda test: test) if has_turn(number, of) else pytest.mark.slow
