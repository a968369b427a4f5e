"""The functions that build schedules, by the name of the schedule.

graph = TaskGraph.chain(num_partitions=3, num_microbatches=4)
schedule = build("interleaved", graph, active_microbatches=3)
print(schedule)
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import cast

from opensmp.base.message_text import counted
from opensmp.compiler.schedule.actions import Schedule, TaskGraph
from opensmp.compiler.schedule.interleaving import (
    hidden_transfer_seconds,
    longest_ways,
    seconds_with_transfers,
)
from opensmp.compiler.schedule.methods.zero_bubble import MOST_ACTIONS_TO_SEARCH
from opensmp.compiler.schedule.own_schedule import own_schedule
from opensmp.compiler.schedule.simulate import simulate
from opensmp.compiler.schedule.validate import validate
from opensmp.config.pipelines import PIPELINES, OwnPipeline, most_in_flight
from opensmp.errors import ScheduleError

Builder = Callable[[TaskGraph, int], Schedule]
"""Makes a schedule from the tasks and the maximum number of microbatches in flight."""


def _builder(name: str) -> Builder:
    """Returns the function `name` of the module `name` in this folder."""
    module = f"{__package__}.methods.{name}"
    try:
        return cast(Builder, getattr(importlib.import_module(module), name))
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"opensmp.config.pipelines has a row {name!r}. Expected: the module {module}, and in "
            f"it the function {name}(graph, active_microbatches); {error}."
        ) from error


BUILDERS: Mapping[str, Builder] = MappingProxyType({name: _builder(name) for name in PIPELINES})
"""The function of each schedule in `opensmp.config.pipelines`."""


_SAME_TIME = 1.01  # steps of up to this ratio count as equally long


def build(
    name: OwnPipeline,
    graph: TaskGraph,
    active_microbatches: int | None = None,
    *,
    hides_latency: bool = False,
) -> Schedule:
    """Builds a schedule by name, or one of a user's own, and validates it.

    Args:
        name: One of `BUILDERS`, the path of a JSON file, or a function; see `own_schedule`.
        graph: The tasks.
        active_microbatches: Maximum number of microbatches in flight, >= 1; schedules that keep
            all in flight ignore it. None for what a schedule with an order of its own needs, and
            otherwise for the fewest with which a step takes at most 1 % longer than with
            `most_in_flight`, by a simulation with transfers.
        hides_latency: Whether transfers may take long, as between machines. Then as many
            microbatches are in flight as may be, in an order that hides the longest transfers that
            so many can hide. Schedules with an order of their own keep it.

    Raises:
        ScheduleError: If the name is unknown, `active_microbatches` is below 1, or a schedule of a
            user's own does not fit the graph, or holds more microbatches than that in flight.

    Example:
        >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=2)
        >>> print(build("interleaved", graph, active_microbatches=2))
        device 0 | F0 F1 .. .. B0--- .. B1---
        device 1 | .. F0 B0--- F1 B1--- .. ..
        interleaved: makespan 9 s, bubble 33.3 %, one column 1 s
    """
    if not isinstance(name, str) or name.endswith(".json"):
        schedule = own_schedule(name, graph)
        validate(schedule, graph)
        if active_microbatches is not None:
            _refuse_more_in_flight(schedule, graph, active_microbatches)
        return schedule
    if name not in BUILDERS:
        known = ", ".join(map(repr, BUILDERS))
        near = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ScheduleError(
            f"Schedule: pipeline={name!r} is not known; choose one of {known}{hint}"
        )
    if hides_latency and _can_hide_latency(name, active_microbatches):
        schedule = _hiding_latency(name, graph, active_microbatches)
    elif active_microbatches is None and PIPELINES[name].held is not None:
        schedule = BUILDERS[name](graph, max(1, len(graph.microbatches)))
    elif active_microbatches is None:
        schedule = _with_few_in_flight(name, graph)
    else:
        schedule = BUILDERS[name](graph, active_microbatches)
    validate(schedule, graph)
    return schedule


def _can_hide_latency(name: str, active_microbatches: int | None) -> bool:
    """Whether a schedule has a bound on microbatches, and no order that it keeps in any case."""
    row = PIPELINES[name]
    is_fixed = row.held is not None and not row.uses_costs and active_microbatches is None
    return not (row.holds_all or is_fixed)


def _hiding_latency(name: str, graph: TaskGraph, active_microbatches: int | None) -> Schedule:
    """Builds a schedule that hides the longest transfers that its microbatches in flight can."""
    most = active_microbatches or most_in_flight(graph.num_devices)
    seconds = hidden_transfer_seconds(graph, most)
    bound = most
    if active_microbatches is None and PIPELINES[name].held is not None:
        bound = max(1, len(graph.microbatches))
    schedule = BUILDERS[name](replace(graph, transfer_seconds=seconds), bound)
    return replace(schedule, graph=graph)


def _refuse_more_in_flight(schedule: Schedule, graph: TaskGraph, most: int) -> None:
    in_flight = simulate(schedule, graph).peak_in_flight
    if in_flight > most:
        raise ScheduleError(
            f"Schedule {schedule.name!r}: it has {counted(in_flight, 'microbatch')} in flight at "
            f"once, but active_microbatches is {most}; change its orders, or leave out "
            "active_microbatches."
        )


def _with_few_in_flight(name: str, graph: TaskGraph) -> Schedule:
    """Builds a schedule with the fewest microbatches in flight that keep a step as short."""
    make = functools.partial(BUILDERS[name], graph)
    most = max(1, min(most_in_flight(graph.num_devices), len(graph.microbatches)))
    widest = make(most)
    if PIPELINES[name].holds_all:
        return widest
    limit = _SAME_TIME * seconds_with_transfers(graph, widest)
    # With k in flight, a step takes a k-th of the time that its microbatches take one by one.
    least = max(1, math.ceil(longest_ways(graph) / limit)) if limit else 1
    short: dict[int, Schedule] = {most: widest}

    def is_short(count: int) -> bool:
        schedule = make(count)
        if seconds_with_transfers(graph, schedule) > limit:
            return False
        short[count] = schedule
        return True

    if len(graph.device) <= MOST_ACTIONS_TO_SEARCH:
        return short[next(filter(is_short, range(least, most)), most)]
    return short[_first(is_short, least, most, guess=graph.num_devices)]


def _first(is_right: Callable[[int], bool], low: int, high: int, guess: int) -> int:
    """Returns the first number from `low` to `high` that is right, if all after it are; or `high`.

    Tries the guess and the number before it first, then halves what is left.
    """
    tries = [guess, guess - 1]
    while low < high:
        middle = next((number for number in tries if low <= number < high), (low + high) // 2)
        if is_right(middle):
            high = middle
        else:
            low = middle + 1
    return high
