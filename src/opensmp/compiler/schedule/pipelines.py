"""The functions that build schedules, by the name of the schedule.

graph = TaskGraph.chain(num_partitions=3, num_microbatches=4)
schedule = build("interleaved", graph, active_microbatches=3)
print(schedule)
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.validate import validate
from opensmp.config.pipelines import PIPELINES
from opensmp.errors import ScheduleError

Builder = Callable[[TaskGraph, int], Schedule]
"""Makes a schedule from the tasks and the maximum number of microbatches in flight."""


def _builder(name: str) -> Builder:
    """Returns the function `name` of the module `name` in this folder."""
    module = f"{__package__}.{name}"
    try:
        return cast(Builder, getattr(importlib.import_module(module), name))
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"opensmp.config.pipelines has a row {name!r}. Expected: the module {module}, and in "
            f"it the function {name}(graph, active_microbatches); {error}."
        ) from error


BUILDERS: Mapping[str, Builder] = MappingProxyType({name: _builder(name) for name in PIPELINES})
"""The function of each schedule in `opensmp.config.pipelines`."""


def build(name: str, graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Builds a schedule by name and validates it.

    Args:
        name: One of `BUILDERS`.
        graph: The tasks.
        active_microbatches: Maximum number of microbatches in flight, >= 1; schedules that keep
            all in flight ignore it.

    Raises:
        ScheduleError: If the name is unknown or `active_microbatches` is below 1.

    Example:
        >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
        >>> print(build("interleaved", graph, active_microbatches=2))
        device 0 | F0 F1 .. .. B0--- .. B1---
        device 1 | .. F0 B0--- F1 B1--- .. ..
        interleaved: makespan 9 s, bubble 33.3 %, one column 1 s
    """
    if name not in BUILDERS:
        known = ", ".join(map(repr, BUILDERS))
        near = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ScheduleError(
            f"Schedule: pipeline={name!r} is not known; choose one of {known}{hint}"
        )
    schedule = BUILDERS[name](graph, active_microbatches)
    validate(schedule, graph)
    return schedule
