"""Draws a schedule as text: a row per device, a column per unit of time."""

from __future__ import annotations

import math

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.simulate import Simulation, simulate


def grid(schedule: Schedule, graph: TaskGraph | None = None, max_columns: int = 1000) -> str:
    """Draws a schedule with its bubbles.

    A cell is `F0` or `B3` (kind and microbatch), preceded by the segment if a device has several:
    `2F0`. Hyphens extend an action over further units of time, dots mark a unit of bubble. The unit
    is the shortest action.

    Args:
        schedule: A valid schedule for `graph`.
        graph: The tasks, for the times. If None, each row is just the order of a device.
        max_columns: Maximum width; a longer schedule uses a coarser unit, and its shortest actions
            are not drawn.
    """
    label = _labels(schedule)
    width = max((len(text) for text in label.values()), default=2)
    if graph is None:
        rows = [
            " ".join(label[action].ljust(width) for action in order).rstrip()
            for order in schedule.orders
        ]
        return _frame(rows, f"{schedule.name}: one column per action")

    simulation = simulate(schedule, graph)
    unit = _unit_seconds(graph, simulation, max_columns)
    columns = _column(simulation.makespan_seconds, unit)
    rows, num_hidden = [], 0
    for order in schedule.orders:
        cells, drawn = [], 0
        for action in order:
            first = _column(simulation.start[action], unit)
            last = _column(simulation.end[action], unit)
            if first == last:
                num_hidden += 1
                continue
            cells += ["." * width] * (first - drawn)
            cells.append(_stretched(label[action], width, last - first))
            drawn = last
        cells += ["." * width] * (columns - drawn)
        rows.append(" ".join(cells).rstrip())
    legend = (
        f"{schedule.name}: makespan {simulation.makespan_seconds:g} s, "
        f"bubble {100 * simulation.bubble:.1f} %, one column {unit:g} s"
    )
    if num_hidden:
        legend += f", {num_hidden} shorter actions not drawn"
    return _frame(rows, legend)


def _labels(schedule: Schedule) -> dict[Action, str]:
    several = any(len({action.segment for action in order}) > 1 for order in schedule.orders)
    return {
        action: action.text if several else action.text.removeprefix(str(action.segment))
        for order in schedule.orders
        for action in order
    }


def _unit_seconds(graph: TaskGraph, simulation: Simulation, max_columns: int) -> float:
    shortest = min((seconds for seconds in graph.seconds.values() if seconds > 0), default=1.0)
    return max(shortest, simulation.makespan_seconds / max_columns)


def _column(seconds: float, unit: float) -> int:
    # Rounds halves up: `round` rounds them to even, which would give an action of one unit no
    # column, or two.
    return math.floor(seconds / unit + 0.5)


def _stretched(text: str, width: int, num_columns: int) -> str:
    if num_columns == 1:
        return text.ljust(width)
    return text.ljust(num_columns * (width + 1) - 1, "-")


def _frame(rows: list[str], legend: str) -> str:
    digits = len(str(len(rows) - 1))
    lines = [f"device {device:>{digits}} | {row}".rstrip() for device, row in enumerate(rows)]
    return "\n".join([*lines, legend])
