"""The schedules by name, the values of the configuration key `pipeline`.

graph = TaskGraph.chain(num_partitions=3, num_microbatches=4)
schedule = build("interleaved", graph, active_microbatches=3)
print(schedule)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from opensmp.compiler.schedule.actions import Action, Kind, Schedule, TaskGraph, default_seconds
from opensmp.compiler.schedule.grid import grid
from opensmp.compiler.schedule.interleaved import interleaved
from opensmp.compiler.schedule.list_scheduling import list_schedule
from opensmp.compiler.schedule.simple import simple
from opensmp.compiler.schedule.simulate import Simulation, simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.compiler.schedule.zero_bubble import zero_bubble
from opensmp.errors import ScheduleError

__all__ = [
    "DEFERS_WEIGHTS",
    "PIPELINES",
    "Action",
    "Kind",
    "Schedule",
    "Simulation",
    "TaskGraph",
    "build",
    "default_seconds",
    "grid",
    "interleaved",
    "list_schedule",
    "simple",
    "simulate",
    "validate",
    "zero_bubble",
]


def _simple(graph: TaskGraph, active_microbatches: int) -> Schedule:
    # This schedule keeps all microbatches in flight, regardless of the bound.
    return simple(graph)


PIPELINES: Mapping[str, Callable[[TaskGraph, int], Schedule]] = MappingProxyType(
    {"simple": _simple, "interleaved": interleaved, "zero_bubble": zero_bubble}
)
"""The values of the configuration key `pipeline`: name -> (graph, active_microbatches)."""

DEFERS_WEIGHTS = frozenset({"zero_bubble"})
"""Pipelines that defer the second half of backward passes, the actions W for weights.

The others run W immediately after B; they split backward passes only to make the next partition
wait less.
"""


def build(name: str, graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Builds a schedule by name and validates it.

    Args:
        name: One of `PIPELINES`.
        graph: The tasks.
        active_microbatches: Maximum number of microbatches in flight, >= 1; `"simple"` ignores it.

    Raises:
        ScheduleError: If the name is unknown or `active_microbatches` is below 1.

    Example:
        >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
        >>> print(build("interleaved", graph, active_microbatches=2))
        device 0 | F0 F1 .. .. B0--- .. B1---
        device 1 | .. F0 B0--- F1 B1--- .. ..
        interleaved: makespan 9 s, bubble 33.3 %, one column 1 s
    """
    if name not in PIPELINES:
        known = ", ".join(map(repr, PIPELINES))
        near = difflib.get_close_matches(name, PIPELINES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ScheduleError(
            f"Schedule: pipeline={name!r} is not known; choose one of {known}{hint}"
        )
    schedule = PIPELINES[name](graph, active_microbatches)
    validate(schedule, graph)
    return schedule
