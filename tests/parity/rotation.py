"""Which comparisons run today; all of them take hours."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

from parity.case import Case
from parity.cases import CASES
from parity.layout import Layout
from turns import day, has_turn

from opensmp.config.pipelines import PIPELINES

NUM_TODAY = 4

Pair = TypeVar("Pair", bound=tuple[Any, ...])

LAYOUTS = tuple(
    Layout(partitions, microbatches, pipeline, pattern)
    for partitions in (1, 2, 3, 4)
    for microbatches in (1, 2, 3, 4, 8, 16)
    for pipeline in sorted(PIPELINES)
    for pattern in ("blocks", "cyclic", "v")
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
    """Today's, and all others: every case has its turn every third day, with its layouts in turn.

    Cases that take long have none: the zoo has such models.
    """
    pairs = [(case, layout) for case in CASES for layout in case.layouts]
    today = [
        (case, case.layouts[day() // 3 % len(case.layouts)])
        for number, case in enumerate(CASES)
        if has_turn(number, 3) and not case.heavy
    ]
    return today, [pair for pair in pairs if pair not in today]


def rotating() -> list[tuple[Case, Layout]]:
    """A few comparisons of the sweep, others every day."""
    quick = [pair for pair in SWEEP if pair[1].microbatches <= 2]
    return part_of_today(quick, NUM_TODAY)


def part_of_today(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """So many of the comparisons, others every day."""

    def rank(pair: Pair) -> int:
        return zlib.crc32(f"{day()} {pair[0]} {pair[1]}".encode())

    return sorted(pairs, key=rank)[:count]
