"""The pipeline schedules by name, the values of the configuration key `pipeline`.

The function that builds a schedule has the schedule's name, in a module of this name in
`opensmp.compiler.schedule.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Pipeline(NamedTuple):
    """What the rest of the package must know about a schedule.

    Attributes:
        name: Name of the schedule, of its module and of the function in it.
        summary: The order of its passes, as a clause.
        holds_all: Whether all microbatches are in flight, whatever `active_microbatches` says.
        defers_weights: Whether the second half of backward passes, the actions W for weights, may
            run later than right after B. The other schedules split backward passes only to make the
            next partition wait less.
    """

    name: str
    summary: str
    holds_all: bool = False
    defers_weights: bool = False


_ROWS = (
    Pipeline(
        "simple",
        "runs all forward passes, then all backward passes (GPipe)",
        holds_all=True,
    ),
    Pipeline(
        "interleaved",
        "runs a backward pass as soon as it is ready (1F1B)",
    ),
    Pipeline(
        "zero_bubble",
        "defers weight gradients to fill the bubble at the end",
        defers_weights=True,
    ),
)

PIPELINES: Mapping[str, Pipeline] = MappingProxyType({row.name: row for row in _ROWS})
"""All schedules, by name."""

DEFAULT_PIPELINE = "interleaved"


def most_in_flight(partitions: int) -> int:
    """Returns the most microbatches that are in flight by default, if they need not all be.

    Two more than a pipeline of equal partitions needs, for partitions that are not equal.
    """
    return partitions + 2
