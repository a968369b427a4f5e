"""Which comparisons run today; all of them take hours.

The environment variable PARITY_ROTATION takes the place of the date.
"""

from __future__ import annotations

import datetime
import os
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

from parity.case import Case
from parity.cases import CASES
from parity.layout import Layout

NUM_TODAY = 4

Pair = TypeVar("Pair", bound=tuple[Any, ...])

LAYOUTS = tuple(
    Layout(partitions, microbatches, pipeline, pattern)
    for partitions in (1, 2, 3, 4)
    for microbatches in (1, 2, 3, 4, 8, 16)
    for pipeline in ("interleaved", "simple", "zero_bubble")
    for pattern in ("blocks", "cyclic")
)

SWEEP = [
    (case, layout)
    for case in CASES
    if not case.heavy
    # Where a case is about automatic partitions, the same model by hand is a case of its own.
    if any(layout.pattern != "auto" for layout in case.layouts)
    for layout in LAYOUTS
    if layout not in case.layouts
]


def layouts_of_cases() -> tuple[list[tuple[Case, Layout]], list[tuple[Case, Layout]]]:
    """Today's layout of each case, which are its layouts in turn, and all others.

    Of cases that take long one has its turn.
    """
    pairs = [(case, layout) for case in CASES for layout in case.layouts]
    heavy = [pair for pair in pairs if pair[0].heavy]
    today = [heavy[_day() % len(heavy)]]
    for case in CASES:
        if not case.heavy:
            turn = _day() + zlib.crc32(case.name.encode())
            today.append((case, case.layouts[turn % len(case.layouts)]))
    return today, [pair for pair in pairs if pair not in today]


def rotating() -> list[tuple[Case, Layout]]:
    """A few comparisons of the sweep, others every day."""
    quick = [pair for pair in SWEEP if pair[1].microbatches <= 2]
    return part_of_today(quick, NUM_TODAY)


def part_of_today(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """So many of the comparisons, others every day."""

    def rank(pair: Pair) -> int:
        return zlib.crc32(f"{_day()} {pair[0]} {pair[1]}".encode())

    return sorted(pairs, key=rank)[:count]


def _day() -> int:
    chosen = os.environ.get("PARITY_ROTATION")
    return zlib.crc32(chosen.encode()) if chosen else datetime.date.today().toordinal()
