"""Draws a measured step: one row per partition, time along the axis."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from opensmp.compiler.format import format_seconds
from opensmp.compiler.plan.report.picture import Bar, PlanFigure, draw_bars, plain, time_unit
from opensmp.errors import StepError

if TYPE_CHECKING:
    from opensmp.api.timeline.timeline import StepTimeline
    from opensmp.compiler.schedule.actions import Action


def draw_timeline(step: StepTimeline, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws the actions of a step to scale, and writes the picture to `path` if there is one."""
    if not step.events:
        raise StepError(
            f"Timeline.plot: step {step.index} of '{step.name}' has no actions on this process's "
            "partitions. Expected: a step that ran here. Plot it in the process that runs it."
        )
    makespan = step.makespan_seconds or 1e-9
    scale, unit = time_unit(makespan)
    segments: dict[int, set[int]] = {}
    for event in step.events:
        segments.setdefault(event.partition, set()).add(event.action.segment)
    bars = [
        Bar(
            event.partition,
            (event.start_seconds - step.start_seconds) * scale,
            (event.end_seconds - step.start_seconds) * scale,
            event.action.kind == "F",
            _text(event.action, len(segments[event.partition]) > 1),
        )
        for event in step.events
    ]
    rows = len(step.devices)
    height = max(1.6, 0.33 * rows + 1.2)
    figure = PlanFigure(figsize=(13.0, height), layout=ConstrainedLayoutEngine())
    axes = figure.add_subplot()
    draw_bars(axes, bars, rows, makespan * scale)
    axes.set_xlabel(unit)
    plain(
        axes,
        f"Step {step.index} of '{step.name}': {format_seconds(makespan)}, bubble "
        f"{100 * step.bubble:.0f} % (pale: forward, full: backward, white: idle; numbers are "
        "microbatches)",
    )
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _text(action: Action, with_segment: bool) -> str:
    if with_segment:
        return action.text
    return str(action.microbatch) if action.kind in "FB" else f"{action.kind}{action.microbatch}"
