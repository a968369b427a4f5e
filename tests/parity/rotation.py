"""The sweep over all layouts, and the part of it that runs today."""

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


def rotating() -> list[tuple[Case, Layout]]:
    """A few comparisons of the sweep, others every day.

    The environment variable PARITY_ROTATION takes the place of the date.
    """
    quick = [pair for pair in SWEEP if pair[1].microbatches <= 2]
    return part_of_today(quick, NUM_TODAY)


def part_of_today(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """So many of the comparisons, others every day; see `rotating`."""
    seed = os.environ.get("PARITY_ROTATION") or datetime.date.today().isoformat()

    def rank(pair: Pair) -> int:
        return zlib.crc32(f"{seed} {pair[0]} {pair[1]}".encode())

    return sorted(pairs, key=rank)[:count]
